"""Which classes the images of a run show, decided over all of them and without a label.

A word answers to more than its class, or to less: "table" wherever something is laid, "person" not
to a hand. Two things say by how much, and both are in the run itself. Images that are sure of a
class say what it looks like to DINOv2, which knows no words: a mean each, of the patches that show
it, and a linear discriminant between them (as ``clipes.maps.looks``, one vector for each class of
an image instead of its patches). And the scores of a class are of two kinds, of images that show it
and of others: a mixture of two normal distributions for each, whose means are drawn to those of all
classes where a run is small, and whose spreads are common to all, says where they part.
n images, C classes, K candidates of each image, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipes.config import TagParams
from clipes.maps.tags import Candidates
from clipes.masks.values import value_count, value_of
from clipes.types import BoolArray, Int64Array

_Float64Array = npt.NDArray[np.float64]

_STEPS = 60  # of a mixture, which has long settled then
_LEAST = 1e-9  # variance: below it, all regions look the same
# What is expected of scores, until there are more than a few: mean and standard deviation where a
# class is shown and elsewhere, and how often a candidate is. From voc_sample and coco_sample.
_SHOWN, _OTHER, _RATE = (1.0, 1.6), (-5.0, 1.5), 0.15
_EXPECTED = 3.0  # scores that these count as much as


def class_probabilities(
    images: Sequence[Candidates], classes: int, params: TagParams
) -> _Float64Array:
    """Return how likely each image shows each of its candidates.

    Args:
        images: At least one; all have K candidates.
        classes: C.
        params: Settings.

    Returns:
        (n, K), in the order of their labels.
    """
    labels = np.stack([image.labels for image in images])
    words = np.stack([image.words for image in images]).astype(np.float64)
    sure = np.stack([image.patches for image in images]) > 0
    odds = words
    for _ in range(params.rounds):
        odds = mixture_odds(words + looks_odds(images, sure, classes, params), labels, params)
        sure = odds > params.sure
    probabilities: _Float64Array = 1 / (1 + np.exp(-odds))
    return probabilities


def looks_odds(
    images: Sequence[Candidates], sure: BoolArray, classes: int, params: TagParams
) -> _Float64Array:
    """Return what the looks of other images say of each candidate.

    Args:
        images: n of them.
        sure: (n, K): whose regions say what their class looks like.
        classes: C.
        params: Settings.

    Returns:
        (n, K) log-odds, against the background and all other classes; those of a class that few
        other images are sure of are near 0.
    """
    found = np.zeros(sure.shape)
    whitened = _whitened(images, sure, classes, params.ridge)
    if whitened is None:
        return found
    root, sums, counts = whitened
    for row, image, taught in zip(found, images, sure, strict=True):
        rows = [value_of(int(label)) for label in image.labels]
        tokens = np.concatenate([image.background[None], image.regions]).astype(np.float64) @ root
        own = [0, *(k for k, is_sure in zip(rows, taught, strict=True) if is_sure)]
        others, known = sums.copy(), counts.copy()
        others[own] -= tokens[np.concatenate([[True], taught])]
        known[own] -= 1
        means = others / np.maximum(known, 1)[:, None]
        scores = tokens[1:] @ means.T - (means**2).sum(1) / 2
        trust = params.looks_scale * known / (known + params.few)
        scores = np.where(known > 0, trust * (scores - scores[:, :1]), 0.0)
        mine = scores[np.arange(len(rows)), rows]
        scores[np.arange(len(rows)), rows] = -np.inf
        row[:] = params.looks_weight * (mine - np.logaddexp.reduce(scores, axis=1))
    return found


def _whitened(
    images: Sequence[Candidates], sure: BoolArray, classes: int, ridge: float
) -> tuple[_Float64Array, _Float64Array, _Float64Array] | None:
    """Return a base in which regions of one class spread alike in all directions.

    Returns:
        The base (D, D), and in it the sums (1 + C, D) of the regions of the background and of each
        class, and their numbers (1 + C,); None if all regions look the same.
    """
    regions = np.concatenate(
        [image.regions[taught] for image, taught in zip(images, sure, strict=True)]
    )
    labels = np.concatenate(
        [image.labels[taught] for image, taught in zip(images, sure, strict=True)]
    )
    shown = np.concatenate([np.zeros(len(images), np.int64), labels + value_of(0)])
    tokens = np.concatenate([np.stack([i.background for i in images]), regions]).astype(np.float64)
    counts = np.bincount(shown, minlength=value_count(classes)).astype(np.float64)
    sums = np.zeros((len(counts), tokens.shape[1]))
    np.add.at(sums, shown, tokens)
    means = sums / np.maximum(counts, 1)[:, None]
    within = (tokens.T @ tokens - (counts[:, None] * means).T @ means) / len(tokens)
    variance = np.trace(within) / len(within)
    if not variance > _LEAST:
        return None
    within += ridge * variance * np.eye(len(within))
    root = np.linalg.cholesky(np.linalg.inv(within))
    return root, sums @ root, counts


@dataclass(frozen=True)
class _Normal:
    """Normal distributions of scores, one for each class.

    Attributes:
        mean: Of all classes.
        spread: Standard deviation, common to all.
        means: (C,) of each.
    """

    mean: float
    spread: float
    means: _Float64Array

    @classmethod
    def start(cls, mean: float, spread: float, classes: int) -> _Normal:
        """Return what is expected before any score is seen."""
        return cls(mean, spread, np.full(classes, mean))

    def log_density(self, scores: _Float64Array, labels: Int64Array) -> _Float64Array:
        """Return that of the scores (n, K) of classes, less a constant."""
        distances: _Float64Array = (scores - self.means[labels]) / self.spread
        return -(distances**2) / 2 - math.log(self.spread)

    def fitted(
        self, scores: _Float64Array, labels: Int64Array, share: _Float64Array, pull: float
    ) -> _Normal:
        """Return the distribution of scores that belong to it by a share each.

        Args:
            scores: (n, K).
            labels: (n, K).
            share: (n, K) in [0, 1].
            pull: Scores for which the mean of all classes stands in that of each.
        """
        most = share.sum() + _EXPECTED
        mean = float(((share * scores).sum() + _EXPECTED * self.mean) / most)
        size = len(self.means)
        means = (_by_class(share * scores, labels, size) + pull * mean) / (
            _by_class(share, labels, size) + pull
        )
        square = (share * (scores - means[labels]) ** 2).sum() + _EXPECTED * self.spread**2
        return _Normal(mean, float(np.sqrt(square / most)), means)


def mixture_odds(scores: _Float64Array, labels: Int64Array, params: TagParams) -> _Float64Array:
    """Tell by all scores of a class which of them are of images that show it.

    Args:
        scores: (n, K) log-odds.
        labels: (n, K) the class of each.
        params: Settings.

    Returns:
        (n, K) log-odds. None falls as the score rises above what is usual where a class is shown,
        or rises as it falls below what is usual elsewhere, though their spreads differ.
    """
    classes = int(labels.max()) + 1
    expected = [_Normal.start(mean, spread, classes) for mean, spread in (_SHOWN, _OTHER)]
    shown, other = expected
    rates = np.full(classes, _RATE)
    pairs = _by_class(np.ones(labels.shape), labels, classes)
    odds = np.zeros(scores.shape)
    for _ in range(_STEPS):
        odds = np.log(rates / (1 - rates))[labels]
        odds += shown.log_density(scores, labels) - other.log_density(scores, labels)
        odds = np.where(scores > shown.means[labels], np.maximum(odds, 0), odds)
        odds = np.where(scores < other.means[labels], np.minimum(odds, 0), odds)
        share = 1 / (1 + np.exp(-odds))
        rate = (share.sum() + _EXPECTED * _RATE) / (share.size + _EXPECTED)
        rates = (_by_class(share, labels, classes) + params.pull * rate) / (pairs + params.pull)
        shown = expected[0].fitted(scores, labels, share, params.pull)
        other = expected[1].fitted(scores, labels, 1 - share, params.pull)
    return odds


def _by_class(values: _Float64Array, labels: Int64Array, classes: int) -> _Float64Array:
    sums: _Float64Array = np.bincount(labels.ravel(), values.ravel(), classes).astype(np.float64)
    return sums
