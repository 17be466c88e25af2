"""What the values of a mask mean: 0 background, class k as k + 1, 255 not labelled."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from clipes.errors import ArtifactError
from clipes.types import IGNORE, Int64Array, UInt8Array, size_text

RULE = "masks hold 0 for background, 1 for the first class and so on, 255 for not labelled"
"""What is said of masks that do not."""

_SHOWN = 5

_COUNTED = 1 << 22  # pixels that are counted at a time


def value_of(label: int) -> int:
    """Return the mask value of a 0-based class.

    >>> value_of(0)
    1
    """
    return label + 1


def class_of(value: int) -> int:
    """Return the 0-based class of a mask value that is one.

    >>> class_of(1)
    0
    """
    return value - 1


def value_count(n_classes: int) -> int:
    """Return how many values mean something: those of the classes, and the background's.

    >>> value_count(20)
    21
    """
    return n_classes + 1


def values_in(mask: UInt8Array) -> tuple[int, ...]:
    """Return the values that a mask holds, ascending, without 255."""
    return tuple(np.flatnonzero(pixels_of(mask)[:IGNORE]).tolist())


def pixels_of(mask: UInt8Array) -> Int64Array:
    """Return how many pixels of a mask have each value: (256,)."""
    return pairs_of(mask, np.broadcast_to(np.uint8(0), mask.shape))[:, 0]


def pairs_of(one: UInt8Array, other: UInt8Array) -> Int64Array:
    """Return how many pixels have each pair of values in two masks (H, W): (256, 256).

    Some rows at a time, because what is counted is widened to 8 bytes.
    """
    counts = np.zeros(1 << 16, np.int64)
    rows = max(1, _COUNTED // max(1, one.shape[-1]))
    for top in range(0, len(one), rows):
        pairs = one[top : top + rows].astype(np.uint16) << 8 | other[top : top + rows]
        counts += np.bincount(pairs.ravel(), minlength=1 << 16)
    return counts.reshape(256, 256)


def classes_in(mask: UInt8Array, n_classes: int) -> set[int]:
    """Return the 0-based classes that a mask holds; values beyond ``n_classes`` are passed over.

    >>> sorted(classes_in(np.array([[0, 1, 3, 9, 255]], np.uint8), 3))
    [0, 2]
    """
    return {class_of(value) for value in values_in(mask) if 0 < value <= n_classes}


def strange_values(values: Collection[int], n_classes: int) -> str:
    """Return what is wrong with values of a mask, empty if nothing is.

    >>> strange_values([0, 1, 9], 3)
    'holds label 9, but there are 3 classes'
    """
    strange = sorted(value for value in values if value_count(n_classes) <= value != IGNORE)
    if not strange:
        return ""
    return f"holds label {', '.join(map(str, strange[:_SHOWN]))}, but there are {n_classes} classes"


def require_classes(mask: UInt8Array, n_classes: int, what: str, remedy: str) -> None:
    """Refuse a mask with a value that is no class, background or 255.

    Args:
        mask: The mask.
        n_classes: Number of classes.
        what: What to call it in the message.
        remedy: What to do about it.

    Raises:
        ArtifactError: It holds one.
    """
    if wrong := strange_values(values_in(mask), n_classes):
        raise ArtifactError(f"{what} {wrong}", remedy)


def check_size(array: np.ndarray, size: tuple[int, int], what: str) -> None:
    """Refuse an array that is not of the size of its image.

    Raises:
        ArtifactError: It is not.
    """
    if array.shape != size:
        raise ArtifactError(
            f"the {what} is {size_text(array.shape)}, the image {size_text(size)}",
            "make it again for the image as it is now",
        )
