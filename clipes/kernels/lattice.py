"""High-dimensional Gaussian filtering on the permutohedral lattice.

Adams, Baek and Davis 2010, "Fast High-Dimensional Filtering Using the Permutohedral Lattice"; page
numbers below are theirs. Points are splatted to the vertices of the simplices they lie in, vertices
are blurred along each axis, and the points read the result back (slice).

Single precision and the order of all operations are those of Kraehenbuehl and Koltun's dense CRF,
so that results differ from theirs by rounding only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from clipes.errors import UsageError
from clipes.kernels.simd import (
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
"""Points come in multiples of this; so many are embedded at a time."""

_RowArray: TypeAlias = npt.NDArray[np.uint32]

# Rows of a table of vertex values
_MISSING = 0  # stands for every vertex that does not exist; it is read, never written: always zero
_SCRAP = 1  # written where there is nothing to write; never read
_FIRST = 2  # the first vertex

_FREE = -1  # key of an empty slot of the hash table
_SLOTS_PER_POINT = 3  # images have about as many vertices as pixels
_MULTIPLIER = np.uint64(0xF1357AEA2E62A9C5)  # spreads regular keys well (Steele and Vigna 2022)
_TILE_WIDTH = width(TILE)


@dataclass(frozen=True)
class Lattice:
    """The vertices around a set of points, and how points and vertices are connected.

    Attributes:
        corners: (P, d + 1) uint32, the rows of the vertices of each point's simplex.
        weights: (P, d + 1) float32, the point's barycentric coordinates in it.
        chains: Rows of vertices that are neighbours along an axis, in order, each chain closed by
            row 0; those of axis 0, then of axis 1, ... Vertices without neighbours are in none.
        ends: (d + 2,) int64; the chains of axis j are ``chains[ends[j] : ends[j + 1]]``.
        rows: Number of rows in a table of vertex values: the vertices' and two more.
    """

    corners: _RowArray
    weights: Float32Array
    chains: _RowArray
    ends: Int64Array
    rows: int

    def filter(self, values: Float32Array) -> Float32Array:
        """Sum the points' values, weighted by a Gaussian of their distance, up to a constant.

        Args:
            values: (P,) float32.

        Returns:
            (P,) float32.
        """
        table = np.zeros(self.rows, np.float32)
        result = np.zeros_like(values)
        self.splat(values[None], table)
        self.blur(table, 1)
        self.slice(table, result[None])
        return result

    def splat(self, values: Float32Array, table: Float32Array) -> None:
        """Add the points' values to those of the vertices around them.

        Args:
            values: (lanes, P), contiguous; ``lanes`` is a power of two.
            table: (rows * lanes,); a vertex's values are next to each other.
        """
        _splat(values.ravel(), self.corners, self.weights, table, width(len(values)))

    def blur(self, table: Float32Array, lanes: int) -> None:
        """Blur the vertices' values along one axis after the other, with weights 1/2, 1, 1/2.

        Args:
            table: (rows * lanes,), as in ``splat``.
            lanes: Values per vertex, a power of two.
        """
        _blur(table, self.chains, self.ends, width(lanes))

    def slice(self, table: Float32Array, values: Float32Array) -> None:
        """Add the vertices' values to those of the points between them; ``splat`` reversed.

        Args:
            table: (rows * lanes,), as in ``splat``.
            values: (lanes, P), contiguous.
        """
        _slice(table, self.corners, self.weights, values.ravel(), width(len(values)))


def build_lattice(features: Float32Array, points: int) -> Lattice:
    """Find the vertices around all points and their neighbours.

    Args:
        features: (d, P) float32, coordinates in units of the Gaussian's standard deviation; P is a
            multiple of ``TILE``.
        points: How many of the P count. The others get weights of zero.

    Raises:
        UsageError: The points spread over too many standard deviations to number the vertices.
    """
    d, size = features.shape
    scale = _scaling(d)
    inside = features[:, :points]
    origin, strides = _numbering(inside.min(1), inside.max(1), scale)
    corners = np.full((size, d + 1), _MISSING, np.uint32)
    weights = np.zeros((size, d + 1), np.float32)
    table = _rehash(np.empty(0, np.int64), 0, max(1024, _SLOTS_PER_POINT * points))
    first = vertices = 0
    while True:
        first, vertices = _embed(
            features, points, scale, origin, strides, *table, corners, weights, first, vertices
        )
        if first >= size:
            break
        table = _rehash(table[0], vertices, 2 * len(table[1]))
    chains, ends = _link(vertices, *table[1:], strides)
    return Lattice(corners, weights, chains, ends, vertices + _FIRST)


def _scaling(d: int) -> tuple[np.float32, ...]:
    """Return the factors of d features before they are elevated to the hyperplane."""
    # Scaled like this, E turns the blur's standard deviation into that of the filter (p. 6).
    deviation = float(np.float32(np.sqrt(2 / 3) * (d + 1)))
    return tuple(np.float32(deviation / np.sqrt((i + 1) * (i + 2))) for i in range(d))


def _numbering(
    low: Float32Array, high: Float32Array, scale: tuple[np.float32, ...]
) -> tuple[Int64Array, Int64Array]:
    """Return origin and strides that give every vertex near features a number of its own.

    The number of a vertex is the sum of its first d coordinates, less the origin, times strides.

    Args:
        low: (d,), the least of each feature.
        high: (d,), the greatest of each feature.
        scale: ``_scaling(d)``.

    Raises:
        UsageError: Numbers of 62 bits are too few.
    """
    d = len(scale)
    # The first d of the d + 1 coordinates on the hyperplane (p. 5): coordinate i is the sum of the
    # scaled features from i on, less i times feature i - 1.
    matrix = np.triu(np.ones((d, d))) - np.diag(np.arange(1, d), -1)
    matrix *= np.array(scale, np.float64)
    low, high = low.astype(np.float64), high.astype(np.float64)
    smallest = np.minimum(matrix * low, matrix * high).sum(1)
    largest = np.maximum(matrix * low, matrix * high).sum(1)
    margin = 4 * (d + 1)  # the simplex' corners, their neighbours, rounding
    origin = np.floor(smallest).astype(np.int64) - margin
    extents = (np.ceil(largest).astype(np.int64) + margin - origin).tolist()
    strides = [1]
    for extent in extents[:0:-1]:
        strides.append(strides[-1] * extent)
    if strides[-1] * extents[0] >= 2**62:
        raise UsageError(
            "a kernel of the CRF is too narrow for this image",
            "use larger standard deviations or a smaller image",
        )
    return origin, np.array(strides[::-1], np.int64)


# --- building


@jit
def _find(slot_keys: Int64Array, key: np.int64) -> np.int64:
    """Return the slot that holds the key, or the free one where it belongs."""
    slots = slot_keys.size
    mixed = (np.uint64(key) * _MULTIPLIER) >> np.uint64(32)
    slot = np.int64((mixed * np.uint64(slots)) >> np.uint64(32))
    while slot_keys[slot] != key and slot_keys[slot] != _FREE:
        slot = slot + 1 if slot + 1 < slots else np.int64(0)
    return slot


@jit
def _rehash(
    keys: Int64Array, vertices: int, slots: int
) -> tuple[Int64Array, Int64Array, _RowArray]:
    """Return keys with room for as many vertices as the slots bear, and a hash table of them."""
    room = np.empty(slots // 2, np.int64)
    slot_keys = np.full(slots, _FREE, np.int64)
    slot_rows = np.full(slots, _MISSING, np.uint32)
    for vertex in range(vertices):
        room[vertex] = keys[vertex]
        slot = _find(slot_keys, keys[vertex])
        slot_keys[slot] = keys[vertex]
        slot_rows[slot] = vertex + _FIRST
    return room, slot_keys, slot_rows


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
    vertices: int,
) -> tuple[int, int]:
    """Find corners and barycentric coordinates of the points from ``first`` on.

    Returns:
        The first point for which there is no room among the keys any more, and the number of
        vertices found so far.
    """
    d = len(scale)
    size = features.shape[1]
    flat = features.ravel()
    zero, one = fill(np.float32(0), _TILE_WIDTH), fill(np.float32(1), _TILE_WIDTH)
    top, period = fill(np.float32(d), _TILE_WIDTH), fill(np.float32(d + 1), _TILE_WIDTH)
    inverse = fill(np.float32(1) / np.float32(d + 1), _TILE_WIDTH)

    # One tile of each coordinate after the other
    elevated = np.empty((d + 1) * TILE, np.float32)
    nearest = np.empty((d + 1) * TILE, np.float32)
    offset = np.empty((d + 1) * TILE, np.float32)
    rank = np.empty((d + 1) * TILE, np.float32)
    barycentric = np.empty((d + 1) * TILE, np.float32)
    axes = np.empty((d + 1) * TILE, np.float32)
    paths = np.empty(TILE, np.float32)

    # Steps between the numbers of vertices
    along = np.zeros(d + 1, np.int64)
    ones = np.int64(0)
    for i in range(d):
        along[i] = (d + 1) * strides[i]
        ones += strides[i]

    last_key, last_path = np.int64(_FREE), np.float32(0)
    while first < size and vertices + (d + 1) * TILE <= keys.size:
        # Elevate the points to the hyperplane (p. 5).
        total = zero
        for j in range(d, 0, -1):
            part = load(flat, (j - 1) * size + first, _TILE_WIDTH) * fill(scale[j - 1], _TILE_WIDTH)
            store(elevated, j * TILE, total - fill(np.float32(j), _TILE_WIDTH) * part)
            total = total + part
        store(elevated, 0, total)

        # Round to coordinates that are multiples of d + 1.
        excess = zero
        for i in range(d + 1):
            coordinate = load(elevated, i * TILE, _TILE_WIDTH)
            whole = rint(inverse * coordinate)
            store(nearest, i * TILE, whole * period)
            store(offset, i * TILE, coordinate - whole * period)
            excess = excess + whole

        # Rank the offsets; where the result is off the hyperplane, walk back to it.
        for i in range(d + 1):
            place, mine = excess, load(offset, i * TILE, _TILE_WIDTH)
            for j in range(i):
                place = place + (one - less(load(offset, j * TILE, _TILE_WIDTH), mine))
            for j in range(i + 1, d + 1):
                place = place + less(mine, load(offset, j * TILE, _TILE_WIDTH))
            shift = (less(place, zero) - less(top, place)) * period
            store(rank, i * TILE, place + shift)
            store(nearest, i * TILE, load(nearest, i * TILE, _TILE_WIDTH) + shift)

        # Barycentric coordinates are differences between neighbours in the ranking (p. 10). The
        # order of the axes in it is the path from corner to corner.
        path, previous = zero, zero
        for r in range(d + 1):
            wanted = fill(np.float32(d - r), _TILE_WIDTH)
            ranked, axis = zero, zero
            for i in range(d + 1):
                place = load(rank, i * TILE, _TILE_WIDTH)
                difference = load(elevated, i * TILE, _TILE_WIDTH)
                difference = difference - load(nearest, i * TILE, _TILE_WIDTH)
                ranked = ranked + where_equal(place, wanted, difference * inverse)
                axis = axis + where_equal(place, wanted, fill(np.float32(i), _TILE_WIDTH))
            store(barycentric, r * TILE, ranked - previous)
            store(axes, r * TILE, axis)
            path, previous = path * period + axis, ranked
        store(barycentric, 0, load(barycentric, 0, _TILE_WIDTH) + (one - previous))
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
                    row = np.int64(vertices + _FIRST)
                    slot_keys[slot], slot_rows[slot], keys[vertices] = key, row, key
                    vertices += 1
                corners[point, r] = row
                key += ones - along[np.int64(axes[r * TILE + k])]
        first += TILE
    return first, vertices


@jit
def _link(
    vertices: int, slot_keys: Int64Array, slot_rows: _RowArray, strides: Int64Array
) -> tuple[_RowArray, Int64Array]:
    """String vertices that are neighbours along an axis together, axis by axis."""
    d = strides.size
    ones = np.int64(0)
    for i in range(d):
        ones += strides[i]

    # A slot is a multiple of the key, so looking for neighbours in the order of the slots walks
    # through the table at two places; any other order would jump about in it.
    keys = np.empty(vertices + 1, np.int64)
    rows = np.empty(vertices + 1, np.uint32)
    found = 0
    for slot in range(slot_keys.size):
        keys[found], rows[found] = slot_keys[slot], slot_rows[slot]
        found += slot_rows[slot] != _MISSING

    chains = np.empty((d + 1) * (vertices + vertices // 2), np.uint32)
    ends = np.zeros(d + 2, np.int64)
    following = np.empty(vertices + _FIRST, np.uint32)
    preceded = np.empty(vertices + _FIRST, np.bool_)
    starts = np.empty(vertices + 1, np.uint32)
    end = 0
    for j in range(d + 1):
        step = -ones
        if j < d:
            step += (d + 1) * strides[j]
        # Having a neighbour is a toss-up that no branch predictor wins: neighbours that do not
        # exist are row 0, and candidates that are no start are overwritten by the next.
        preceded[:] = False
        for vertex in range(vertices):
            row = slot_rows[_find(slot_keys, keys[vertex] + step)]
            following[rows[vertex]] = row
            preceded[row] = True
        count = 0
        for row in range(_FIRST, vertices + _FIRST):
            starts[count] = row
            count += (following[row] != _MISSING) & (not preceded[row])
        for chain in range(count):
            link = np.int64(starts[chain])
            while link != _MISSING:
                chains[end] = link
                end += 1
                link = np.int64(following[link])
            chains[end] = _MISSING
            end += 1
        ends[j + 1] = end
    return chains[:end].copy(), ends


# --- filtering


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
        # A window of three slides along the chains, so that the table is blurred in place: a value
        # is replaced when the one after it has been read.
        before = fill(np.float32(0), lanes)
        middle = before
        middle_row = np.int64(_SCRAP)
        for link in range(ends[j], ends[j + 1]):
            row = np.int64(chains[link])
            after = load(table, row * n, lanes)
            store(table, middle_row * n, fma(half, before + after, middle))
            before, middle = middle, after
            middle_row = row + np.int64(row == _MISSING)  # between two chains: scrap


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
