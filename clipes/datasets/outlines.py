"""From the outlines in an instances file to masks: polygons and run lengths.

Coordinates of polygons count pixels from the upper left corner of the image, so that the first
pixel covers 0 to 1 and its centre lies at 0.5. A pixel is inside if its centre is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipes.errors import DatasetError
from clipes.types import IGNORE, UInt8Array

_FARTHEST = 1e6  # pixels; beyond it coordinates are damage


@dataclass(frozen=True)
class Outline:
    """One annotated object, or crowd of them.

    Attributes:
        value: Its value in the mask.
        area: Its size in pixels, as the file says; larger objects lie below smaller ones.
        polygons: Each (n, 2) float32, x and y; the object is their union.
        runs: Lengths of its run-length code, or None if polygons say where it is.
    """

    value: int
    area: float
    polygons: tuple[npt.NDArray[np.float32], ...]
    runs: npt.NDArray[np.int64] | None

    def inside(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Return (H, W) bool, True where the object is.

        Raises:
            DatasetError: The run lengths do not fit ``size``.
        """
        if self.runs is not None:
            return fill_runs(self.runs, size)
        inside = np.zeros(size, np.bool_)
        for polygon in self.polygons:
            inside |= fill_polygon(polygon, size)
        return inside


def parse_outline(annotation: dict[str, Any], value: int) -> Outline:
    """Read the outline of an annotation.

    Args:
        annotation: An entry of an instances file.
        value: Mask value of its category; of a crowd it is ``IGNORE``.

    Raises:
        DatasetError: It has none, or a malformed one.
    """
    outline, area = annotation.get("segmentation"), annotation.get("area")
    value = IGNORE if annotation.get("iscrowd") == 1 else value
    size = float(area) if isinstance(area, int | float) else 0.0
    if isinstance(outline, dict):
        counts = outline.get("counts")
        runs = decode_runs(counts) if isinstance(counts, str) else _whole_numbers(counts)
        return Outline(value, size, (), runs)
    if not isinstance(outline, list) or not outline:
        raise _malformed("it is neither a list of polygons nor run lengths")
    return Outline(value, size, tuple(map(_polygon, outline)), None)


def draw(outlines: Iterable[Outline], size: tuple[int, int]) -> UInt8Array:
    """Draw a mask: crowds at the bottom, then objects from the largest to the smallest.

    COCO's outlines overlap without saying what is in front. A small object on a large one (a
    book on a table) is the common case, and drawn the other way it would vanish.

    Args:
        outlines: The objects of one image.
        size: (H, W) of the image.

    Returns:
        (H, W) uint8; 0 where no object is, 255 where only a crowd is.

    Raises:
        DatasetError: The run lengths of one do not fit ``size``.
    """
    mask: UInt8Array = np.zeros(size, np.uint8)
    for outline in sorted(outlines, key=lambda item: (item.value != IGNORE, -item.area)):
        mask[outline.inside(size)] = outline.value
    return mask


def fill_polygon(points: npt.NDArray[np.float32], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Tell which pixels have their centre inside a polygon, by the even-odd rule.

    Args:
        points: (n, 2) corners, x and y in pixels.
        size: (H, W).

    Returns:
        (H, W) bool.
    """
    height, width = size
    x0, y0 = points.astype(np.float64).T
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    # Each side crosses the rows whose centre line lies between its ends, upper end included.
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64)
    counts = last - first
    side = np.repeat(np.arange(len(points)), counts)
    row = np.arange(len(side)) - np.repeat(np.cumsum(counts) - counts, counts) + first[side]
    slope = (row + 0.5 - y0[side]) / (y1[side] - y0[side])
    crossing = x0[side] + slope * (x1[side] - x0[side])
    column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
    inside: npt.NDArray[np.bool_] = np.zeros(size, np.bool_)
    if len(side):
        top, left = row.min(), column.min()
        flips = np.zeros((row.max() - top + 1, column.max() - left + 1), np.bool_)
        np.logical_xor.at(flips, (row - top, column - left), True)
        filled = np.logical_xor.accumulate(flips, axis=1)[:, : width - left]
        inside[top : top + len(filled), left : left + filled.shape[1]] = filled
    return inside


def fill_runs(runs: npt.NDArray[np.int64], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Return the (H, W) mask of alternating run lengths: outside first, column after column.

    Raises:
        DatasetError: They do not add up to the pixels of ``size``.
    """
    if int(runs.sum()) != size[0] * size[1]:
        raise _malformed(f"run lengths of {runs.sum()} pixels for {size[0]} x {size[1]}")
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return pixels.reshape(size[::-1]).T


def decode_runs(text: str) -> npt.NDArray[np.int64]:
    """Return the run lengths in COCO's compressed text.

    Each number is written in groups of 5 bits, lowest first, as characters from "0" on; bit 5 says
    that another group follows, and the highest bit of the last group is the sign. From the fourth
    on, numbers are differences to the one two places before.

    Raises:
        DatasetError: The text is no such code.
    """
    runs: list[int] = []
    number, shift = 0, 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift > 40:
            raise _malformed("damaged run lengths")
        number |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:
                number -= 1 << shift
            runs.append(number + runs[-2] if len(runs) > 2 else number)
            number, shift = 0, 0
    if shift:
        raise _malformed("run lengths that break off")
    return _whole_numbers(runs)


def _whole_numbers(values: object) -> npt.NDArray[np.int64]:
    """Return a list of run lengths as an array.

    Raises:
        DatasetError: It is something else.
    """
    if isinstance(values, list) and all(type(v) is int and 0 <= v < 2**31 for v in values):
        return np.array(values, np.int64)
    raise _malformed("damaged run lengths")


def _polygon(values: object) -> npt.NDArray[np.float32]:
    good = (
        isinstance(values, list)
        and len(values) >= 6
        and len(values) % 2 == 0
        and all(type(v) in (int, float) and abs(v) < _FARTHEST for v in values)
    )
    if not good:
        raise _malformed("a polygon is no list of x, y, x, y, ... of at least three corners")
    return np.array(values, np.float32).reshape(-1, 2)


def _malformed(what: str) -> DatasetError:
    return DatasetError(f"an outline cannot be drawn: {what}", "get the annotations again")
