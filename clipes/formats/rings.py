"""Outlines of regions as single polygons, holes included, for tools that know one ring a part.

A hole is bridged: from its first corner, a line leads through the region to the outline (or to
another hole) and back, so that the ring encloses the region alone. Every reader that fills by the
even-odd rule, as OpenCV, Pillow and pycocotools do, gets the region again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import numpy.typing as npt

Ring = npt.NDArray[np.int64]
"""(n, 2) corners x, y of a closed polygon."""


def rings(inside: npt.NDArray[np.bool_], *, edges: bool) -> Iterator[Ring]:
    """Yield the outline of each part of a region that hangs together, corners included.

    Args:
        inside: (H, W), True in the region.
        edges: Whether outlines run along the edges of pixels, as COCO measures: a pixel has four
            corners. Otherwise they run through the centres of pixels, as OpenCV draws: a pixel has
            one corner, and pixels on the outline are inside.
    """
    grid = inside.astype(np.uint8)
    if edges:
        grid = grid.repeat(2, axis=0).repeat(2, axis=1)
    contours, tree = cv2.findContours(grid, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return
    outlines = [_steps(np.asarray(contour, np.int64)[:, 0], edges=edges) for contour in contours]
    parents = np.reshape(tree, (-1, 4))[:, 3]
    holes: dict[int, list[Ring]] = {}
    for hole, parent in zip(outlines, parents.tolist(), strict=True):
        holes.setdefault(parent, []).append(hole)
    for index in np.flatnonzero(parents < 0).tolist():
        ring = outlines[index]
        yield _corners(_bridged(ring, holes[index], inside) if index in holes else ring)


def _steps(contour: Ring, *, edges: bool) -> Ring:
    """Return a contour as a ring of single steps."""
    if not edges:
        return contour
    # Of a pixel's two grid points in a row, the first is at its near edge, the second at the far
    # one; where the contour cuts a corner of the region, both ends are that corner.
    points = (contour + 1) // 2
    kept: Ring = points[(points != np.roll(points, 1, axis=0)).any(1)]
    return kept


def _corners(ring: Ring) -> Ring:
    """Drop points between which a ring goes straight on."""
    steps = np.sign(np.roll(ring, -1, axis=0) - ring)
    corners = ring[(steps != np.roll(steps, 1, axis=0)).any(1)]
    return corners if len(corners) else ring[:1]


def _bridged(outline: Ring, holes: Sequence[Ring], inside: npt.NDArray[np.bool_]) -> Ring:
    """Return one ring of an outline and the holes in it."""
    points: list[tuple[int, int]] = []
    following: list[int] = []  # for each point the index of the next
    where: dict[tuple[int, int], int] = {}

    def append(ring: Ring) -> None:
        for x, y in ring.tolist():
            where.setdefault((x, y), len(points))
            points.append((x, y))
            following.append(len(points))

    append(outline)
    following[-1] = 0
    # What is to the left of a hole belongs to the outline or to a hole that begins further left.
    for hole, start in sorted(((ring, _leftmost(ring)) for ring in holes), key=_column):
        x, y = hole[start].tolist()
        outside = np.flatnonzero(~inside[y, :x])
        at = where[int(outside[-1]) + 1 if len(outside) else 0, y]
        first = len(points)
        append(np.concatenate([hole[start:], hole[: start + 1], [points[at]]]))
        following[-1] = following[at]
        following[at] = first
    order = [0]
    while following[order[-1]]:
        order.append(following[order[-1]])
    return np.array(points, np.int64)[order]


def _leftmost(ring: Ring) -> int:
    """Return the index of the highest of the leftmost points."""
    return int(np.lexsort((ring[:, 1], ring[:, 0]))[0])


def _column(hole: tuple[Ring, int]) -> int:
    ring, start = hole
    return int(ring[start, 0])
