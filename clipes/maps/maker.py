"""The towers, the words and the affinity put together: images and their labels to refined maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass
from threading import BoundedSemaphore

import numpy as np
import torch
from torch import Tensor

from clipes.config import CamParams, LooksRound, PatchParams
from clipes.device import memory_for
from clipes.maps.affinity import propagate
from clipes.maps.drawn import drawn_shares, shown_in
from clipes.maps.evidence import (
    FINE,
    Evidence,
    PatchEvidence,
    evidence_of,
    first_maps,
    walk_of,
)
from clipes.maps.finer import finer_maps
from clipes.maps.gradcam import min_max
from clipes.maps.looks import (
    Looks,
    Statistics,
    class_means,
    looks_sources,
    shown_by,
    statistics_of,
    sums_of,
)
from clipes.maps.neighbours import Neighbours, Regions, regions_of, regions_showing
from clipes.maps.patches import strong_patches
from clipes.maps.tiled import Layout, Read, evidence_of_tiles
from clipes.maps.vectors import WordVectors
from clipes.masks.pseudo import disagreement
from clipes.towers.side_by_side import CLIP, Towers
from clipes.towers.taps import finer_grid
from clipes.types import CamMaps, Float32Array, Progress, UInt8Array, size_text
from clipes.words.features import TextFeatures

_PAIRS_AT_ONCE = 1 << 23  # of patches, in a batch: 14 images of 500 x 375, 400 MB a block


@dataclass(frozen=True)
class Prepared:
    """An image, ready for the towers.

    Attributes:
        pixels: (3, H, W) float32 for each tower, by its name; see ``Towers.prepare``.
        labels: 0-based classes that it shows.
        size: (H0, W0) of the image.
    """

    pixels: Mapping[str, Tensor]
    labels: tuple[int, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class PreparedTiles:
    """A picture that the towers are to see in tiles.

    Attributes:
        read: Reads a part of it.
        layout: Of the tiles.
        labels: 0-based classes that it shows.
        progress: Called after each tile.
    """

    read: Read
    layout: Layout
    labels: tuple[int, ...]
    progress: Progress = lambda done, total: None


@dataclass(frozen=True)
class EncodedImage:
    """What one pass over an image leaves behind.

    Attributes:
        labels: 0-based classes that it shows.
        size: (H0, W0) of the image.
        evidence: What it says, classes in the order of their names.
    """

    labels: tuple[int, ...]
    size: tuple[int, int]
    evidence: Evidence


@dataclass(frozen=True)
class Lesson:
    """What an image teaches in a round.

    Attributes:
        statistics: Of what its classes look like.
        regions: What others may ask it after the round; None where no one will.
    """

    statistics: Statistics
    regions: Regions | None


class CamMaker:
    """Makes the refined maps of images.

    Args:
        towers: CLIP, and the others that ``params`` names.
        text: Vectors of the classes, in the order the labels count in, and of the background words.
        params: Settings.
    """

    def __init__(self, towers: Towers, text: TextFeatures, params: CamParams) -> None:
        self._towers = towers
        self._params = params
        self._looks: tuple[Looks | None, ...] = ()  # every image on its own
        dtype = towers.clip.visual.proj.dtype
        self._vectors = WordVectors(text, towers.device, dtype)
        self._evidence_of = evidence_of(towers, self._vectors, params)
        # A second batch uses the GPU while boxes are drawn around the maps of the first; more would
        # only take its memory.
        on_gpu = towers.device.type != "cpu"
        self._turn: AbstractContextManager[object] = (
            BoundedSemaphore(2) if on_gpu else nullcontext()
        )

    def __call__(self, image: UInt8Array, labels: Sequence[int]) -> CamMaps:
        """Return the refined maps of an image.

        Args:
            image: (H0, W0, 3) RGB uint8.
            labels: 0-based classes that it shows.
        """
        return self.maps(*self.encode([self.prepare(image, labels)]))

    def prepare(
        self, image: UInt8Array, labels: Sequence[int], size: tuple[int, int] | None = None
    ) -> Prepared:
        """Bring an image to the towers' formats.

        Args:
            image: (h, w, 3) RGB uint8.
            labels: 0-based classes that it shows.
            size: (H0, W0) of the image that this is a smaller copy of.
        """
        pixels, patches = self._towers.prepare(image, self.max_patches), self._params.patches
        if patches is not None and patches.looks_closer:
            # Where nothing was learnt there may be no second tower; then maps stay as they are.
            tower = self._towers.others.get(patches.likeness_of)
            if tower is not None:
                grid = self._towers.clip.grid((image.shape[0], image.shape[1]), self.max_patches)
                pixels[FINE] = tower.prepare(image, finer_grid(grid, patches.finer))
        return Prepared(pixels, tuple(labels), size or (image.shape[0], image.shape[1]))

    def prepare_tiles(
        self, read: Read, size: tuple[int, int], side: int, labels: Sequence[int]
    ) -> PreparedTiles:
        """Let the towers see a picture in tiles, if the preset ``sees_tiles``.

        Args:
            read: Reads a part of it.
            size: (H0, W0).
            side: Of the tiles, in pixels.
            labels: 0-based classes that it shows.

        Raises:
            ImageError: It would have too many patches.
        """
        layout = Layout.of(size, side, self._towers.clip.patch, self._params.max_patches)
        return PreparedTiles(read, layout, tuple(labels))

    @property
    def sees_tiles(self) -> bool:
        """Whether it can see in tiles: patches are what is compared across them.

        The gradients of the paper's method vanish where a class is certain, so that tiles cannot be
        compared by them.
        """
        return self._params.patches is not None

    @property
    def max_patches(self) -> int:
        """Most patches that are seen at once."""
        return self._params.max_patches

    def encode(self, images: Sequence[Prepared | PreparedTiles]) -> list[EncodedImage]:
        """Run the towers over images, those of one size together.

        Raises:
            BackendError: The GPU has too little memory for one of them.
        """
        encoded = {
            index: self._encode_tiles(image)
            for index, image in enumerate(images)
            if isinstance(image, PreparedTiles)
        }
        for batch in self._of_one_size(images):
            together = [one for index in batch if isinstance(one := images[index], Prepared)]
            with self._turn:
                encoded |= zip(batch, self._encode_together(together), strict=True)
        return [encoded[index] for index in range(len(images))]

    def maps(self, image: EncodedImage, *, in_statistics: bool = False) -> CamMaps:
        """Return the refined maps of an image, after all the rounds that were learnt.

        They are on the grid of the towers' patches, or on the finer one of a closer look.

        Args:
            image: What a pass left behind.
            in_statistics: Whether it is among those that say what the classes look like.

        Raises:
            BackendError: The GPU has too little memory for it.
        """
        labels = self._vectors.by_name(image.labels)
        with _memory_for(image.size):
            refined = self._after(image, len(self._looks), in_statistics)
            words = first_maps(image.evidence, self._params) if self._looks else None
            finest = self._finer(image.evidence, refined)
        given = [labels.index(label) for label in image.labels]
        drift = None if words is None else disagreement(words, refined)[given]
        return CamMaps(np.array(image.labels, np.int64), finest[given], image.size, drift)

    def lesson(
        self,
        image: EncodedImage,
        name: str = "",
        neighbours: Neighbours | None = None,
        drawn: UInt8Array | None = None,
    ) -> Lesson:
        """Return what an image that says what the classes look like teaches in the next round.

        Args:
            image: What a pass left behind.
            name: Its id, by which its own regions are known.
            neighbours: Those of all images, if they are asked before this round.
            drawn: (H0, W0) mask that a person drew of it, which is believed instead of its maps.

        Raises:
            BackendError: The GPU has too little memory for it.
        """
        if drawn is not None:
            return self._lesson_drawn(image, name, drawn)
        number, evidence = len(self._looks), image.evidence
        this, labels = self._patches.rounds[number], self._vectors.by_name(image.labels)
        assert isinstance(evidence, PatchEvidence)
        with _memory_for(image.size):
            maps = self._after(image, number, True, name, neighbours)
            tokens, classes = evidence.of(this.towers), len(self._vectors)
            taught = statistics_of(tokens, shown_by(maps, labels, self._patches), classes)
            regions = None
            if this.neighbours is not None:
                regions = regions_of(name, tokens, maps, labels, classes, this.neighbours)
            return Lesson(taught, regions)

    def _lesson_drawn(self, image: EncodedImage, name: str, drawn: UInt8Array) -> Lesson:
        evidence, this = image.evidence, self._patches.rounds[len(self._looks)]
        assert isinstance(evidence, PatchEvidence)
        tokens, classes = evidence.of(this.towers), len(self._vectors)
        shares = drawn_shares(drawn, evidence.grid)
        taught, regions = statistics_of(tokens, shown_in(shares), classes), None
        if this.neighbours is not None and shares:
            shown = {k: torch.from_numpy(part).to(tokens.device) for k, part in shares.items()}
            regions = regions_showing(name, tokens, shown, classes, this.neighbours)
        return Lesson(taught, regions)

    def no_statistics(self, number: int) -> Statistics:
        """Return the statistics of no image, in the round of a number from 0."""
        width = sum(map(self._towers.width, self._patches.rounds[number].towers))
        return Statistics.empty(len(self._vectors), width)

    def shrinks(self, size: tuple[int, int]) -> bool:
        """Tell whether CLIP looks at a smaller copy of an image of ``size`` (H0, W0)."""
        clip = self._towers.clip
        height, width = clip.grid(size, self._params.max_patches)
        return height * clip.patch < size[0] or width * clip.patch < size[1]

    def with_looks(self, *looks: Looks | None) -> CamMaker:
        """Return a maker that knows what the classes look like after some more rounds."""
        informed = copy(self)
        informed._looks = (*self._looks, *looks)
        return informed

    @property
    def device(self) -> torch.device:
        """Where the towers run."""
        return self._towers.device

    @property
    def _patches(self) -> PatchParams:
        assert self._params.patches is not None  # only presets that learn get here
        return self._params.patches

    def _after(
        self,
        image: EncodedImage,
        rounds: int,
        in_statistics: bool,
        name: str = "",
        neighbours: Neighbours | None = None,
    ) -> Float32Array:
        """Return (K, h, w) maps after so many rounds, classes in the order of their names."""
        evidence = image.evidence
        found = self._looked(image, rounds, in_statistics) if rounds else None
        if found is None or not isinstance(evidence, PatchEvidence):
            return first_maps(evidence, self._params)
        this = self._patches.rounds[rounds - 1]
        walk = walk_of(evidence, self._params, this.likeness_weight)

        def spread(sources: Tensor) -> Float32Array:
            parts = min_max(sources.unflatten(1, evidence.grid).cpu().numpy())
            return propagate(walk, parts, self._params, self._patches.walk_power)

        maps = spread(found)
        if neighbours is None:
            return maps
        labels = self._vectors.by_name(image.labels)
        votes = neighbours.votes(name, evidence.of(this.towers), labels)
        strong = strong_patches(maps, self._patches)[1:]
        wrong = neighbours.contradict(name, strong, votes, labels)
        rows = [votes[1 + k] if k in wrong else found[k] for k in range(len(labels))]
        return spread(torch.stack(rows)) if wrong else maps

    def _finer(self, evidence: Evidence, maps: Float32Array) -> Float32Array:
        """Bring maps to the grid of a closer look, if there was one."""
        if not isinstance(evidence, PatchEvidence) or evidence.closer is None:
            return maps
        closer, temperature = evidence.closer, self._patches.finer_temperature
        return finer_maps(maps, closer.tokens.float(), closer.fine.float(), temperature)

    def _looked(self, image: EncodedImage, rounds: int, in_statistics: bool) -> Tensor | None:
        """Return (K, N) probabilities of what patches look like; None if there is no saying."""
        evidence, looks = image.evidence, self._looks[rounds - 1]
        if looks is None or not isinstance(evidence, PatchEvidence):
            return None
        this: LooksRound = self._patches.rounds[rounds - 1]
        tokens, labels = evidence.of(this.towers), self._vectors.by_name(image.labels)
        own = None
        if this.own_background or not in_statistics:
            maps = self._after(image, rounds - 1, in_statistics)
            own = sums_of(tokens, shown_by(maps, labels, self._patches), len(self._vectors))
        means = class_means(
            looks, labels, own, in_statistics=in_statistics, own_background=this.own_background
        )
        if means is None:
            return None
        return looks_sources(tokens, evidence.log_words, means, looks, self._patches)

    def _encode_tiles(self, image: PreparedTiles) -> EncodedImage:
        labels, layout = self._vectors.by_name(image.labels), image.layout
        with self._turn, _memory_for(layout.size):
            evidence = evidence_of_tiles(
                self._towers,
                self._vectors,
                self._params,
                image.read,
                layout,
                labels,
                image.progress,
            )
        return EncodedImage(image.labels, layout.size, evidence)

    def _of_one_size(self, images: Sequence[Prepared | PreparedTiles]) -> Iterator[list[int]]:
        """Yield the indices of images that fit into one batch."""
        by_size: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(images):
            if isinstance(image, Prepared):
                by_size.setdefault(image.pixels[CLIP].shape, []).append(index)
        for (_, height, width), indices in by_size.items():
            patches = height * width // self._towers.clip.patch**2
            most = max(1, _PAIRS_AT_ONCE // patches**2)
            yield from (indices[first : first + most] for first in range(0, len(indices), most))

    def _encode_together(self, images: list[Prepared]) -> list[EncodedImage]:
        """Run over images of one size, fewer at a time if the GPU has too little memory."""
        if len(images) == 1:
            with _memory_for(images[0].size):
                return self._encode_at_once(images)
        with suppress(torch.cuda.OutOfMemoryError):
            return self._encode_at_once(images)
        half = len(images) // 2
        return self._encode_together(images[:half]) + self._encode_together(images[half:])

    def _encode_at_once(self, images: list[Prepared]) -> list[EncodedImage]:
        names = images[0].pixels
        pixels = {name: torch.stack([image.pixels[name] for image in images]) for name in names}
        labels = [self._vectors.by_name(image.labels) for image in images]
        return [
            EncodedImage(image.labels, image.size, evidence)
            for image, evidence in zip(images, self._evidence_of(pixels, labels), strict=True)
        ]


def _memory_for(size: tuple[int, int]) -> AbstractContextManager[None]:
    return memory_for(
        f"an image of {size_text(size)} pixels",
        "use --device cpu, or a GPU that nothing else uses",
    )
