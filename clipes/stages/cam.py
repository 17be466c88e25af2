"""Stage 1: images and their labels to refined activation maps, the only stage that needs CLIP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import copy
from functools import partial

import numpy as np
import torch
from torch import Tensor

from clipes import affinity
from clipes.artifacts import Run
from clipes.clip.backbone import Backbone
from clipes.config import CamParams, PatchParams
from clipes.fusion import MakeMaps, fused_maps
from clipes.gradcam import softmax_gradcam
from clipes.images import read_image
from clipes.looks import Looks, Statistics, final_maps, image_statistics
from clipes.patch_maps import Evidence, compare, patch_features
from clipes.runner import Summary, for_each
from clipes.text_features import TextFeatures
from clipes.types import CamMaps, Failure, Float32Array, Progress, Sample, UInt8Array
from clipes.vocabulary import Fusion

SHRUNK = "are larger than what CLIP looks at: it saw a smaller copy"
"""Said of images beyond ``CamParams.max_patches``."""


class CamMaker:
    """Makes the refined maps of one image after another.

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

    def __call__(self, image: UInt8Array, labels: Sequence[int], *, seen: bool = False) -> CamMaps:
        """Return the refined maps of an image.

        Args:
            image: (H0, W0, 3) RGB uint8.
            labels: 0-based classes that it shows.
            seen: Whether the image is among those that say what the classes look like.
        """
        chosen = sorted(labels, key=self._names.__getitem__)
        if self._params.patches is None:
            refined = self._by_gradient(image, chosen)
        else:
            refined = self._by_patches(image, chosen, self._params.patches, seen=seen)
        given = refined[[chosen.index(label) for label in labels]]
        return CamMaps(np.array(labels, np.int64), given, (image.shape[0], image.shape[1]))

    def statistics(
        self, image: UInt8Array, labels: Sequence[int], patches: PatchParams
    ) -> Statistics:
        """Return what an image says about what its classes look like; arguments as for a call."""
        chosen = sorted(labels, key=self._names.__getitem__)
        evidence = self._evidence(image, chosen, patches)
        return image_statistics(evidence, chosen, len(self._names), self._params, patches)

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

    def _by_gradient(self, image: UInt8Array, labels: list[int]) -> Float32Array:
        prepared = self._backbone.prepare(image, self._params.max_patches)
        (encoding,) = self._backbone.encode(prepared[None], self._params.affinity_blocks)
        cams = self._fuse(partial(softmax_gradcam, self._backbone, encoding), labels)
        return affinity.refine(encoding.attention, cams, self._params)

    def _by_patches(
        self, image: UInt8Array, labels: list[int], patches: PatchParams, *, seen: bool
    ) -> Float32Array:
        evidence = self._evidence(image, labels, patches)
        own = None
        if self._looks is not None and not seen:
            own = image_statistics(evidence, labels, len(self._names), self._params, patches)
        return final_maps(evidence, labels, self._looks, own, self._params, patches)

    def _evidence(self, image: UInt8Array, labels: list[int], patches: PatchParams) -> Evidence:
        prepared = self._backbone.prepare(image, self._params.max_patches)
        blocks = self._params.affinity_blocks
        (encoding,) = self._backbone.encode_patches(prepared[None], blocks)
        features = patch_features(self._backbone, encoding.last)

        def look(text: Tensor, background: Tensor) -> tuple[Float32Array, Tensor]:
            return compare(features, text, background, encoding.grid, patches.temperature)

        return Evidence(
            activations=encoding.last.activations.float(),
            sources=self._fuse(lambda text, background: look(text, background)[0], labels),
            log_words=look(self._classes[labels], self._background)[1],
            walk=affinity.sinkhorn(encoding.attention.float(), self._params.sinkhorn_iterations),
        )

    def _fuse(self, make: MakeMaps, labels: list[int]) -> Float32Array:
        synonyms = [self._synonyms[label] for label in labels if self._synonyms]
        text = self._classes[labels]
        return fused_maps(make, text, self._background, synonyms, largest=self._largest)


def make_cams(
    samples: Sequence[Sample],
    maker: CamMaker,
    run: Run,
    *,
    learnt_from: Collection[str] = (),
    workers: int,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Make and save the maps of every sample that has none yet.

    Args:
        samples: Images with their labels.
        maker: Makes the maps.
        run: Where they go.
        learnt_from: Ids of the images that say what the classes look like.
        workers: How many images at once, each in a thread; see ``share_processor``.
        progress: Called after each image.
        report: Called with each image that cannot be processed; the others go on.
    """

    def make_one(sample: Sample) -> str | None:
        cams = maker(read_image(sample.image), sample.labels, seen=sample.id in learnt_from)
        run.save_cams(sample.id, cams)
        return SHRUNK if maker.shrinks(cams.size) else None

    return for_each(
        make_one,
        samples,
        is_done=lambda sample: run.cams_path(sample.id).exists(),
        backend="threading",
        workers=workers,
        progress=progress,
        report=report,
    )
