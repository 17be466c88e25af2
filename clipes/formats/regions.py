"""Regions of a mask, as run lengths and as polygons.

Run lengths alternate, outside first, and count pixels down one column after the other, as in COCO.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from clipes.types import IGNORE, Int64Array, UInt8Array


@dataclass(frozen=True)
class Region:
    """A part of a mask.

    Attributes:
        value: What the mask holds there.
        left: First column of the box around it.
        top: First row of the box.
        inside: (h, w) bool, True where the region is in the box.
    """

    value: int
    left: int
    top: int
    inside: npt.NDArray[np.bool_]

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(self.inside.sum())

    def runs(self, size: tuple[int, int]) -> Int64Array:
        """Return its run lengths in a picture of ``size`` (H, W)."""
        height, width = size
        padded = np.pad(self.inside, ((1, 1), (0, 0))).astype(np.int8)
        steps = np.diff(padded, axis=0).T
        column, row = np.nonzero(steps)
        edges = (self.left + column) * height + self.top + row
        # A run that ends with a column goes on where the next one starts.
        kept = np.ones(len(edges), np.bool_)
        touching = 1 + 2 * np.flatnonzero(edges[1:-1:2] == edges[2::2])
        kept[touching] = kept[touching + 1] = False
        runs = np.diff(np.concatenate([[0], edges[kept], [height * width]])).astype(np.int64)
        return runs[:-1] if len(runs) > 1 and runs[-1] == 0 else runs

    def runs_by_rows(self, size: tuple[int, int]) -> Int64Array:
        """Return its run lengths in a picture of ``size`` (H, W), row after row."""
        return Region(self.value, self.top, self.left, self.inside.T).runs(size[::-1])

    def runs_in_box(self) -> Int64Array:
        """Return its run lengths in its box, row after row."""
        return Region(self.value, 0, 0, self.inside).runs_by_rows(self.inside.shape)


def regions(mask: UInt8Array, values: Iterable[int], *, components: bool) -> Iterator[Region]:
    """Yield the parts of a mask that hold some values, one value after the other.

    Args:
        mask: (H, W).
        values: The values; those that do not occur are passed over.
        components: Whether each part that hangs together, corners included, is a region of its own;
            what is not labelled is one region in any case, for it comes in crumbs.
    """
    for value in values:
        inside = mask == value
        if not inside.any():
            continue
        if not components or value == IGNORE:
            yield _crop(value, inside)
            continue
        count, labels, boxes, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8))
        for index in range(1, count):
            left, top, width, height = map(int, boxes[index, :4])
            part = labels[top : top + height, left : left + width] == index
            yield Region(value, left, top, part)


def paint_order(mask: UInt8Array) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    """Yield polygons that give a mask when they are painted one over the other on zeros.

    A polygon cannot have a hole; what shows through a hole is painted after it instead, which may
    be background. The corners are centres of pixels, and a pixel on the outline is inside.

    Args:
        mask: (H, W).

    Yields:
        The value to paint, and (n, 2) corners x, y; n is 1 or 2 where a region is that small.
    """
    parts = [part for value in np.unique(mask) for part in _outlines(mask, int(value))]
    canvas: UInt8Array = np.zeros_like(mask)
    # A region in the hole of another has a smaller outline than that one.
    for value, _, outline in sorted(parts, key=lambda part: -part[1]):
        x, y = outline[0]
        # Regions hang together by sides only, so what is below one of them has one value.
        if canvas[y, x] != value:
            cv2.drawContours(canvas, [outline], -1, value, cv2.FILLED)
            yield value, outline


def simplify(outline: npt.NDArray[np.int32], tolerance: float) -> npt.NDArray[np.int32]:
    """Drop corners of a polygon (n, 2) so that it moves by ``tolerance`` pixels at most."""
    if tolerance <= 0 or len(outline) < 4:
        return outline
    fewer = cv2.approxPolyDP(outline[:, None], tolerance, True)[:, 0]
    return fewer.astype(np.int32)


def _outlines(mask: UInt8Array, value: int) -> Iterator[tuple[int, int, npt.NDArray[np.int32]]]:
    """Yield value, area with holes filled, and outline of each region joined by sides."""
    inside = (mask == value).astype(np.uint8)
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(inside, connectivity=4)
    for index in range(1, count):
        left, top, width, height = map(int, boxes[index, :4])
        part = (labels[top : top + height, left : left + width] == index).astype(np.uint8)
        (outline,), _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(part, [outline], -1, 1, cv2.FILLED)
        yield value, int(part.sum()), outline[:, 0] + np.array([left, top], np.int32)


def _crop(value: int, inside: npt.NDArray[np.bool_]) -> Region:
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    top, left = int(rows[0]), int(columns[0])
    return Region(value, left, top, inside[top : rows[-1] + 1, left : columns[-1] + 1])
