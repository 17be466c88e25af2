"""The types that the stages share.

Conventions everywhere: sizes are (height, width); images are (H, W, 3) RGB uint8; labels are
0-based class indices in memory and 1-based in masks, where 0 is background and 255 is ``IGNORE``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

IGNORE = 255
"""Mask value of pixels that carry no label: not scored, not trained on."""

MAX_CLASSES = 254
"""Most classes an 8-bit mask can hold beside background (0) and ``IGNORE`` (255)."""

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
Int64Array: TypeAlias = npt.NDArray[np.int64]

Progress: TypeAlias = Callable[[int, int], None]
"""Called by a stage as ``progress(done, total)``; knows nothing of terminals."""


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        id: Plain name, unique in the data set: no separators, no ``..``.
        image: Path of the image file.
        labels: Classes present, 0-based, without repeats, in the order of the annotation.
        mask: Path of the ground-truth mask, or None where there is none.
    """

    id: str
    image: Path
    labels: tuple[int, ...]
    mask: Path | None = None


@dataclass(frozen=True)
class Failure:
    """One image that could not be processed: its id and the reason in one line."""

    id: str
    reason: str


@dataclass(frozen=True)
class CamMaps:
    """Refined activation maps of the classes present in one image.

    Attributes:
        labels: (K,) int64, 0-based class indices.
        maps: (K, h, w) float in [0, 1] at patch resolution.
        size: (H0, W0) of the image the maps belong to.
        drift: (K,) float in [0, 1], how far each class is from where its word alone puts it; see
            ``clipes.masks.pseudo.disagreement``. None where words alone were asked, or it was not
            kept.
    """

    labels: Int64Array
    maps: FloatArray
    size: tuple[int, int]
    drift: FloatArray | None = None


@dataclass(frozen=True)
class PseudoLabel:
    """A pseudo-mask and how sure each of its pixels is.

    Attributes:
        mask: (H0, W0) uint8, 0 background, 1..C classes.
        confidence: (H0, W0) float32 in [0, 1], the probability of the label chosen.
    """

    mask: UInt8Array
    confidence: Float32Array


def size_text(size: Sequence[int]) -> str:
    """Return a size in words.

    >>> size_text((375, 500))
    '375 x 500'
    """
    return " x ".join(map(str, size))


def evenly_spaced(count: int, most: int) -> list[int]:
    """Return at most ``most`` of the indices below ``count``, the first and the last among them.

    >>> evenly_spaced(3, 9), evenly_spaced(9, 3)
    ([0, 1, 2], [0, 4, 8])
    """
    if count <= most:
        return list(range(count))
    found: list[int] = np.linspace(0, count - 1, most).round().astype(int).tolist()
    return found


def shrunk_size(size: tuple[int, int], largest: int) -> tuple[int, int]:
    """Return a size of about the same shape whose area is at most ``largest``; itself if it fits.

    >>> shrunk_size((300, 400), 30_000)
    (150, 200)
    """
    height, width = size
    if height * width <= largest:
        return size
    shrink = math.sqrt(largest / (height * width))
    # No side can shrink below one: then the other is cut to what is left.
    height = min(max(1, math.floor(height * shrink)), largest)
    return height, min(max(1, math.floor(width * shrink)), largest // height)
