"""High-dimensional Gaussian filtering on the permutohedral lattice, on any torch device.

The same filter as ``clipes.lattice`` (Adams, Baek and Davis 2010; page numbers below are theirs),
in large steps: all points are embedded at once, vertices are found by sorting their numbers, and
sums are taken over sorted lists, one after the other and never by atomic additions. So a device
gives the same bits every time. Of what is computed, only sizes are read back from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from clipes.lattice import numbering, scaling
from clipes.types import Float32Array


@dataclass(frozen=True)
class TorchLattice:
    """The vertices around a set of points, and how points and vertices are connected.

    A table of vertex values has R rows: the vertices', and at the end one that stands for every
    vertex that does not exist and is always zero.

    Attributes:
        rows: (P * (d + 1),) int32, the rows of the vertices of each point's simplex.
        weights: (P * (d + 1),) float32, the point's barycentric coordinates in it.
        simplices: (P + 1,) int32, where each point's part of the two begins.
        points: (P * (d + 1),) int32, the points of ``rows`` in the order of the rows.
        splat_weights: (P * (d + 1),) float32, the ``weights`` of those.
        parts: (Q + 1,) int32, where ``points`` is cut: each part belongs to one vertex and is short
            enough for one thread of a GPU.
        shares: (Q,) int32, 0, 1, 2, ...
        vertices: (R + 1,) int32, where each vertex' list of parts begins.
        neighbours: For each axis, (2 * R,) int32: the row before each vertex, then the row after.
    """

    rows: Tensor
    weights: Tensor
    simplices: Tensor
    points: Tensor
    splat_weights: Tensor
    parts: Tensor
    shares: Tensor
    vertices: Tensor
    neighbours: tuple[Tensor, ...]

    def filter(self, values: Tensor) -> Tensor:
        """Sum the points' values, weighted by a Gaussian of their distance, up to a constant.

        Args:
            values: (P, lanes) float32, contiguous.

        Returns:
            (P, lanes) float32.
        """
        # Splat: a flat region puts all of its points on one vertex. To sum up the sums of parts
        # takes most steps off so long a list.
        table = _sums(values, self.points, self.parts, self.splat_weights)
        table = _sums(table, self.shares, self.vertices)
        # Blur along one axis after the other, with weights 1/2, 1, 1/2.
        for axis in self.neighbours:
            before, after = table.index_select(0, axis).view(2, *table.shape)
            table.add_(before.add_(after), alpha=0.5)
        # Slice
        return _sums(table, self.rows, self.simplices, self.weights)

    def times(self, factor: Tensor) -> TorchLattice:
        """Return the lattice with the points' weights multiplied by a factor (P,)."""
        corners = self.weights.shape[0] // factor.shape[0]
        return replace(
            self,
            weights=(self.weights.view(-1, corners) * factor[:, None]).view(-1),
            splat_weights=self.splat_weights * factor.index_select(0, self.points),
        )


