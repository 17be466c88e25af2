"""What the ablation works with: every image encoded once, then many ways to make maps of it.

All steps are the product's functions; what is here only puts them together in other orders. One
image leaves a ``Tape``; a ``Row`` says how tapes become maps; ``Scorer`` counts what they are worth
on two halves of the images. Shapes as in ``clipes.maps.patches``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from itertools import chain

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from clipes.config import CamParams, CrfParams, PatchParams
from clipes.disk.images import read_image, read_mask
from clipes.maps.affinity import Walk, refine, sinkhorn
from clipes.maps.gradcam import min_max, softmax_gradcam
from clipes.maps.looks import Looks, Statistics, final_maps, image_statistics
from clipes.maps.patches import Evidence, compare, patch_features
from clipes.masks.pseudo import cam_mask, pseudo_label
from clipes.masks.scores import ConfusionMatrix
from clipes.towers.clip import Backbone, Grid, LastInput
from clipes.types import CamMaps, Float32Array, Sample, UInt8Array, evenly_spaced

FOLDS = 16
"""Parts of the data whose looks are learnt from the other parts."""


@dataclass(frozen=True)
class Words:
    """Vectors of all C classes (C, E) and of the background words (B, E)."""

    classes: Tensor
    background: Tensor


@dataclass(frozen=True)
class View:
    """What one pass over an image, or over a changed copy of it, leaves behind.

    Attributes:
        grid: (h, w).
        activations: (N, D).
        features: (N, E) twice, see ``patch_features``.
        walk: The affinity by attention.
    """

    grid: Grid
    activations: Tensor
    features: tuple[Tensor, Tensor]
    walk: Walk


@dataclass(frozen=True)
class Tape:
    """Everything that the rows make maps of, for one image.

    Attributes:
        sample: The image.
        size: (H0, W0).
        truth: (H0, W0) its mask.
        view: The image as it is.
        mirrored: Features of the mirrored image, mirrored back; None if no row asks for them.
        alike: The affinity by how alike queries and keys of the last block are; likewise.
        gradient: (K, h, w) the published method's maps before the affinity.
        published: (K, h, w) its refined maps.
        seconds: Of the processor, by what it was busy with.
    """

    sample: Sample
    size: tuple[int, int]
    truth: UInt8Array
    view: View
    mirrored: tuple[Tensor, Tensor] | None
    alike: Walk | None
    gradient: Float32Array
    published: Float32Array
    seconds: dict[str, float]


@dataclass(frozen=True)
class Towers:
    """The image tower twice, as the published method and as everything else runs it."""

    published: Backbone
    patches: Backbone
    words: Words


class Clock:
    """Processor time by what it was spent on: others may share the machine."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under ``name``."""
        now = time.process_time()
        self.seconds[name] = self.seconds.get(name, 0) + now - self._last
        self._last = now


@torch.inference_mode()
def make_tape(
    towers: Towers, sample: Sample, published: CamParams, *, mirrored: bool, alike: bool
) -> Tape:
    """Encode one image: the published way and by patches, one after the other."""
    assert sample.mask is not None
    image, truth = read_image(sample.image), read_mask(sample.mask)
    text, background = towers.words.classes[list(sample.labels)], towers.words.background
    clock = Clock()
    prepared = towers.published.prepare(image, published.max_patches)[None]
    (encoding,) = towers.published.encode(prepared, published.affinity_blocks)
    clock.lap("encode")
    gradient = softmax_gradcam(towers.published, encoding, text, background)
    refined = refine(encoding.attention, gradient, published)
    clock.lap("gradient")
    del encoding
    view, last = make_view(towers.patches, image, published, clock)
    other = _mirrored(towers.patches, prepared, published) if mirrored else None
    clock.lap("mirrored")
    walk = _alike(last, published) if alike else None
    clock.lap("alike")
    size = (image.shape[0], image.shape[1])
    return Tape(sample, size, truth, view, other, walk, gradient, refined, clock.seconds)


