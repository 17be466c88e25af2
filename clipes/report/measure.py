"""What every image of a report is asked once: its signs, its score, its share of the curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.disk.images import read_header, read_mask
from clipes.errors import ArtifactError, ClipesError
from clipes.masks.pseudo import cam_mask
from clipes.masks.scores import (
    CONFIDENT_MASKS,
    CORRECTED,
    MASKS,
    ConfusionMatrix,
    Scores,
    maps_name,
)
from clipes.masks.values import check_size, require_classes, value_count
from clipes.report.review import Signs, read_signs, reasons, score
from clipes.run.corrected import Chosen
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.relabelled import Relabelled
from clipes.types import IGNORE, CamMaps, Int64Array, PseudoLabel, Sample, UInt8Array, size_text

CUTS: tuple[float, ...] = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, CONFIDENCE_THRESHOLD, 0.98, 0.99, 0.995)
CUTS += (0.998, 0.999, 0.9995, 0.9998, 0.9999, 0.99995, 0.99999)
"""Confidences at which curves are drawn, ever closer to 1: most pixels are there."""


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a report.

    Attributes:
        id: Its id.
        labels: Classes named by its label, 0-based.
        size: (H0, W0), or (0, 0) where that is not known.
        signs: What was seen of it; None if it cannot be used.
        score: How much it needs a person; None if it cannot be used.
        reasons: Why, in words.
        miou: mIoU over the labels that it or its mask holds; None without ground truth.
        failure: Why it cannot be used or shown; empty if it can.
        corrected: Whether a person corrected its mask, which needs none any more.
    """

    id: str
    labels: tuple[int, ...]
    size: tuple[int, int]
    signs: Signs | None = None
    score: float | None = None
    reasons: tuple[str, ...] = ()
    miou: float | None = None
    failure: str = ""
    corrected: bool = False

    @property
    def urgency(self) -> float:
        """What the review queue is sorted by, highest first: what cannot be used leads it."""
        return float("inf") if self.score is None or self.failure else self.score


def review_queue(rows: Iterable[Row]) -> list[Row]:
    """Return the images that need a person, most first; what one corrected needs none."""
    waiting = [row for row in rows if row.failure or not row.corrected]
    return sorted(waiting, key=lambda row: -row.urgency)


@dataclass(frozen=True)
class CurvePoint:
    """The pixels kept at one confidence; all ratios in [0, 1].

    Attributes:
        cut: The lowest confidence kept.
        coverage: Share of the pixels with ground truth that are kept.
        accuracy: Share of those kept that carry the right label.
        miou: mIoU of those kept.
    """

    cut: float
    coverage: float
    accuracy: float
    miou: float


@dataclass
class Tally:
    """Sums over images, of a size that does not depend on their number.

    Attributes:
        n_labels: Number of labels, background included.
        pixels: (len(CUTS),) int64 pixels by the highest cut that they reach.
        counts: (len(CUTS), n, n) int64 of those with ground truth, by true label, then predicted.
        matrices: By what was scored.
    """

    n_labels: int
    pixels: Int64Array = field(init=False)
    counts: Int64Array = field(init=False)
    matrices: dict[str, ConfusionMatrix] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.pixels = np.zeros(len(CUTS), np.int64)
        self.counts = np.zeros((len(CUTS), self.n_labels, self.n_labels), np.int64)

    def add(self, other: Tally) -> None:
        """Add the sums of other images."""
        self.pixels += other.pixels
        self.counts += other.counts
        self.add_matrices(other.matrices)

    def add_matrices(self, matrices: Mapping[str, ConfusionMatrix]) -> None:
        """Add the confusion matrices of other images, by what was scored."""
        for name, matrix in matrices.items():
            known = self.matrices.get(name)
            self.matrices[name] = matrix if known is None else known + matrix

    def scores(self) -> dict[str, Scores]:
        """Return the scores by what was scored, less what shares no pixel with ground truth."""
        return {
            name: matrix.scores() for name, matrix in self.matrices.items() if matrix.counts.any()
        }

    def curve(self) -> list[CurvePoint]:
        """Return coverage, accuracy and mIoU at each cut that keeps other pixels than the last."""
        total = int(self.counts.sum())
        kept = self.counts[::-1].cumsum(axis=0)[::-1]
        points: list[CurvePoint] = []
        for cut, table in zip(CUTS, kept, strict=True):
            pixels = int(table.sum())
            if not pixels:
                break
            scores = ConfusionMatrix.of(table).scores()
            point = CurvePoint(cut, pixels / total, scores.pixel_accuracy, scores.miou)
            if points and points[-1].coverage == point.coverage:
                points.pop()
            points.append(point)
        return points

    def histogram(self) -> list[tuple[float, float, float]]:
        """Return (from, to, share of the pixels) of each pair of cuts; empty before the CRF."""
        total = int(self.pixels.sum())
        ends = pairwise((*CUTS, 1.0))
        return [
            (low, high, int(n) / total)
            for (low, high), n in zip(ends, self.pixels, strict=True)
            if total
        ]


