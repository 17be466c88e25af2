"""Scores of predicted masks against ground truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.errors import ArtifactError
from clipes.masks.values import RULE, pairs_of, strange_values
from clipes.types import IGNORE, MAX_CLASSES, Int64Array, UInt8Array, size_text

MASKS = "CRF"
"""What the scores of pseudo-masks are called."""

CONFIDENT_MASKS = f"{MASKS} >= {CONFIDENCE_THRESHOLD}"
"""What those of their confident pixels are called."""


CORRECTED = f"{MASKS}, corrected"
"""What the scores of pseudo-masks are called where a person's go before them."""

RELABELLED = "relabelled"
"""What the scores of a segmenter's masks of the run's own images are called."""

CONFIDENT_RELABELLED = f"{RELABELLED} >= {CONFIDENCE_THRESHOLD}"
"""What those of their confident pixels are called."""


def maps_name(exponent: float) -> str:
    """Return what the scores of maps are called that are labelled with a background exponent.

    >>> maps_name(0.75)
    'CAM (alpha 0.75)'
    """
    return f"CAM (alpha {exponent:g})"


def segmenter_name(split: str | None) -> str:
    """Return what the scores of a segmenter on a list of images are called.

    >>> segmenter_name(None), segmenter_name("lists/val.txt")
    ('segmenter, train', 'segmenter, val')
    """
    return f"segmenter, {'train' if split is None else Path(split).stem}"


@dataclass(frozen=True)
class Scores:
    """How well a set of masks matches the ground truth; all ratios in [0, 1].

    Attributes:
        miou: Mean of ``iou`` over the classes that have one.
        pixel_accuracy: Share of the scored pixels that carry the right label.
        coverage: Share of the pixels with ground truth for which the prediction has a label.
        iou: Intersection over union, background first; None for a class that neither the ground
            truth nor the prediction holds.
        images: Number of images scored.
    """

    miou: float
    pixel_accuracy: float
    coverage: float
    iou: tuple[float | None, ...]
    images: int


class ConfusionMatrix:
    """Counts of (true, predicted) labels, fed one image at a time; memory does not grow.

    Pixels whose ground truth is 255 do not count at all. Pixels whose prediction is 255 carry no
    label: they lower the coverage and are left out of everything else.

    Args:
        n_classes: Number of labels, background included.

    Raises:
        ValueError: ``n_classes`` does not fit 8-bit masks.

    >>> matrix = ConfusionMatrix(2)
    >>> truth = np.array([[0, 0, 1, 255]], dtype=np.uint8)
    >>> prediction = np.array([[0, 1, 1, 1]], dtype=np.uint8)
    >>> matrix.update(truth, prediction)
    >>> matrix.scores()  # doctest: +NORMALIZE_WHITESPACE
    Scores(miou=0.5, pixel_accuracy=0.6666666666666666, coverage=1.0,
           iou=(0.5, 0.5), images=1)
    """

    def __init__(self, n_classes: int) -> None:
        if not 1 <= n_classes <= MAX_CLASSES + 1:
            raise ValueError(f"an 8-bit mask holds 1 to {MAX_CLASSES + 1} labels, not {n_classes}")
        self.n_classes = n_classes
        self.images = 0
        self._counts = np.zeros((n_classes, n_classes), dtype=np.int64)
        self._unlabelled = 0

    @classmethod
    def of(cls, counts: Int64Array) -> ConfusionMatrix:
        """Return the matrix of (n, n) int64 pixels by true and predicted label."""
        matrix = cls(len(counts))
        matrix._counts += counts
        return matrix

    @property
    def counts(self) -> Int64Array:
        """(n, n) int64: pixels by true label (row) and predicted label (column)."""
        return self._counts.copy()

    def update(self, truth: UInt8Array, prediction: UInt8Array) -> None:
        """Count the pixels of one image.

        Args:
            truth: (H, W) uint8; 255 where there is no ground truth.
            prediction: (H, W) uint8; 255 where there is no label.

        Raises:
            ArtifactError: The two differ in size, or one holds a label that is no class.
            ValueError: One of them is not uint8.
        """
        if truth.dtype != np.uint8 or prediction.dtype != np.uint8:
            raise ValueError(f"masks are uint8, these are {truth.dtype} and {prediction.dtype}")
        if truth.shape != prediction.shape:
            raise ArtifactError(
                f"the ground truth is {size_text(truth.shape)} and the "
                f"prediction {size_text(prediction.shape)}",
                "both must have the size of the image, held upright; replace the one that has not",
            )
        table = pairs_of(truth, prediction)
        self._check("ground truth", table.sum(axis=1))
        self._check("prediction", table.sum(axis=0))
        n = self.n_classes
        self._counts += table[:n, :n]
        self._unlabelled += int(table[:n, IGNORE].sum())
        self.images += 1

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        if self.n_classes != other.n_classes:
            raise ValueError(
                f"cannot add counts of {self.n_classes} and of {other.n_classes} labels"
            )
        total = ConfusionMatrix(self.n_classes)
        total.images = self.images + other.images
        total._counts = self._counts + other._counts
        total._unlabelled = self._unlabelled + other._unlabelled
        return total

    def scores(self) -> Scores:
        """Return the scores of everything counted so far.

        Raises:
            ArtifactError: No pixel has both a ground truth and a predicted label.
        """
        scored = int(self._counts.sum())
        if scored == 0:
            raise ArtifactError(
                f"nothing to score: no pixel of {self.images} images has both a ground truth "
                "and a predicted label",
                "check that masks and ground truth belong together and are not all 255",
            )
        hits = np.diag(self._counts)
        union = self._counts.sum(axis=0) + self._counts.sum(axis=1) - hits
        iou = tuple(
            int(hit) / int(all_) if all_ else None for hit, all_ in zip(hits, union, strict=True)
        )
        known = [value for value in iou if value is not None]
        return Scores(
            miou=float(np.mean(known)),
            pixel_accuracy=int(hits.sum()) / scored,
            coverage=scored / (scored + self._unlabelled),
            iou=iou,
            images=self.images,
        )

    def _check(self, name: str, pixels: Int64Array) -> None:
        wrong = strange_values(np.flatnonzero(pixels).tolist(), self.n_classes - 1)
        if wrong:
            raise ArtifactError(
                f"the {name} {wrong}",
                f"{RULE}; check that the masks belong to this data set and its list of classes",
            )