def make_view(
    backbone: Backbone, image: UInt8Array, params: CamParams, clock: Clock
) -> tuple[View, LastInput]:
    """Encode an image by patches."""
    prepared = backbone.prepare(image, params.max_patches)[None]
    encoding = backbone.encode_patches(prepared, params.affinity_blocks)
    clock.lap("encode patches")
    last = encoding.last.of(0)
    features = patch_features(backbone, last)
    walk = sinkhorn(encoding.attention[0].float(), params.sinkhorn_iterations)
    clock.lap("features")
    return View(encoding.grid, last.activations.float(), features, walk), last


def _mirrored(backbone: Backbone, prepared: Tensor, params: CamParams) -> tuple[Tensor, Tensor]:
    encoding = backbone.encode_patches(prepared.flip(-1), params.affinity_blocks)
    first, second = (
        part.unflatten(0, encoding.grid).flip(1).flatten(0, 1)
        for part in patch_features(backbone, encoding.last.of(0))
    )
    return first, second


def _alike(last: LastInput, params: CamParams) -> Walk:
    scale = last.query.shape[-1] ** -0.5
    parts = (last.query, last.key[:, 1:])
    both = [(scale * part @ part.transpose(1, 2)).softmax(-1).mean(0) for part in parts]
    return sinkhorn((both[0] + both[1]).float() / 2, params.sinkhorn_iterations)


@dataclass(frozen=True)
class Look:
    """A way to turn a tape into evidence.

    Attributes:
        make: Does it.
        pieces: What ``Tape.seconds`` a pass costs.
    """

    make: Callable[[Tape, Words, PatchParams], Evidence]
    pieces: tuple[str, ...] = ("encode patches", "features")


def _compared(
    tape: Tape, words: Words, patches: PatchParams, which: tuple[int, int] = (0, 1)
) -> Evidence:
    features = tape.view.features[which[0]], tape.view.features[which[1]]
    return _evidence(tape.view, features, tape, words.background, words, patches)


def _evidence(
    view: View,
    features: tuple[Tensor, Tensor],
    tape: Tape,
    background: Tensor,
    words: Words,
    patches: PatchParams,
) -> Evidence:
    text = words.classes[list(tape.sample.labels)]
    sources, log_words = compare(features, text, background, view.grid, patches.temperature)
    return Evidence(view.activations, sources, log_words, view.walk)


def _with_mirrored(tape: Tape, words: Words, patches: PatchParams) -> Evidence:
    assert tape.mirrored is not None
    first, second = (
        F.normalize(here + there, dim=-1)
        for here, there in zip(tape.view.features, tape.mirrored, strict=True)
    )
    return _evidence(tape.view, (first, second), tape, words.background, words, patches)


def _with_rivals(tape: Tape, words: Words, patches: PatchParams) -> Evidence:
    absent = [k for k in range(len(words.classes)) if k not in tape.sample.labels]
    background = torch.cat([words.background, words.classes[absent]])
    return _evidence(tape.view, tape.view.features, tape, background, words, patches)


def _spread_alike(tape: Tape, words: Words, patches: PatchParams) -> Evidence:
    assert tape.alike is not None
    return replace(_compared(tape, words, patches), walk=tape.alike)


def _gradient(tape: Tape, words: Words, patches: PatchParams) -> Evidence:
    return replace(_compared(tape, words, patches), sources=tape.gradient)


def _with_gradient(tape: Tape, words: Words, patches: PatchParams) -> Evidence:
    found = _compared(tape, words, patches)
    return replace(found, sources=min_max(found.sources + tape.gradient))


_BOTH = ("encode", "gradient", "features")
LOOK = Look(_compared)
FIRST_ONLY = Look(partial(_compared, which=(0, 0)))
SECOND_ONLY = Look(partial(_compared, which=(1, 1)))
RIVALS = Look(_with_rivals)
MIRRORED = Look(_with_mirrored, (*LOOK.pieces, "mirrored"))
ALIKE = Look(_spread_alike, (*LOOK.pieces, "alike"))
GRADIENT = Look(_gradient, _BOTH)
WITH_GRADIENT = Look(_with_gradient, _BOTH)