# 65536 confidences there are, each with the highest cut that it reaches.
_BINS = np.searchsorted(
    np.array(CUTS, np.float32), np.arange(1 << 16, dtype=np.float32) / np.float32(65535), "right"
).astype(np.int64)
_BINS -= 1


def measure(
    samples: Sequence[Sample],
    run: Run,
    classes: Sequence[str],
    exponent: float,
    current: Freshness,
    images: Mapping[int, int],
    *,
    again: Relabelled | None = None,
    use_corrected: bool = True,
) -> tuple[list[Row], Tally]:
    """Look at what a run made for some images.

    Args:
        samples: Images that have maps.
        run: The run folder.
        classes: Class names in mask order.
        exponent: alpha of the background score.
        current: Tells what is out of date, and cannot be used.
        images: How many images of the run are labelled with a class, by its 0-based number.
        again: A segmenter's masks of the same images, as a second opinion; None for none.
        use_corrected: Whether a person's masks are looked at, too.

    Returns:
        A row per image, in order, and the sums over those that can be used.
    """
    tally = Tally(value_count(len(classes)))
    rows = []
    chosen = Chosen(run, current, use_corrected)
    for sample in samples:
        try:
            if reason := current.unusable(sample) or chosen.unusable(sample):
                raise ArtifactError(reason)
            row = _measure(sample, chosen, again, classes, exponent, images, tally)
        except ClipesError as error:
            row = Row(sample.id, _known(sample, classes), (0, 0), failure=str(error))
        rows.append(row)
    return rows, tally


def load_outputs(run: Run, sample: Sample, n_classes: int) -> tuple[CamMaps, PseudoLabel | None]:
    """Read what a run made for an image, as far as it fits together.

    Raises:
        ClipesError: A file is damaged, or the maps are of other classes than there are.
    """
    cams = run.load_cams(sample.id)
    strange = [label for label in cams.labels.tolist() if not 0 <= label < n_classes]
    if strange:
        raise ArtifactError(
            f"the maps are of classes {strange}, but there are {n_classes} classes",
            "check that the run belongs to this list of classes",
        )
    pseudo = run.load_pseudo(sample.id) if run.has_pseudo(sample.id) else None
    if pseudo is not None:
        check_size(pseudo.mask, cams.size, "mask")
        remedy = "check that the run belongs to this list of classes"
        require_classes(pseudo.mask, n_classes, "the mask", remedy)
    return cams, pseudo


def check_image(sample: Sample, size: tuple[int, int], cams: CamMaps) -> None:
    """Refuse an image that is no longer of the size that its maps were made for.

    Raises:
        ArtifactError: It is not.
    """
    if cams.size != size:
        raise ArtifactError(
            f"{sample.image} is {size_text(size)}, its maps are for {size_text(cams.size)}",
            "make the run again for the image as it is now",
        )


def _known(sample: Sample, classes: Sequence[str]) -> tuple[int, ...]:
    return tuple(label for label in sample.labels if 0 <= label < len(classes))


