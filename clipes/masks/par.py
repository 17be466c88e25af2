"""Pixel-adaptive refinement (PAR; Ru et al., CVPR 2022): scores flow to pixels of like colour.

Cheap enough for every step of a training, where a dense CRF is not.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

DILATIONS = (1, 2, 4, 8, 12, 24)
"""Pixels between a pixel and its eight neighbours."""

_DIRECTIONS = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))
_SHARPNESS = 0.3  # divides differences, in standard deviations
_PLACE_WEIGHT = 0.01  # of the distance beside the colour
_EPSILON = 1e-8


@torch.no_grad()
def par(image: Tensor, maps: Tensor, iterations: int = 20) -> Tensor:
    """Return ``maps`` after they have flowed between pixels of like colour: (K, H, W).

    Args:
        image: (3, H, W) float32, normalised or not: colours are compared in standard deviations.
        maps: (K, H, W) float32 scores.
        iterations: How often each pixel takes the weighted sum of its neighbours.
    """
    weights = neighbour_weights(image)
    offsets = neighbours()
    for _ in range(iterations):
        padded = _padded(maps)
        maps = torch.zeros_like(maps)
        for weight, offset in zip(weights, offsets, strict=True):
            maps.addcmul_(weight, _moved(padded, offset))
    return maps


def neighbour_weights(image: Tensor) -> Tensor:
    """Return how much each pixel takes of its neighbours: (48, H, W), sums over them are 1.01.

    A softmax over likeness of colour, and a hundredth of one over closeness.

    Args:
        image: (3, H, W) float32.
    """
    padded = _padded(image)
    around = torch.stack([_moved(padded, offset) for offset in neighbours()])  # (48, 3, H, W)
    deviation = around.std(0)  # the pixel itself left out
    apart = (around.sub_(image).abs_() / (deviation + _EPSILON) / _SHARPNESS).square_()
    weights = (-apart.mean(1)).softmax(0)
    place = torch.tensor(_place_weights(), device=image.device, dtype=image.dtype)
    return weights + _PLACE_WEIGHT * place[:, None, None]


def neighbours() -> list[tuple[int, int]]:
    """Return the 48 (rows, columns) from a pixel to its neighbours."""
    return [(y * step, x * step) for step in DILATIONS for y, x in _DIRECTIONS]


@lru_cache(maxsize=1)
def _place_weights() -> list[float]:
    """Return the softmax over the neighbours' closeness; beyond the image's edge, too."""
    distances = torch.tensor([math.hypot(y, x) for y, x in neighbours()], dtype=torch.float64)
    closeness = -(distances / (distances.std() + _EPSILON) / _SHARPNESS).square()
    weights: list[float] = closeness.softmax(0).tolist()
    return weights


def _padded(maps: Tensor) -> Tensor:
    """Repeat the pixels at the edge as far as neighbours reach."""
    return functional.pad(maps, (max(DILATIONS),) * 4, mode="replicate")


def _moved(padded: Tensor, offset: tuple[int, int]) -> Tensor:
    """Return the neighbour of every pixel, of maps as ``_padded`` makes them."""
    reach = max(DILATIONS)
    height, width = padded.shape[-2] - 2 * reach, padded.shape[-1] - 2 * reach
    top, left = reach + offset[0], reach + offset[1]
    return padded[..., top : top + height, left : left + width]
