"""The confidence-guided loss (paper section 3.4) and its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.seg.resize import shrink
from clipes.types import IGNORE


@dataclass(frozen=True)
class Guidance:
    """How the confidence of a pixel counts.

    Attributes:
        threshold: mu: pixels below it are left out; None takes every labelled pixel.
        soft: Whether a pixel counts by its confidence.
    """

    threshold: float | None = CONFIDENCE_THRESHOLD
    soft: bool = False

    @property
    def asked(self) -> bool:
        """Whether confidence counts at all."""
        return self.threshold is not None or self.soft

    def weigh(self, labels: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
        """Return the labels that are learnt, and how much each counts, 0 where none is learnt.

        Args:
            labels: (N, H, W) int64.
            confidence: (N, H, W) float in [0, 1].

        Returns:
            Both (N, H, W).
        """
        if self.threshold is not None:
            labels = confident_labels(labels, confidence, self.threshold)
        weights = confidence if self.soft else torch.ones_like(confidence)
        return labels, weights.masked_fill(labels == IGNORE, 0)


def confident_labels(labels: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """Return ``labels`` with ``IGNORE`` where the confidence is below ``threshold``.

    Args:
        labels: (N, H, W) int64.
        confidence: (N, H, W) float in [0, 1], at the same resolution: an average over pixels would
            no longer be the probability of the label it stands for.
        threshold: mu.
    """
    return labels.masked_fill(confidence < threshold, IGNORE)


def branch_targets(
    labels: Tensor, weights: Tensor, sizes: Sequence[tuple[int, int]]
) -> list[tuple[Tensor, Tensor]]:
    """Return labels and weights for each branch of the logits.

    Args:
        labels: (N, H, W) int64 with ``IGNORE``.
        weights: (N, H, W) float, how much each pixel counts.
        sizes: Of the branches.

    Returns:
        Pairs of (N, h, w); the weight of ignored pixels is 0.
    """
    pairs = ((shrink(labels, size), shrink(weights, size)) for size in sizes)
    return [(small, weight.masked_fill(small == IGNORE, 0)) for small, weight in pairs]


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over pixels of weight times cross-entropy; exactly 0 if all are ignored.

    A sum, because what it is to be divided by, the weight of the whole batch, may be spread over
    processes and accumulated parts.

    Args:
        logits: (N, L, h, w), computed with in float32.
        labels: (N, h, w) int64.
        weights: (N, h, w).
    """
    costs = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    return torch.sum(costs * weights)