def _sums(values: Tensor, rows: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return weighted sums of rows of values, those of each list one after the other."""
    return embedding_bag(
        rows, values, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def build_torch_lattice(features: Tensor, low: Float32Array, high: Float32Array) -> TorchLattice:
    """Find the vertices around all points and their neighbours.

    Args:
        features: (d, P) float32, coordinates in units of the Gaussian's standard deviation.
        low: (d,), no feature is below.
        high: (d,), no feature is above.

    Raises:
        UsageError: The points spread over too many standard deviations to number the vertices.
    """
    d, count = features.shape
    scale = scaling(d)
    origin, strides = numbering(low, high, scale)
    nearest, axes, weights = _embed(features, [float(s) for s in scale])
    keys = _corner_keys(nearest, axes, origin.tolist(), strides.tolist())
    del nearest, axes
    weights = weights.t().flatten()

    sorted_keys, order = keys.t().flatten().sort(stable=True)
    del keys
    vertex_keys, sorted_rows, lengths = torch.unique_consecutive(
        sorted_keys, return_inverse=True, return_counts=True
    )
    del sorted_keys
    rows = torch.empty_like(sorted_rows, dtype=torch.int32)
    rows[order] = sorted_rows.int()
    del sorted_rows
    splat_weights = weights[order]
    points = (order // (d + 1)).int()
    del order
    parts, vertices = _split(lengths, longest=math.isqrt(count - 1) + 1)
    del lengths
    return TorchLattice(
        rows=rows,
        weights=weights,
        simplices=torch.arange(count + 1, dtype=torch.int32, device=rows.device) * (d + 1),
        points=points,
        splat_weights=splat_weights,
        parts=parts,
        shares=torch.arange(parts.shape[0] - 1, dtype=torch.int32, device=rows.device),
        vertices=vertices,
        neighbours=_neighbours(vertex_keys, strides.tolist()),
    )


def _embed(features: Tensor, scale: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return simplex and place of the points, operation by operation as ``clipes.lattice`` does.

    Returns:
        nearest: (d + 1, P), the vertex of remainder 0, a multiple of d + 1 in each coordinate.
        axes: (d + 1, P) int64, along which axes the path from there leads around the simplex.
        weights: (d + 1, P), barycentric coordinates of the corners on that path.
    """
    d = len(scale)
    period, inverse = float(d + 1), float(np.float32(1) / np.float32(d + 1))
    # Elevate the points to the hyperplane (p. 5).
    elevated = features.new_empty(d + 1, features.shape[1])
    total = torch.zeros_like(features[0])
    for j in range(d, 0, -1):
        part = features[j - 1] * scale[j - 1]
        torch.sub(total, part * float(j), out=elevated[j])
        total = total + part
    elevated[0] = total

    # Round to coordinates that are multiples of d + 1.
    whole = (elevated * inverse).round_()
    nearest = whole * period
    offset = elevated - nearest

    # Rank the offsets; where the result is off the hyperplane, walk back to it.
    axis = torch.arange(d + 1, device=features.device)
    earlier = (axis[None] < axis[:, None])[..., None]
    ahead = torch.where(earlier, offset[None] >= offset[:, None], offset[None] > offset[:, None])
    place = ahead.sum(1) + whole.sum(0).long()
    del ahead, offset, whole
    shift = ((place < 0).long() - (place > d).long()) * (d + 1)
    rank = place + shift
    nearest += shift

    # Barycentric coordinates are differences between neighbours in the ranking (p. 10). The
    # order of the axes in it is the path from corner to corner.
    turn = d - rank
    axes = torch.empty_like(turn).scatter_(0, turn, axis[:, None].expand_as(turn))
    ranked = ((elevated - nearest) * inverse).gather(0, axes)
    weights = torch.cat([ranked[:1], ranked[1:] - ranked[:-1]])
    weights[0] += 1 - ranked[d]
    return nearest, axes, weights


def _corner_keys(nearest: Tensor, axes: Tensor, origin: list[int], strides: list[int]) -> Tensor:
    """Return the numbers of the corners: (d + 1, P) int64."""
    d = len(strides)
    steps = torch.tensor(_steps(strides), device=nearest.device)
    keys = torch.empty_like(axes)
    keys[0] = 0
    for i in range(d):
        keys[0] += (nearest[i].long() - origin[i]) * strides[i]
    for r in range(d):
        torch.sub(keys[r], steps[axes[r]], out=keys[r + 1])
    return keys


def _steps(strides: list[int]) -> list[int]:
    """Return how much larger a vertex' number is than that of the one after it, for each axis."""
    ones = sum(strides)
    return [*((len(strides) + 1) * stride - ones for stride in strides), -ones]


def _split(lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Cut lists that lie one after the other into parts.

    Args:
        lengths: (M,) int64, of the lists.
        longest: Length that no part exceeds.

    Returns:
        (Q + 1,) int32, where parts begin, and (M + 2,) int32, the first part of each list and of an
        empty one after them; each with the end of the last.
    """
    counts = (lengths + (longest - 1)) // longest
    lists = torch.repeat_interleave(counts)
    ends, part_ends = lengths.cumsum(0), counts.cumsum(0)
    number = torch.arange(lists.shape[0], device=lengths.device) - (part_ends - counts)[lists]
    parts = (ends - lengths)[lists] + number * longest
    begin = torch.zeros_like(ends[:1])
    return (
        torch.cat([parts, ends[-1:]]).int(),
        torch.cat([begin, part_ends, part_ends[-1:]]).int(),
    )


def _neighbours(keys: Tensor, strides: list[int]) -> tuple[Tensor, ...]:
    """Return the rows of each vertex' neighbours, by axis, from the vertices' sorted numbers."""
    count = keys.shape[0]
    nobody = torch.full_like(keys[:1], count, dtype=torch.int32)  # before and after the last row
    axes = []
    for step in _steps(strides):
        sides = []
        for away in (-step, step):
            wanted = keys + away
            row = torch.searchsorted(keys, wanted, out_int32=True)
            found = keys[row.clamp(max=count - 1)] == wanted
            sides += [torch.where(found, row, nobody), nobody]
        axes.append(torch.cat(sides))
    return tuple(axes)