def _measure(
    sample: Sample,
    chosen: Chosen,
    again: Relabelled | None,
    classes: Sequence[str],
    exponent: float,
    images: Mapping[int, int],
    tally: Tally,
) -> Row:
    cams, pseudo = load_outputs(chosen.run, sample, len(classes))
    mended = chosen.corrected_mask(sample, len(classes))
    size, _ = read_header(sample.image)
    check_image(sample, size, cams)
    coarse = cam_mask(cams, exponent)
    second = None if again is None else _second_opinion(sample, again, cams, len(classes))
    signs = read_signs(cams, coarse, pseudo, exponent, images, second)
    truth = None
    if sample.mask is not None and sample.mask.is_file():
        truth = read_mask(sample.mask)
        check_size(truth, cams.size, "ground truth")
    masks = {maps_name(exponent): coarse}
    bins = None
    if pseudo is not None:
        bins = _BINS[np.rint(pseudo.confidence * np.float32(65535)).astype(np.uint16)]
        sure = bins >= CUTS.index(CONFIDENCE_THRESHOLD)
        masks[MASKS] = pseudo.mask
        masks[CONFIDENT_MASKS] = np.where(sure, pseudo.mask, np.uint8(IGNORE))
        if chosen.has_some:
            masks[CORRECTED] = pseudo.mask if mended is None else mended
    # From here on everything was read and fits: an image counts wholly or not at all.
    miou = None if truth is None else _score(truth, masks, tally)
    if pseudo is not None and bins is not None:
        tally.pixels += np.bincount(bins.ravel(), minlength=len(CUTS))
        if truth is not None:
            tally.counts += _counts(truth, pseudo.mask, bins, tally.n_labels)
    return Row(
        sample.id,
        tuple(cams.labels.tolist()),
        cams.size,
        signs,
        score(signs) if mended is None else 0.0,
        _told(chosen, sample, mended, pseudo) or reasons(signs, classes),
        miou,
        corrected=mended is not None,
    )


def _second_opinion(
    sample: Sample, again: Relabelled, cams: CamMaps, n_classes: int
) -> UInt8Array | None:
    """Read a segmenter's mask (H0, W0) of an image; None without one that it would make now."""
    if not again.is_done(sample) or again.is_edited(sample):
        return None
    try:
        mask = read_mask(again.files.pseudo_path(sample.id))
        check_size(mask, cams.size, "segmenter's mask")
        require_classes(mask, n_classes, "the segmenter's mask", "run 'clipes relabel' again")
    except ClipesError:  # the image itself is none the worse for it
        return None
    return mask


def _told(
    chosen: Chosen, sample: Sample, mended: UInt8Array | None, pseudo: PseudoLabel | None
) -> tuple[str, ...]:
    """Say who corrected a mask, and how much of the one before they left; nothing if no one did."""
    if mended is None:
        return ()
    who = chosen.corrected_by(sample)
    if pseudo is None:
        return (f"corrected{who}",)
    if np.array_equal(mended, pseudo.mask):
        return (f"seen{who}, and left as it was",)
    kept = float((mended == pseudo.mask).mean())
    return (f"corrected{who}: {100 * kept:.1f} % of the pixels are as before",)


def _score(truth: UInt8Array, masks: dict[str, UInt8Array], tally: Tally) -> float | None:
    """Add the scores of the masks of one image; return the mIoU of the CRF's, else the map's."""
    matrices = {}
    for name, mask in masks.items():
        matrices[name] = ConfusionMatrix(tally.n_labels)
        matrices[name].update(truth, mask)
    tally.add_matrices(matrices)
    judged = matrices[MASKS if MASKS in matrices else next(iter(matrices))]
    return judged.scores().miou if judged.counts.any() else None


def _counts(truth: UInt8Array, mask: UInt8Array, bins: Int64Array, n: int) -> Int64Array:
    known = (truth != IGNORE) & (mask != IGNORE)
    code = (bins[known] * n + truth[known]) * n + mask[known]
    counts: Int64Array = np.bincount(code, minlength=len(CUTS) * n * n)
    return counts.reshape(len(CUTS), n, n)