class Learn(Enum):
    """Whose patches say what the classes of an image look like."""

    run = "the run's, or a sample of it, as the product does"
    twice = "the run's, and the image's own once more"
    held_out = f"those of the other {FOLDS - 1} of {FOLDS} parts"
    held_out_own = f"those of the other {FOLDS - 1} of {FOLDS} parts, and the image's own"
    own_means = "the image's own; the covariance is the run's"
    own = "the image's own"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Its name.
        cam: Settings of the maps; ``patches`` None for the published method.
        crf: Settings of the CRF.
        exponent: alpha of the background.
        look: How a tape becomes evidence.
        learn: Whose looks.
        enlarge: The maps are averaged with those of the image so many times as large; 1: not.
        main: Whether it is worth the time of a CRF.
    """

    name: str
    cam: CamParams
    crf: CrfParams
    exponent: float = 1.0
    look: Look = LOOK
    learn: Learn = Learn.run
    enlarge: float = 1.0
    main: bool = False


@dataclass(frozen=True)
class _Known:
    """What is known before the maps of an image are made.

    Attributes:
        of: Looks, and own statistics to add, by the number of the image.
        passes: Mean number of times an image is encoded.
    """

    of: Callable[[int], tuple[Looks | None, Statistics | None]]
    passes: float


class RowMaps:
    """The maps of one row, image by image, and what they cost.

    Args:
        row: What to do.
        tapes: All images.
        towers: For rows that encode once more.
    """

    def __init__(self, row: Row, tapes: Sequence[Tape], towers: Towers) -> None:
        self._row, self._tapes, self._towers = row, tapes, towers
        self.seconds = 0.0
        """Processor time of all images so far, encoding included."""

    def __iter__(self) -> Iterator[Float32Array]:
        patches = self._row.cam.patches
        if patches is None:
            pieces = ("encode", "gradient")
            for tape in self._tapes:
                self.seconds += sum(tape.seconds[piece] for piece in pieces)
                yield tape.published
            return
        clock = Clock()
        known = self._known(patches)
        for index, tape in enumerate(self._tapes):
            looks, own = known.of(index)
            maps = self._final(tape, looks, own, patches)
            if self._row.enlarge != 1:
                large = self._final(self._enlarged(tape, clock), looks, own, patches)
                maps = min_max(maps + _shrunk(large, tape.view.grid))
            clock.lap("maps")
            encoded = sum(tape.seconds[piece] for piece in self._row.look.pieces)
            self.seconds += known.passes * encoded + sum(clock.seconds.values())
            clock.seconds.clear()
            yield maps
            clock.lap("others")
            clock.seconds.clear()

    def _final(
        self, tape: Tape, looks: Looks | None, own: Statistics | None, patches: PatchParams
    ) -> Float32Array:
        evidence = self._row.look.make(tape, self._towers.words, patches)
        return final_maps(evidence, tape.sample.labels, looks, own, self._row.cam, patches)

    def _enlarged(self, tape: Tape, clock: Clock) -> Tape:
        factor = self._row.enlarge
        image = cv2.resize(read_image(tape.sample.image), None, fx=factor, fy=factor,
                           interpolation=cv2.INTER_CUBIC)  # fmt: skip
        most = round(self._row.cam.max_patches * factor**2)
        params = replace(self._row.cam, max_patches=most)
        view, _ = make_view(self._towers.patches, image.astype(np.uint8), params, clock)
        return replace(tape, view=view)

    def _known(self, patches: PatchParams) -> _Known:
        count, learn = len(self._tapes), self._row.learn
        if learn is Learn.own:
            return _Known(lambda k: (Looks.of(self._statistics(k, patches), patches), None), 1)
        if patches.statistics_images == 0:
            return _Known(lambda _: (None, None), 1)
        if learn in (Learn.held_out, Learn.held_out_own):
            return self._held_out(patches, own=learn is Learn.held_out_own)
        samples = [tape.sample for tape in self._tapes]
        members = evenly_spaced(len(samples), patches.statistics_images)
        looks = Looks.of(self._total(members, patches), patches)

        def of(index: int) -> tuple[Looks | None, Statistics | None]:
            if looks is not None and learn is Learn.own_means:
                own = self._statistics(index, patches)
                return Looks(own.sums, own.mass, looks.precision), None
            again = learn is Learn.twice or index not in members
            return looks, self._statistics(index, patches) if again else None

        return _Known(of, 1 + len(members) / count)

    def _held_out(self, patches: PatchParams, *, own: bool) -> _Known:
        folds = [range(first, len(self._tapes), FOLDS) for first in range(FOLDS)]
        totals = [self._total(fold, patches) for fold in folds]
        looks = []
        for left_out in totals:
            others = Statistics.empty(len(self._towers.words.classes), self._width)
            for total in totals:
                if total is not left_out:
                    others.add(total)
            looks.append(Looks.of(others, patches))

        def of(index: int) -> tuple[Looks | None, Statistics | None]:
            return looks[index % FOLDS], self._statistics(index, patches) if own else None

        return _Known(of, 2)

    @property
    def _width(self) -> int:
        return len(self._towers.patches.visual.proj)

    def _total(self, members: Sequence[int], patches: PatchParams) -> Statistics:
        total = Statistics.empty(len(self._towers.words.classes), self._width)
        for index in members:
            total.add(self._statistics(index, patches))
        return total

    def _statistics(self, index: int, patches: PatchParams) -> Statistics:
        tape, words = self._tapes[index], self._towers.words
        evidence = self._row.look.make(tape, words, patches)
        labels, classes = tape.sample.labels, len(words.classes)
        return image_statistics(evidence, labels, classes, self._row.cam, patches)


def _shrunk(maps: Float32Array, grid: Grid) -> Float32Array:
    size = (grid[1], grid[0])
    small: Float32Array = np.stack([cv2.resize(m, size) for m in maps])
    return small


@dataclass(frozen=True)
class Score:
    """mIoU in percent of the images 0, 2, 4, ... (half A), 1, 3, 5, ... (half B), and all.

    Attributes:
        half_a: See above.
        half_b: See above; as ``half_a`` if there is one image only.
        full: See above.
        seconds: Processor time, per image.
    """

    half_a: float
    half_b: float
    full: float
    seconds: float


def score_row(
    row: Row, tapes: Sequence[Tape], towers: Towers, *, crf: bool
) -> tuple[Score, Score | None]:
    """Make the maps of a row and score them, and their masks after the CRF if ``crf``."""
    n_labels = 1 + len(towers.words.classes)
    before, after = ([ConfusionMatrix(n_labels) for _ in range(2)] for _ in range(2))
    maps, refining = RowMaps(row, tapes, towers), 0.0
    for index, (tape, made) in enumerate(zip(tapes, maps, strict=True)):
        cams = CamMaps(np.array(tape.sample.labels, np.int64), made, tape.size)
        before[index % 2].update(tape.truth, cam_mask(cams, row.exponent))
        if crf:
            image = read_image(tape.sample.image)
            start = time.process_time()
            pseudo = pseudo_label(image, cams, row.crf, background_exponent=row.exponent)
            refining += time.process_time() - start
            after[index % 2].update(tape.truth, pseudo.mask)
    count = len(tapes)
    return (
        _score(before, maps.seconds / count),
        _score(after, refining / count) if crf else None,
    )


def _score(halves: list[ConfusionMatrix], seconds: float) -> Score:
    first, second = halves
    half_a, half_b, full = (
        100 * part.scores().miou
        for part in (first, second if second.images else first, first + second)
    )
    return Score(half_a, half_b, full, seconds)


def pieces_needed(rows: Sequence[Row]) -> set[str]:
    """Return what ``Tape.seconds`` the rows ask for."""
    return set(chain.from_iterable(row.look.pieces for row in rows))
