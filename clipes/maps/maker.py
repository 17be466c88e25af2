"""CLIP, the words and the affinity put together: images and their labels to refined maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from threading import BoundedSemaphore

import numpy as np
import torch
from torch import Tensor

from clipes.choices import Fusion
from clipes.config import CamParams, PatchParams
from clipes.device import memory_error_as
from clipes.maps.affinity import Walk, sinkhorn
from clipes.maps.fusion import MakeMaps, fused_maps
from clipes.maps.gradcam import softmax_gradcam
from clipes.maps.looks import Looks, Statistics, final_maps, image_statistics
from clipes.maps.patches import Evidence, compare, first_maps, patch_features
from clipes.towers.clip import Backbone, Encoding, Grid
from clipes.types import CamMaps, Float32Array, UInt8Array, size_text
from clipes.words.features import TextFeatures

_PAIRS_AT_ONCE = 1 << 23  # of patches, in a batch: 14 images of 500 x 375, 400 MB a block


@dataclass(frozen=True)
class Prepared:
    """An image, ready for CLIP.

    Attributes:
        pixels: (3, H, W) float32, see ``Backbone.prepare``.
        labels: 0-based classes that it shows.
        size: (H0, W0) of the image.
    """

    pixels: Tensor
    labels: tuple[int, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class Sight:
    """What one pass over an image leaves behind.

    Attributes:
        labels: 0-based classes that it shows.
        size: (H0, W0) of the image.
        evidence: What the words say about its patches, classes in the order of their names.
    """

    labels: tuple[int, ...]
    size: tuple[int, int]
    evidence: Evidence

    def alone(self) -> Sight:
        """Return the same without the memory of the batch that it came from."""
        evidence, walk = self.evidence, self.evidence.walk
        return replace(
            self,
            evidence=replace(
                evidence,
                activations=_alone(evidence.activations),
                walk=replace(walk, attention=_alone(walk.attention)),
            ),
        )


class CamMaker:
    """Makes the refined maps of images.

    Classes and background words are worked on in alphabetical order, so that the order they have in
    a vocabulary or in an annotation does not change a map, not even in the last bit.

    Args:
        backbone: CLIP's image tower.
        text: Vectors of the classes, in the order the labels count in, and of the background words.
        params: Settings.
    """

    def __init__(self, backbone: Backbone, text: TextFeatures, params: CamParams) -> None:
        self._backbone = backbone
        self._params = params
        self._looks: Looks | None = None  # every image on its own
        dtype = backbone.visual.proj.dtype
        self._classes = torch.from_numpy(text.class_vectors).to(backbone.device, dtype)
        words = text.background_words
        alphabetical = sorted(range(len(words)), key=words.__getitem__)
        background = torch.from_numpy(text.background_vectors[alphabetical])
        self._background = background.to(backbone.device, dtype)
        self._names = text.classes
        self._largest = text.fusion is Fusion.cam_max
        self._synonyms = [
            torch.from_numpy(vectors).to(backbone.device, dtype) for vectors in text.synonym_vectors
        ]
        # A second batch uses the GPU while boxes are drawn around the maps of the first; more would
        # only take its memory.
        on_gpu = backbone.device.type != "cpu"
        self._turn: AbstractContextManager[object] = (
            BoundedSemaphore(2) if on_gpu else nullcontext()
        )

    def __call__(self, image: UInt8Array, labels: Sequence[int]) -> CamMaps:
        """Return the refined maps of an image.

        Args:
            image: (H0, W0, 3) RGB uint8.
            labels: 0-based classes that it shows.
        """
        return self.maps(*self.look([self.prepare(image, labels)]))

    def prepare(self, image: UInt8Array, labels: Sequence[int]) -> Prepared:
        """Bring an image to CLIP's format; arguments as for a call."""
        pixels = self._backbone.prepare(image, self._params.max_patches)
        return Prepared(pixels, tuple(labels), (image.shape[0], image.shape[1]))

    def look(self, images: Sequence[Prepared]) -> list[Sight]:
        """Run CLIP over images, those of one size together.

        Raises:
            BackendError: The GPU has too little memory for one of them.
        """
        sights: dict[int, Sight] = {}
        for batch in self._of_one_size(images):
            together = [images[index] for index in batch]
            with self._turn:
                sights |= zip(batch, self._look_together(together), strict=True)
        return [sights[index] for index in range(len(images))]

    def maps(self, sight: Sight, *, seen: bool = False) -> CamMaps:
        """Return the refined maps of an image.

        Args:
            sight: What CLIP saw in it.
            seen: Whether the image is among those that say what the classes look like.

        Raises:
            BackendError: The GPU has too little memory for it.
        """
        labels, patches = self._by_name(sight.labels), self._params.patches
        with _memory_for(sight.size):
            if patches is None:
                refined = first_maps(sight.evidence, self._params)
            else:
                own = None if self._looks is None or seen else self.statistics(sight, patches)
                refined = final_maps(
                    sight.evidence, labels, self._looks, own, self._params, patches
                )
        given = refined[[labels.index(label) for label in sight.labels]]
        return CamMaps(np.array(sight.labels, np.int64), given, sight.size)

    def statistics(self, sight: Sight, patches: PatchParams) -> Statistics:
        """Return what an image says about what its classes look like; errors as for ``maps``."""
        labels, classes = self._by_name(sight.labels), len(self._names)
        with _memory_for(sight.size):
            return image_statistics(sight.evidence, labels, classes, self._params, patches)

    def shrinks(self, size: tuple[int, int]) -> bool:
        """Tell whether CLIP looks at a smaller copy of an image of ``size`` (H0, W0)."""
        height, width = self._backbone.grid(size, self._params.max_patches)
        return height * self._backbone.patch < size[0] or width * self._backbone.patch < size[1]

    def no_statistics(self) -> Statistics:
        """Return the statistics of no image."""
        return Statistics.empty(len(self._names), len(self._backbone.visual.proj))

    def with_looks(self, looks: Looks | None) -> CamMaker:
        """Return a maker that knows what the classes look like."""
        informed = copy(self)
        informed._looks = looks
        return informed

    def _by_name(self, labels: Sequence[int]) -> list[int]:
        return sorted(labels, key=self._names.__getitem__)

    def _of_one_size(self, images: Sequence[Prepared]) -> Iterator[list[int]]:
        """Yield the indices of images that fit into one batch."""
        by_size: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.pixels.shape, []).append(index)
        for (_, height, width), indices in by_size.items():
            patches = height * width // self._backbone.patch**2
            most = max(1, _PAIRS_AT_ONCE // patches**2)
            yield from (indices[first : first + most] for first in range(0, len(indices), most))

    def _look_together(self, images: list[Prepared]) -> list[Sight]:
        """Run CLIP over images of one size, fewer at a time if the GPU has too little memory."""
        if len(images) == 1:
            with _memory_for(images[0].size):
                return self._look_at_once(images)
        with suppress(torch.cuda.OutOfMemoryError):
            return self._look_at_once(images)
        half = len(images) // 2
        return self._look_together(images[:half]) + self._look_together(images[half:])

    def _look_at_once(self, images: list[Prepared]) -> list[Sight]:
        pixels = torch.stack([image.pixels for image in images])
        labels = [self._by_name(image.labels) for image in images]
        patches = self._params.patches
        if patches is None:
            found = self._by_gradient(pixels, labels)
        else:
            found = self._by_patches(pixels, labels, patches.temperature)
        return [
            Sight(image.labels, image.size, evidence)
            for image, evidence in zip(images, found, strict=True)
        ]

    def _by_gradient(self, pixels: Tensor, labels: list[list[int]]) -> list[Evidence]:
        encodings = self._backbone.encode(pixels, self._params.affinity_blocks)
        return [
            Evidence(
                activations=encoding.last.activations,
                sources=self._gradcam(encoding, chosen),
                log_words=encoding.attention[:0],  # what patches say alone is not asked for
                walk=self._walk(encoding.attention),
            )
            for encoding, chosen in zip(encodings, labels, strict=True)
        ]

    def _by_patches(
        self, pixels: Tensor, labels: list[list[int]], temperature: float
    ) -> list[Evidence]:
        encoding = self._backbone.encode_patches(pixels, self._params.affinity_blocks)
        features = patch_features(self._backbone, encoding.last)
        return [
            self._compared(
                encoding.last.activations[image].float(),
                (features[0][image], features[1][image]),
                self._walk(encoding.attention[image]),
                encoding.grid,
                chosen,
                temperature,
            )
            for image, chosen in enumerate(labels)
        ]

    def _gradcam(self, encoding: Encoding, labels: list[int]) -> Float32Array:
        make = partial(softmax_gradcam, self._backbone, encoding)
        return self._fuse(make(self._classes[labels], self._background), make, labels)

    def _compared(
        self,
        activations: Tensor,
        features: tuple[Tensor, Tensor],
        walk: Walk,
        grid: Grid,
        labels: list[int],
        temperature: float,
    ) -> Evidence:
        def make(text: Tensor, background: Tensor) -> tuple[Float32Array, Tensor]:
            return compare(features, text, background, grid, temperature)

        maps, log_words = make(self._classes[labels], self._background)
        sources = self._fuse(maps, lambda *words: make(*words)[0], labels)
        return Evidence(activations, sources, log_words, walk)

    def _walk(self, attention: Tensor) -> Walk:
        return sinkhorn(attention.float(), self._params.sinkhorn_iterations)

    def _fuse(self, maps: Float32Array, make: MakeMaps, labels: list[int]) -> Float32Array:
        synonyms = [self._synonyms[label] for label in labels if self._synonyms]
        text = self._classes[labels]
        return fused_maps(maps, make, text, self._background, synonyms, largest=self._largest)


def _alone(part: Tensor) -> Tensor:
    """Return a copy of what is a small part of a larger tensor, and anything else as it is."""
    return part.clone() if part.untyped_storage().nbytes() > 2 * part.nbytes else part


def _memory_for(size: tuple[int, int]) -> AbstractContextManager[None]:
    return memory_error_as(
        f"the GPU has too little memory for an image of {size_text(size)} pixels",
        "use --device cpu, or a GPU that nothing else uses",
    )
