"""What the classes of a run look like, and maps that use it (not in the paper).

A word finds the typical part of an object; what the object looks like finds the rest. Patches that
maps are sure of, over many images, say what every class and the background look like to a tower: a
mean each, and one covariance. Comparing every patch with these is a linear discriminant: a closed
form of sums, in which nothing is trained, no mask is seen, and the order of images does not matter.
The maps that come of it are surer than the words' own, so that a second round learns more from
them. Shapes as in ``clipes.towers.taps``; C classes of the vocabulary, K of them in an image; D
channels of all the towers that a round looks with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipes.config import PatchParams
from clipes.kernels.choose import products
from clipes.maps.patches import strong_patches
from clipes.masks.values import value_of
from clipes.types import BoolArray, Float32Array

_Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """Weighted sums over the patches that show something beyond doubt.

    Attributes:
        sums: (1 + C, D) float64, of the tokens; background first.
        mass: (1 + C,) float64, of the weights.
    """

    sums: _Float64Array
    mass: _Float64Array


@dataclass(frozen=True)
class Statistics(Sums):
    """Such sums, and what a covariance is made of; those of images add up.

    Attributes:
        moment: (D, D) float64, of the tokens' outer products.
    """

    moment: _Float64Array

    @classmethod
    def empty(cls, classes: int, width: int) -> Statistics:
        """Return the statistics of no image, C classes and tokens of ``width``."""
        shapes = ((1 + classes, width), (1 + classes,), (width, width))
        return cls(*(np.zeros(shape) for shape in shapes))

    def add(self, other: Statistics) -> None:
        """Add the sums of other images, in place."""
        self.sums[:] += other.sums
        self.mass[:] += other.mass
        self.moment[:] += other.moment


def shown_by(
    maps: Float32Array, labels: Sequence[int], patches: PatchParams
) -> dict[int, BoolArray]:
    """Return which patches of an image show the background and its classes beyond doubt.

    Args:
        maps: (K, h, w) of its classes.
        labels: (K,) 0-based, in the order of the maps.
        patches: Settings of the choice of patches.

    Returns:
        (N,) by mask value; no patch shows two. Maps that are 0 everywhere, as of a picture of one
        patch, say nothing of the background either.
    """
    rows = (0, *map(value_of, labels))
    if not maps.any():
        return dict.fromkeys(rows, np.zeros(maps[0].size, np.bool_))
    return dict(zip(rows, strong_patches(maps, patches), strict=True))


def sums_of(tokens: Tensor, shown: Mapping[int, BoolArray], classes: int) -> Sums:
    """Return the sums of one image.

    The m patches that show a class in one image look much alike. So they weigh sqrt(m) together,
    not m.

    Args:
        tokens: (N, D) float32 of its patches.
        shown: As ``shown_by`` returns it.
        classes: C.
    """
    values = tokens.cpu().numpy()
    found = Sums(np.zeros((1 + classes, values.shape[1])), np.zeros(1 + classes))
    for row, here in shown.items():
        if count := int(here.sum()):
            found.sums[row] += count**-0.5 * values[here].sum(0)
            found.mass[row] += count**0.5
    return found


def statistics_of(tokens: Tensor, shown: Mapping[int, BoolArray], classes: int) -> Statistics:
    """Return the statistics of one image; arguments as for ``sums_of``."""
    found = sums_of(tokens, shown, classes)
    weighted = np.zeros(len(tokens), np.float32)
    for here in shown.values():
        if count := int(here.sum()):
            weighted[here] = count**-0.25  # its square is a patch's weight
    some = weighted > 0
    roots = torch.from_numpy(weighted[some]).to(tokens.device)
    part = tokens[torch.from_numpy(some).to(tokens.device)] * roots[:, None]
    moment = products(part.T, part.T).double().cpu().numpy()
    return Statistics(found.sums, found.mass, moment)


@dataclass(frozen=True)
class Looks:
    """What every class looks like.

    Attributes:
        sums: (1 + C, D) float64, as in ``Statistics``.
        mass: (1 + C,) float64.
        precision: (D, D) float64, inverse of the covariance within classes.
    """

    sums: _Float64Array
    mass: _Float64Array
    precision: _Float64Array

    @classmethod
    def of(cls, statistics: Statistics, patches: PatchParams) -> Looks | None:
        """Turn sums into means and a covariance; None if there is too little to go by."""
        sums, mass = statistics.sums, statistics.mass
        if not mass.sum() > 0:
            return None
        means = sums / np.maximum(mass, np.finfo(np.float64).tiny)[:, None]
        within = (statistics.moment - (mass[:, None] * means).T @ means) / mass.sum()
        variance = np.trace(within) / len(within)
        if not variance > 0:
            return None
        within += patches.ridge * variance * np.eye(len(within))
        # By torch, whose threads are as many as were asked for; numpy's wait for more on all cores.
        return cls(sums, mass, torch.linalg.inv(torch.from_numpy(within)).numpy())


def class_means(
    looks: Looks,
    labels: Sequence[int],
    own: Sums | None,
    *,
    in_statistics: bool,
    own_background: float,
) -> _Float64Array | None:
    """Return what the background and the classes of an image look like.

    Args:
        looks: What the classes of the run look like.
        labels: (K,) 0-based.
        own: What the image itself says; None if it is not asked.
        in_statistics: Whether the run's statistics hold what the image itself says.
        own_background: Share of the image's own background, where it has one, in the first of them.

    Returns:
        (1 + K, D); None if one of them was seen beyond doubt nowhere.
    """
    rows = [0, *map(value_of, labels)]
    sums, mass = looks.sums[rows], looks.mass[rows]
    if own is not None and not in_statistics:
        sums, mass = sums + own.sums[rows], mass + own.mass[rows]
    if not mass.all():
        return None
    means = sums / mass[:, None]
    if own is not None and own.mass[0]:
        means[0] += own_background * (own.sums[0] / own.mass[0] - means[0])
    return means


def discriminant(means: _Float64Array, looks: Looks) -> tuple[Tensor, Tensor]:
    """Return the linear discriminant between some means.

    Args:
        means: (L, D).
        looks: Has the covariance within classes.

    Returns:
        Directions (L, D) and offsets (L,), float32, on the CPU.
    """
    given = torch.from_numpy(means)
    directions = given @ torch.from_numpy(looks.precision)
    offsets = -(directions * given).sum(1) / 2
    return directions.float(), offsets.float()


@torch.inference_mode()
def looks_sources(
    tokens: Tensor,
    log_words: Tensor,
    means: _Float64Array,
    looks: Looks,
    patches: PatchParams,
) -> Tensor:
    """Combine what patches look like with what the words say.

    The score of class c at patch x is x^T S^-1 m_c - m_c^T S^-1 m_c / 2 with mean m_c and
    covariance S; it and the words' log-probability are log-odds, and add up.

    Args:
        tokens: (N, D) float32 of the patches.
        log_words: (1 + K, N) float32, of the background and of each class.
        means: (1 + K, D), see ``class_means``.
        looks: Where they come from.
        patches: Settings of the combination.

    Returns:
        (K, N) probabilities of the classes.
    """
    directions, offsets = (part.to(tokens.device) for part in discriminant(means, looks))
    log_looks = directions @ tokens.T + offsets[:, None]
    log_odds = patches.looks_weight * log_looks + patches.words_weight * log_words
    return log_odds.softmax(0)[1:]
