"""What the classes of a run look like, and maps that use it (not in the paper).

A word finds the typical part of an object; what the object looks like finds the rest. Patches that
the first maps are sure of, over many images, say what every class and the background look like to
CLIP: a mean each, and one covariance. Comparing every patch with these is a linear discriminant: a
closed form of sums, in which nothing is trained, no mask is seen, and the order of images does not
matter. Shapes as in ``clipes.towers.clip``; C classes of the vocabulary, K of them in an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from clipes.config import CamParams, PatchParams
from clipes.maps.affinity import propagate
from clipes.maps.gradcam import min_max
from clipes.maps.patches import Evidence, first_maps, strong_patches
from clipes.masks.values import value_of
from clipes.types import Float32Array

_Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Weighted sums over the patches that show something beyond doubt; those of images add up.

    Attributes:
        sums: (1 + C, D) float64, of the activations; background first.
        mass: (1 + C,) float64, of the weights.
        moment: (D, D) float64, of the activations' outer products.
    """

    sums: _Float64Array
    mass: _Float64Array
    moment: _Float64Array

    @classmethod
    def empty(cls, classes: int, width: int) -> Statistics:
        """Return the statistics of no image, C classes and activations of ``width``."""
        shapes = ((1 + classes, width), (1 + classes,), (width, width))
        return cls(*(np.zeros(shape) for shape in shapes))

    def add(self, other: Statistics) -> None:
        """Add the sums of other images, in place."""
        self.sums[:] += other.sums
        self.mass[:] += other.mass
        self.moment[:] += other.moment


def image_statistics(
    evidence: Evidence,
    labels: Sequence[int],
    classes: int,
    params: CamParams,
    patches: PatchParams,
) -> Statistics:
    """Return the statistics of one image.

    The m patches that show a class in one image look much alike. So they weigh sqrt(m) together,
    not m.

    Args:
        evidence: What the words say about it.
        labels: (K,) 0-based, in the order of the evidence.
        classes: C.
        params: Settings of the first maps.
        patches: Settings of the choice of patches.
    """
    activations = evidence.activations.cpu().numpy()
    found = Statistics.empty(classes, activations.shape[1])
    chosen = strong_patches(first_maps(evidence, params), patches)
    for row, here in zip((0, *map(value_of, labels)), chosen, strict=True):
        count = int(here.sum())
        if count:
            part = activations[here]
            weight = count**-0.5
            found.sums[row] += weight * part.sum(0)
            found.mass[row] += weight * count
            found.moment[:] += weight * (part.T @ part)
    return found


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
        return cls(sums, mass, np.linalg.inv(within))


@torch.inference_mode()
def final_maps(
    evidence: Evidence,
    labels: Sequence[int],
    looks: Looks | None,
    own: Statistics | None,
    params: CamParams,
    patches: PatchParams,
) -> Float32Array:
    """Combine what patches look like with what the words say.

    The score of class c at patch x is x^T S^-1 m_c - m_c^T S^-1 m_c / 2 with mean m_c and
    covariance S; it and the words' log-probability are log-odds, and add up.

    Args:
        evidence: What the words say.
        labels: (K,) 0-based, in the order of the evidence.
        looks: What the classes look like; None for the first maps.
        own: Statistics of this image if it is not among those that ``looks`` is made of.
        params: Settings of the affinity.
        patches: Settings of the combination.

    Returns:
        (K, h, w) float32 in [0, 1]. The first maps, if a class was seen beyond doubt nowhere.
    """
    rows = [0, *map(value_of, labels)]
    if looks is None:
        return first_maps(evidence, params)
    sums, mass = looks.sums[rows], looks.mass[rows]
    if own is not None:
        sums, mass = sums + own.sums[rows], mass + own.mass[rows]
    if not mass.all():
        return first_maps(evidence, params)
    means = sums / mass[:, None]
    directions = means @ looks.precision
    offsets = -(directions * means).sum(1, keepdims=True) / 2
    device = evidence.activations.device
    weights, bias = (
        torch.from_numpy(part.astype(np.float32)).to(device) for part in (directions, offsets)
    )
    log_looks = weights @ evidence.activations.T + bias
    log_odds = patches.looks_weight * log_looks + patches.words_weight * evidence.log_words
    grid = evidence.sources.shape[1:]
    sources = min_max(log_odds.softmax(0)[1:].unflatten(1, grid).cpu().numpy())
    return min_max(propagate(evidence.walk, sources, params, patches.walk_power))
