"""What a decoder on frozen tokens begins with: a linear discriminant between labels.

What is learnt in the first hundred updates of a decoder, sums know at once: a mean for each label
and one covariance, as for the looks of a run (``clipes.maps.looks``), but of masks, and for
background and all classes at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipes.config import PatchParams
from clipes.maps.drawn import shown_in
from clipes.maps.looks import Looks, Statistics, discriminant, statistics_of
from clipes.masks.values import value_count
from clipes.run.tokens import CachedTokens
from clipes.seg.data import TrainingPair
from clipes.seg.discriminant import Discriminant
from clipes.seg.frozen import LABELS_PER_TOKEN, FrozenDecoder, flat_tokens, labels_of_tokens
from clipes.seg.loss import Guidance
from clipes.types import IGNORE, BoolArray, FloatArray, Progress

_LEAST = 1e-6  # weight beyond one image of each label: below no label is in two images

_UNSEEN = -5.0  # logit of a label that no patch shows alone: rare, but training may raise it


def fit_discriminant(
    model: FrozenDecoder,
    pairs: Sequence[TrainingPair],
    tokens: CachedTokens,
    guidance: Guidance,
    progress: Progress,
) -> FloatArray:
    """Give a decoder the discriminant between what the labels of some images look like.

    It stays as it is, none at all, if masks say nothing.

    Args:
        model: Reads some of its tokens linearly.
        pairs: The images and their masks.
        tokens: Where tokens come from.
        guidance: Says which labels count.
        progress: Called after each image.

    Returns:
        (1 + C,) how much was seen of each label: the sum over images of the square root of its
        patches.

    Raises:
        ClipesError: An image or its masks cannot be read.
    """
    assert model.discriminant is not None
    classes = len(model.spec.classes)
    width = model.discriminant.directions.shape[1]
    total, between = Statistics.empty(classes, width), _Between.empty(width, 1 + classes)
    for done, pair in enumerate(pairs, start=1):
        grid, flat = flat_tokens(tokens.read(pair.id, pair.image), model.spec)
        shown = _shown(pair, grid, guidance, value_count(classes))
        found = statistics_of(model.read_linearly(flat), shown, classes)
        total.add(found)
        between.add(found)
        progress(done, len(pairs))
    params = PatchParams()
    looks = Looks.of(total, params)
    if looks is None:
        return total.mass
    there = looks.mass > 0
    means = looks.sums / np.where(there, looks.mass, 1)[:, None]
    directions, offsets = discriminant(means, looks)
    unseen = torch.from_numpy(~there)
    model.discriminant.directions.copy_(params.looks_weight * directions)
    model.discriminant.offsets.copy_((params.looks_weight * offsets).masked_fill(unseen, _UNSEEN))
    if model.spec.adapts:
        model.discriminant.weight.fill_(params.looks_weight)
        _let_adapt(model.discriminant, means, looks, between.covariance(total))
    return total.mass


@dataclass
class _Between:
    """Sums that say how much the means of a label differ from image to image.

    An image's weight is its mass in ``Statistics``.

    Attributes:
        moment: (D, D), weighted outer products of images' means, over all labels.
        squares: (L,), sums of squared weights.
    """

    moment: FloatArray
    squares: FloatArray

    @classmethod
    def empty(cls, width: int, labels: int) -> _Between:
        return cls(np.zeros((width, width)), np.zeros(labels))

    def add(self, image: Statistics) -> None:
        there = image.mass > 0
        sums = image.sums[there]
        self.moment += sums.T @ (sums / image.mass[there][:, None])
        self.squares += image.mass**2

    def covariance(self, total: Statistics) -> FloatArray:
        """Return the (D, D) covariance, unbiased; 0 where no label is in two images."""
        mass = np.maximum(total.mass, np.finfo(np.float64).tiny)
        scatter = self.moment - total.sums.T @ (total.sums / mass[:, None])
        freedom = (total.mass - self.squares / mass).sum()
        return scatter / freedom if freedom > _LEAST else np.zeros_like(scatter)


def _let_adapt(
    discriminant: Discriminant, means: FloatArray, looks: Looks, between: FloatArray
) -> None:
    """Give a discriminant the basis in which labels and images vary each direction for itself.

    With S^-1 = R R^T and the eigenvectors U of R^T B R the basis is R U.

    Args:
        discriminant: Adapts.
        means: (L, D) of labels.
        looks: Has S^-1.
        between: (D, D), B.
    """
    root = np.linalg.cholesky(looks.precision)
    variances, vectors = np.linalg.eigh(root.T @ between @ root)
    axes = root @ vectors
    discriminant.axes.copy_(torch.from_numpy(axes))
    discriminant.means.copy_(torch.from_numpy(means @ axes))
    discriminant.between.copy_(torch.from_numpy(np.maximum(variances, 0)))


def _shown(
    pair: TrainingPair, grid: tuple[int, int], guidance: Guidance, labels: int
) -> dict[int, BoolArray]:
    """Return which patches (N,) show nothing but a label, by the label."""
    mask, confidence = pair.read_labels(labels)
    cut, weights = guidance.weigh(*labels_of_tokens(mask, confidence, grid))
    cut = cut.masked_fill(weights <= 0, IGNORE)
    patches = _patches(cut[0], grid)
    return shown_in(
        {
            label: (patches == label).float().mean(1).numpy()
            for label in patches.unique().tolist()
            if label != IGNORE
        }
    )


def _patches(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return (N, 16) of the (4h, 4w) labels of a grid."""
    cells = labels.view(grid[0], LABELS_PER_TOKEN, grid[1], LABELS_PER_TOKEN)
    return cells.transpose(1, 2).reshape(grid[0] * grid[1], -1)
