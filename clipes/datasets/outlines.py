"""From the outlines in an instances file to masks: polygons by pycocotools, and run lengths.

Run lengths alternate, outside first, and count pixels down one column after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from clipes.errors import DatasetError
from clipes.types import IGNORE, Int64Array, UInt8Array

MOST_PIXELS = (5 << 24) - 1
"""Of a picture that pycocotools may compress. It takes six characters for each run length and none
for the end of the text; in larger pictures, four long runs fill the last byte of its memory."""

_FARTHEST = 1e6  # pixels; beyond it coordinates are damage
_LONGEST = 2e6  # pixels around a polygon, a corner being one at least; drawing takes 80 bytes each
_LONGEST_NUMBER = 6  # characters of a run length: 30 bits


@dataclass(frozen=True)
class Outline:
    """One annotated object, or crowd of them.

    Attributes:
        value: Its value in the mask.
        area: Its size in pixels, as the file says; larger objects lie below smaller ones.
        runs: Where it is: run lengths, int32, that add up to the picture.
    """

    value: int
    area: float
    runs: npt.NDArray[np.int32]

    def inside(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Return (H, W) bool, True inside, for the size (H, W) that it was read with."""
        inside = np.repeat(np.arange(len(self.runs)) % 2 == 1, self.runs)
        return inside.reshape(size[::-1]).T


def parse_outline(annotation: dict[str, Any], value: int, size: tuple[int, int]) -> Outline:
    """Read the outline of an annotation.

    Args:
        annotation: An entry of an instances file.
        value: Mask value of its category; of a crowd it is ``IGNORE``.
        size: (H, W) of its image, ``MAX_PIXELS`` at most.

    Raises:
        DatasetError: It has none, or one that is malformed, of another size, or too large to draw.
    """
    outline, area = annotation.get("segmentation"), annotation.get("area")
    if isinstance(outline, dict):
        runs = _check_runs(outline.get("counts"), size)
    elif isinstance(outline, list) and outline:
        runs = _polygon_runs(outline, size)
    else:
        raise _malformed("it is neither a list of polygons nor run lengths")
    value = IGNORE if annotation.get("iscrowd") == 1 else value
    known = float(area) if isinstance(area, int | float) else 0.0
    return Outline(value, known, runs.astype(np.int32))


def draw(outlines: Iterable[Outline], size: tuple[int, int]) -> UInt8Array:
    """Draw a mask: crowds at the bottom, then objects from the largest to the smallest.

    COCO's outlines overlap without saying what is in front. A small object on a large one (a
    book on a table) is the common case, and drawn the other way it would vanish.

    Args:
        outlines: The objects of one image.
        size: (H, W) of the image, the one they were read with.

    Returns:
        (H, W) uint8; 0 where no object is, 255 where only a crowd is.
    """
    mask: UInt8Array = np.zeros(size, np.uint8)
    for outline in sorted(outlines, key=lambda item: (item.value != IGNORE, -item.area)):
        mask[outline.inside(size)] = outline.value
    return mask


def decode_runs(text: str) -> Int64Array:
    """Return the run lengths in COCO's compressed text.

    pycocotools only makes masks of it, which hold whatever was in memory if the lengths do not add
    up. Each number is written in groups of 5 bits, lowest first, as characters from "0" on; bit 5
    says that another group follows, and the highest bit of the last group is the sign. From the
    fourth on, numbers are differences to the one two places before.

    Raises:
        DatasetError: The text is no such code, or holds a number of more than 30 bits.
    """
    groups = np.array(bytearray(text, "ascii", "replace"), np.int64) - 48
    last = np.flatnonzero(groups < 32)
    lengths = np.diff(last, prepend=-1)
    good = text.isascii() and len(last) and last[-1] == len(groups) - 1
    if not good or groups.min() < 0 or groups.max() > 63 or lengths.max() > _LONGEST_NUMBER:
        raise _malformed("damaged run lengths")
    first = last - lengths + 1
    shifts = 5 * (np.arange(len(groups)) - np.repeat(first, lengths))
    numbers = np.add.reduceat((groups & 31) << shifts, first)
    numbers -= ((groups[last] & 16) << 1) << shifts[last]
    for start in (1, 2):
        numbers[start::2] = np.cumsum(numbers[start::2])
    return numbers


def encode_runs(runs: Int64Array, size: tuple[int, int]) -> str:
    """Return run lengths as COCO's compressed text.

    Args:
        runs: Run lengths that add up to ``size``.
        size: (H, W), of ``MOST_PIXELS`` at most.
    """
    text: bytes = coco_mask.frPyObjects({"size": size, "counts": runs}, *size)["counts"]
    return text.decode("ascii")


def _check_runs(counts: object, size: tuple[int, int]) -> Int64Array:
    """Return run lengths that are a list or a text.

    Raises:
        DatasetError: They are neither, or do not add up to ``size``.
    """
    height, width = size
    if isinstance(counts, str | list) and len(counts) > _LONGEST_NUMBER * (height * width + 1):
        raise _malformed("more run lengths than pixels")
    if isinstance(counts, str):
        runs = decode_runs(counts)
    elif isinstance(counts, list) and all(type(v) is int and abs(v) < 2**31 for v in counts):
        runs = np.array(counts, np.int64)
    else:
        raise _malformed("damaged run lengths")
    if (runs < 0).any():
        raise _malformed("negative run lengths")
    if runs.sum() != height * width:
        raise _malformed(f"run lengths of {runs.sum()} pixels for {height} x {width}")
    return runs


def _polygon_runs(polygons: list[object], size: tuple[int, int]) -> Int64Array:
    """Return the run lengths of the union of polygons.

    Raises:
        DatasetError: They are none, or drawing them would take more memory than there may be.
    """
    height, width = size
    if height * width > MOST_PIXELS:
        raise _malformed(f"{height} x {width} pixels are more than {MOST_PIXELS}")
    for polygon in polygons:
        _check_polygon(polygon)
    text: bytes = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"]
    return decode_runs(text.decode("ascii"))


def _check_polygon(values: object) -> None:
    """Refuse what is no polygon, or so far away or so long that drawing takes all memory."""
    if not (
        isinstance(values, list)
        and len(values) >= 6
        and len(values) % 2 == 0
        and all(type(v) in (int, float) and abs(v) < _FARTHEST for v in values)
    ):
        raise _malformed("a polygon is no list of x, y, x, y, ... of at least three corners")
    corners = np.array(values, np.float64).reshape(-1, 2)
    sides = np.abs(corners - np.roll(corners, 1, axis=0)).max(1)
    if (length := np.maximum(sides, 1).sum()) > _LONGEST:
        raise _malformed(f"a polygon is {length:.0f} pixels long")


def _malformed(what: str) -> DatasetError:
    return DatasetError(f"an outline cannot be drawn: {what}", "get the annotations again")
