"""WeakCLIP's three losses, of one image each.

Seeding: background and foreground count the same. Boundary: answers shall be those that the dense
CRF makes of them. Identity: patches shall be alike to the words of their labels. Shapes: L labels,
H x W cells of stride 8.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clipes.config import CrfParams
from clipes.masks.crf import dense_crf
from clipes.seg.loss import weighted_loss
from clipes.seg.resize import resize
from clipes.types import UInt8Array

IDENTITY_WEIGHT, TEMPERATURE = 0.4, 0.07

_TINY, _LEAST = 1e-7, 1e-4
"""Added to probabilities; and the least that the CRF reads and returns, or divides by."""

_RATIOS = (0.05, 20.0)  # of CRF and answer, between which their logarithm counts


def probabilities(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (1, L, H, W) float32 above 0 that sum to 1, of logits (1, L, h, w)."""
    raised = resize(logits.float(), size).softmax(1) + _TINY
    return raised / raised.sum(1, keepdim=True)


def seeding_loss(probs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cost of the background's pixels plus that of all others: ().

    Args:
        probs: (1, L, H, W).
        labels: (1, H, W) int64 with ``IGNORE``.
        weights: (1, H, W), 0 where ignored.
    """
    return torch.stack(
        [
            weighted_loss(probs.log(), labels, weights * chosen)
            / (weights * chosen).sum().clamp(_LEAST)
            for chosen in (labels == 0, labels != 0)
        ]
    ).sum()


def boundary_loss(
    probs: Tensor, image: UInt8Array, params: CrfParams, present: Tensor | None = None
) -> Tensor:
    """Return how far answers are from what the dense CRF makes of them, a mean over cells: ().

    Args:
        probs: (1, L, H, W) above 0.
        image: (H, W, 3) RGB.
        params: Settings of the CRF.
        present: (C,) bool, classes that the image has: what is answered of others counts neither
            here nor there. None for all.
    """
    if present is not None:
        known = probs[:, functional.pad(present, (1, 0), value=True)]
        probs = known / known.sum(1, keepdim=True)
    return divergence(smoothed(probs, image, params), probs)


def smoothed(probs: Tensor, image: UInt8Array, params: CrfParams) -> Tensor:
    """Return what the dense CRF makes of answers, without gradient; shapes as given."""
    # A copy: the floor is the CRF's, not the answer's.
    scores = np.maximum(probs[0].detach().cpu().numpy(), np.float32(_LEAST))
    q = torch.from_numpy(dense_crf(scores, image, params))[None].to(probs.device).clamp(_LEAST)
    return q / q.sum(1, keepdim=True)


def divergence(q: Tensor, probs: Tensor) -> Tensor:
    """Return the mean over cells of sum q log(q / p), the ratio bounded; 0 where both agree: ()."""
    return (q * (q / probs).clamp(*_RATIOS).log()).sum(1).mean()


def identity_loss(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted cross-entropy of cosines over all pixels, ignored ones among them: ().

    Args:
        scores: (1, L, h, w) cosines.
        labels: (1, H', W') int64 with ``IGNORE``.
        weights: (1, H', W'), 0 where ignored.
    """
    enlarged = resize(scores.float() / TEMPERATURE, (labels.shape[1], labels.shape[2]))
    return weighted_loss(enlarged, labels, weights) / labels.numel()
