"""What a mask that a person drew says of the patches of its image.

Maps say where a class is beyond doubt; a person's mask says it everywhere. Shapes as in
``clipes.towers.taps``.
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np

from clipes.masks.values import values_in
from clipes.towers.taps import Grid
from clipes.types import BoolArray, Float32Array, UInt8Array

MOST_OF = 0.75
"""Share of a patch that has to carry one label for the patch to show it, and nothing else."""


def drawn_shares(mask: UInt8Array, grid: Grid) -> dict[int, Float32Array]:
    """Return how much of each patch carries a label.

    Args:
        mask: (H0, W0) uint8; 255 counts for nothing.
        grid: (h, w) of the patches, which share out the image evenly.

    Returns:
        (N,) in [0, 1] by mask value, of those that the mask holds. What they lack of 1 in sum is
        not labelled.
    """
    height, width = grid
    shares = {}
    for value in values_in(mask):
        # In 8 bits: a mask of the largest images is a hundred megabytes.
        here = np.where(mask == value, np.uint8(255), np.uint8(0))
        small = cv2.resize(here, (width, height), interpolation=cv2.INTER_AREA)
        shares[value] = small.ravel().astype(np.float32) / np.float32(255)
    return shares


def shown_in(shares: Mapping[int, Float32Array]) -> dict[int, BoolArray]:
    """Return which patches (N,) show nothing but a label, by mask value."""
    return {value: share >= MOST_OF for value, share in shares.items()}
