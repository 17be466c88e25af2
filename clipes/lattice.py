"""High-dimensional Gaussian filtering on the permutohedral lattice.

Adams, Baek and Davis 2010, "Fast High-Dimensional Filtering Using the Permutohedral Lattice". Page
numbers below are theirs. Single precision and the order of all operations are those of the dense
CRF's authors (Kraehenbuehl and Koltun 2011), so that results differ from theirs by rounding only.

Pixels come in tiles of ``TILE``: an array of values is (tiles, channels, TILE), so that one channel
of neighbouring pixels and all channels of one pixel are both close together in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from clipes.errors import UsageError
from clipes.simd import (
    Width,
    fill,
    fma,
    jit,
    less,
    load,
    load_strided,
    rint,
    store,
    store_strided,
    where_equal,
    width,
)
from clipes.types import Float32Array, Int64Array

TILE = 16
"""Pixels per tile: one AVX-512 register, two of AVX, four of SSE or NEON."""

_RowArray: TypeAlias = npt.NDArray[np.uint32]

_MISSING = 0  # The row of every vertex that does not exist. It is read, never written: always zero.
_SCRAP = 1  # The row written where there is nothing to write. It is never read for its value.
_FIRST = 2  # The first vertex's row.

_FREE = -1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Fibonacci hashing (Knuth, 6.4)


@dataclass(frozen=True)
class Lattice:
    """The vertices around a set of points and how points and vertices are connected.

    Attributes:
        corners: (P, d + 1) uint32, rows of the vertices of the simplex around each point; P is the
            number of points rounded up to whole tiles.
        weights: (P, d + 1) float32, barycentric coordinates of each point; 0 beyond the last point.
        chains: Rows of vertices that are neighbours along an axis, in their order, for one axis
            after the other; every chain ends with row 0. Vertices without neighbours are in none.
        ends: (d + 2,) where the chains of axis j begin (``ends[j]``) and end (``ends[j + 1]``).
        rows: Number of rows of a table of vertex values: the vertices and two more.
    """

    corners: _RowArray
    weights: Float32Array
    chains: _RowArray
    ends: Int64Array
    rows: int

    @property
    def gain(self) -> float:
        """Factor that scales filtered values to those of a Gaussian of height 1."""
        return 1 / (1 + 2.0 ** -(self.corners.shape[1] - 1))

    def filter(self, values: Float32Array) -> Float32Array:
        """Sum the values of all points, weighted by a Gaussian of their distance, up to ``gain``.

        Args:
            values: (1, P) float32.

        Returns:
            (1, P) float32.
        """
        table = np.zeros(self.rows, np.float32)
        result = np.zeros_like(values)
        self.splat(values, table)
        self.blur(table, 1)
        self.slice(table, result)
        return result

    def splat(self, values: Float32Array, table: Float32Array) -> None:
        """Add the points' values, (lanes, P), to the vertices', (rows * lanes,).

        ``lanes`` is a power of two, as in the other two.
        """
        _splat(values.ravel(), self.corners, self.weights, table, width(len(values)))

    def blur(self, table: Float32Array, lanes: int) -> None:
        """Blur the vertices' values along each axis in turn, with weights 1/2, 1, 1/2."""
        _blur(table, self.chains, self.ends, width(lanes))

    def slice(self, table: Float32Array, values: Float32Array) -> None:
        """Add the vertices' values to the points'; the reverse of ``splat``."""
        _slice(table, self.corners, self.weights, values.ravel(), width(len(values)))


