"""Linear scores of labels in closed form, and what they become once an image has been seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_SURE, _SURE_SHARE = 0.5, 0.02
"""An image shows a label if its surest patches, of this share, have more than so much of it on
average: more than of all others together."""

_WORTH, _DOUBT = 40.0, 0.08
"""Patches that are independent of each other in an image of one label: few, however fine the grid,
as they are alike. A label of a share of _DOUBT counts half: what it takes may be another's."""


class Discriminant(nn.Module):
    """Linear scores of labels, which are found in closed form and not trained.

    The score of label c at a patch x is w (x^T S^-1 m_c - m_c^T S^-1 m_c / 2), with mean m_c, one
    covariance S within labels, and a weight w. In an image labels look a little different from what
    they look like in others: every dog is one dog. How different, the images that were learnt from
    tell: B is the covariance between their means of a label. In the basis where S is the unit
    matrix and B diagonal (both are made so at once, as in linear discriminant analysis), the mean
    of a label in one image is a Gaussian around m_c of variance B, in each direction for itself.

    Args:
        width: Channels.
        labels: Number of labels.
        adapts: Whether it knows B.

    Attributes:
        directions: (L, D), w S^-1 m; 0 at first.
        offsets: (L,).
        weight: (1,), w.
        means: (L, D), m in the basis of ``axes``; 0 for a label that was not seen.
        axes: (D, D), from tokens to that basis.
        between: (D,), B.
    """

    directions: Tensor
    offsets: Tensor
    weight: Tensor
    means: Tensor
    axes: Tensor
    between: Tensor

    def __init__(self, width: int, labels: int, *, adapts: bool = False) -> None:
        super().__init__()
        self.register_buffer("directions", torch.zeros(labels, width))
        self.register_buffer("offsets", torch.zeros(labels))
        if adapts:
            self.register_buffer("weight", torch.zeros(1))
            self.register_buffer("means", torch.zeros(labels, width))
            self.register_buffer("axes", torch.zeros(width, width))
            self.register_buffer("between", torch.zeros(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (S, L) for (S, D) float32."""
        # Large terms cancel here: bf16 would round what is left of them.
        with torch.autocast(tokens.device.type, enabled=False):
            return functional.linear(tokens, self.directions, self.offsets)

    def change(self, tokens: Tensor, probs: Tensor) -> Tensor:
        """Return by how much scores change once labels look as they do in an image.

        The mean of each label that the image shows becomes what is most probable when its patches
        are known: between that of the run and that of the image, nearer to the image's where images
        differ much.

        Args:
            tokens: (N, D) float32 of all patches of an image.
            probs: (N, L), how much of them is taken for each label.

        Returns:
            (N, L) to be added to ``forward``.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            seen, probs = tokens @ self.axes, probs.float()
            mass = probs.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
            worth = (_worth(probs) * self.means.any(1))[:, None]
            share = worth * self.between / (1 + worth * self.between)
            moved = self.means + share * (probs.T @ seen / mass[:, None] - self.means)
            squares = moved.square().sum(1) - self.means.square().sum(1)
            change: Tensor = self.weight * (seen @ (moved - self.means).T - squares / 2)
            return change


def _worth(probs: Tensor) -> Tensor:
    """Return how many independent patches show each label of an image: (L,) of (N, L)."""
    share = probs.mean(0)
    surest = probs.topk(max(1, int(_SURE_SHARE * len(probs))), 0).values.mean(0)
    return _WORTH * share.square() / (share + _DOUBT) * (surest > _SURE)