def build_lattice(features: Float32Array, points: int) -> Lattice:
    """Find the vertices around all points and their neighbours.

    Args:
        features: (d, P) float32, coordinates in units of the Gaussian's standard deviation; P is a
            multiple of ``TILE``.
        points: How many of the P points count.

    Raises:
        UsageError: The points spread over too many standard deviations to number the vertices.
    """
    d = len(features)
    # The filter's standard deviation is that of the blur when E is scaled like this (p. 6).
    deviation = float(np.float32(np.sqrt(2 / 3) * (d + 1)))
    scale = tuple(np.float32(deviation / np.sqrt((i + 1) * (i + 2))) for i in range(d))
    origin, strides = _numbering(features[:, :points], scale)
    size = features.shape[1]
    corners = np.full((size, d + 1), _MISSING, np.uint32)
    weights = np.zeros((size, d + 1), np.float32)
    keys, slot_keys, slot_rows = _grow(np.empty(0, np.int64), 0, max(1024, 5 * points // 2))
    first = count = 0
    while True:
        first, count = _embed(
            features, points, scale, origin, strides, keys, slot_keys, slot_rows, corners, weights, first, count
        )
        if first >= size:
            break
        keys, slot_keys, slot_rows = _grow(keys, count, 2 * len(slot_keys))
    chains, ends = _link(count, slot_keys, slot_rows, strides)
    return Lattice(corners, weights, chains, ends, count + _FIRST)


def _numbering(features: Float32Array, scale: tuple[np.float32, ...]) -> tuple[Int64Array, Int64Array]:
    """Return origin and strides that give each vertex near the features a number of its own."""
    d = len(scale)
    # Coordinate i on the lattice's hyperplane: -i times feature i - 1, plus the features from i on.
    matrix = np.triu(np.ones((d, d))) - np.diag(np.arange(1, d), -1)
    matrix *= np.array(scale, np.float64)
    low, high = features.min(1).astype(np.float64), features.max(1).astype(np.float64)
    smallest = np.minimum(matrix * low, matrix * high).sum(1)
    largest = np.maximum(matrix * low, matrix * high).sum(1)
    margin = 4 * (d + 1)  # corners of the simplex, their neighbours, rounding
    origin = np.floor(smallest).astype(np.int64) - margin
    extent = [int(e) for e in np.ceil(largest).astype(np.int64) + margin - origin]
    strides = [1]
    for size in extent[:0:-1]:
        strides.append(strides[-1] * size)
    if strides[-1] * extent[0] >= 2**62:
        raise UsageError(
            "a kernel of the CRF is too narrow for this image",
            "use larger standard deviations or a smaller image",
        )
    return origin, np.array(strides[::-1], np.int64)


@jit
def _find(slot_keys: Int64Array, key: int) -> int:
    """Return the slot that holds the key, or the free slot where it belongs."""
    slots = slot_keys.size
    mixed = (np.uint64(key) * _GOLDEN) >> np.uint64(32)
    slot = np.int64((mixed * np.uint64(slots)) >> np.uint64(32))
    while slot_keys[slot] != key and slot_keys[slot] != _FREE:
        slot = slot + 1 if slot + 1 < slots else 0
    return slot


@jit
def _grow(keys: Int64Array, count: int, slots: int) -> tuple[Int64Array, Int64Array, _RowArray]:
    """Return the keys with room for more, and a hash table of them with so many slots."""
    grown = np.empty(slots // 2, np.int64)
    slot_keys = np.full(slots, _FREE, np.int64)
    slot_rows = np.full(slots, _MISSING, np.uint32)
    for vertex in range(count):
        grown[vertex] = keys[vertex]
        slot = _find(slot_keys, keys[vertex])
        slot_keys[slot] = keys[vertex]
        slot_rows[slot] = vertex + _FIRST
    return grown, slot_keys, slot_rows


@jit
def _embed(
    features: Float32Array,
    points: int,
    scale: tuple[np.float32, ...],
    origin: Int64Array,
    strides: Int64Array,
    keys: Int64Array,
    slot_keys: Int64Array,
    slot_rows: _RowArray,
    corners: _RowArray,
    weights: Float32Array,
    first: int,
    count: int,
) -> tuple[int, int]:
    """Find the simplices of the points from ``first`` on: corners and barycentric coordinates.

    Returns:
        The first point of those for which there is no room in the hash table, and the number of
        vertices in it.
    """
    d = len(scale)
    size = features.shape[1]
    flat = features.ravel()
    tile = (0,) * 16
    zero, one = fill(np.float32(0), tile), fill(np.float32(1), tile)
    largest, period = fill(np.float32(d), tile), fill(np.float32(d + 1), tile)
    inverse = fill(np.float32(1) / np.float32(d + 1), tile)

    elevated = np.empty((d + 1) * TILE, np.float32)
    nearest = np.empty((d + 1) * TILE, np.float32)
    rest = np.empty((d + 1) * TILE, np.float32)
    rank = np.empty((d + 1) * TILE, np.float32)
    barycentric = np.empty((d + 1) * TILE, np.float32)
    axes = np.empty((d + 1) * TILE, np.float32)
    paths = np.empty(TILE, np.float32)
    steps = np.zeros(d + 1, np.int64)
    ones = np.int64(0)
    for i in range(d):
        steps[i] = strides[i] * (d + 1)
        ones += strides[i]

    last_key, last_path = np.int64(_FREE), np.float32(0)
    while first < size and count + (d + 1) * TILE <= keys.size:
        # Elevate the points to the hyperplane (p. 5).
        total = zero
        for j in range(d, 0, -1):
            part = load(flat, (j - 1) * size + first, tile) * fill(scale[j - 1], tile)
            store(elevated, j * TILE, total - fill(np.float32(j), tile) * part)
            total = total + part
        store(elevated, 0, total)

        # Round to the nearest point whose coordinates are all multiples of d + 1 (p. 6).
        excess = zero
        for i in range(d + 1):
            whole = rint(inverse * load(elevated, i * TILE, tile))
            store(nearest, i * TILE, whole * period)
            store(rest, i * TILE, load(elevated, i * TILE, tile) - whole * period)
            excess = excess + whole

        # Rank the differences; where the rounded point is off the plane, walk back to it (p. 6).
        for i in range(d + 1):
            order = excess
            for j in range(i):
                order = order + one - less(load(rest, j * TILE, tile), load(rest, i * TILE, tile))
            for j in range(i + 1, d + 1):
                order = order + less(load(rest, i * TILE, tile), load(rest, j * TILE, tile))
            shift = (less(order, zero) - less(largest, order)) * period
            store(rank, i * TILE, order + shift)
            store(nearest, i * TILE, load(nearest, i * TILE, tile) + shift)
        for i in range(d + 1):
            offset = load(elevated, i * TILE, tile) - load(nearest, i * TILE, tile)
            store(rest, i * TILE, offset * inverse)

        # Barycentric coordinates are differences of neighbours in the ranking (p. 10).
        path, previous = zero, zero
        for r in range(d + 1):
            wanted = fill(np.float32(d - r), tile)
            ranked, axis = zero, zero
            for i in range(d + 1):
                place = load(rank, i * TILE, tile)
                ranked = ranked + where_equal(place, wanted, load(rest, i * TILE, tile))
                axis = axis + where_equal(place, wanted, fill(np.float32(i), tile))
            store(barycentric, r * TILE, ranked - previous)
            store(axes, r * TILE, axis)
            path = path * period + axis
            previous = ranked
        store(barycentric, 0, load(barycentric, 0, tile) + (one - previous))
        store(paths, 0, path)

        for k in range(min(TILE, points - first)):
            point = first + k
            key = np.int64(0)
            for i in range(d):
                key += (np.int64(nearest[i * TILE + k]) - origin[i]) * strides[i]
            for r in range(d + 1):
                weights[point, r] = barycentric[r * TILE + k]
            if key == last_key and paths[k] == last_path:
                for r in range(d + 1):
                    corners[point, r] = corners[point - 1, r]
                continue
            last_key, last_path = key, paths[k]
            for r in range(d + 1):
                slot = _find(slot_keys, key)
                row = np.int64(slot_rows[slot])
                if row == _MISSING:
                    slot_keys[slot] = key
                    keys[count] = key
                    row = count + _FIRST
                    slot_rows[slot] = row
                    count += 1
                corners[point, r] = row
                key += ones - steps[np.int64(axes[r * TILE + k])]
        first += TILE
    return first, count


@jit
def _link(
    count: int, slot_keys: Int64Array, slot_rows: _RowArray, strides: Int64Array
) -> tuple[_RowArray, Int64Array]:
    """String vertices that are neighbours along an axis together, axis by axis."""
    d = strides.size
    ones = np.int64(0)
    for i in range(d):
        ones += strides[i]

    # Slots follow a multiple of the key, so to look for the neighbours in the order of the slots
    # means to walk through the table at two places rather than to jump about in it.
    keys = np.empty(count + 1, np.int64)
    rows = np.empty(count + 1, np.uint32)
    found = 0
    for slot in range(slot_keys.size):
        keys[found] = slot_keys[slot]
        rows[found] = slot_rows[slot]
        found += slot_rows[slot] != _MISSING

    chains = np.empty((d + 1) * (count + count // 2), np.uint32)
    ends = np.zeros(d + 2, np.int64)
    following = np.empty(count + _FIRST, np.uint32)
    has_previous = np.empty(count + _FIRST, np.bool_)
    end = 0
    for j in range(d + 1):
        step = -ones
        if j < d:
            step += (d + 1) * strides[j]
        has_previous[:] = False
        for vertex in range(count):
            # Neighbours are as likely as not, so a branch on their presence would cost more than
            # row 0 does, which is found and marked in place of those absent.
            row = slot_rows[_find(slot_keys, keys[vertex] + step)]
            following[rows[vertex]] = row
            has_previous[row] = True
        for row in range(_FIRST, count + _FIRST):
            if following[row] != _MISSING and not has_previous[row]:
                link = np.int64(row)
                while link != _MISSING:
                    chains[end] = link
                    end += 1
                    link = np.int64(following[link])
                chains[end] = _MISSING
                end += 1
        ends[j + 1] = end
    return chains[:end].copy(), ends


@jit
def _splat(
    values: Float32Array,
    corners: _RowArray,
    weights: Float32Array,
    table: Float32Array,
    lanes: Width,
) -> None:
    n, points = len(lanes), corners.shape[0]
    for point in range(points):
        value = load_strided(values, point, points, lanes)
        for r in range(corners.shape[1]):
            row = np.int64(corners[point, r]) * n
            weight = fill(weights[point, r], lanes)
            store(table, row, fma(weight, value, load(table, row, lanes)))


@jit
def _blur(table: Float32Array, chains: _RowArray, ends: Int64Array, lanes: Width) -> None:
    n = len(lanes)
    half = fill(np.float32(0.5), lanes)
    for j in range(ends.size - 1):
        # A window of three slides along the chains, so that the table is blurred in place. The
        # result of the middle one is written when the one after it is known.
        before = fill(np.float32(0), lanes)
        middle = before
        middle_row = np.int64(_SCRAP)
        for link in range(ends[j], ends[j + 1]):
            row = np.int64(chains[link])
            after = load(table, row * n, lanes)
            store(table, middle_row * n, fma(half, before + after, middle))
            before, middle = middle, after
            middle_row = row + np.int64(row == _MISSING)  # what follows a chain is scrap


@jit
def _slice(
    table: Float32Array,
    corners: _RowArray,
    weights: Float32Array,
    values: Float32Array,
    lanes: Width,
) -> None:
    n, points = len(lanes), corners.shape[0]
    for point in range(points):
        value = load_strided(values, point, points, lanes)
        for r in range(corners.shape[1]):
            row = np.int64(corners[point, r]) * n
            value = fma(fill(weights[point, r], lanes), load(table, row, lanes), value)
        store_strided(values, point, points, value)
