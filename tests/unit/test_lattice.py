"""The lattice against a slow one made of dictionaries, and against the exact Gaussian."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from clipes.errors import UsageError
from clipes.kernels.lattice import TILE, Lattice, build_lattice


def _build(points: np.ndarray) -> Lattice:
    """Return the lattice of (n, d) points, padded with some that must not count."""
    features = np.full((points.shape[1], -(-(len(points) + 1) // TILE) * TILE), 1e6, np.float32)
    features[:, : len(points)] = points.T
    return build_lattice(features, len(points))


def _filter(lattice: Lattice, values: np.ndarray) -> np.ndarray:
    padded = np.ones(len(lattice.weights), np.float32)
    padded[: len(values)] = values
    return lattice.filter(padded)[: len(values)]


def _slow_filter(points: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Filter in double precision, vertices being tuples: the definition, one point at a time."""
    d = points.shape[1]
    basis = np.zeros((d + 1, d))
    for i in range(d):
        basis[: i + 1, i] = 1
        basis[i + 1, i] = -(i + 1)
    basis *= np.sqrt(2 / 3) * (d + 1) / np.sqrt([(i + 1) * (i + 2) for i in range(d)])

    simplices = []
    table: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for point, value in zip(points @ basis.T, values, strict=True):
        # Of the points whose coordinates are congruent modulo d + 1, the nearest one of remainder 0
        # has the smallest offsets, sorted; the corners follow by taking d + 1 off, largest first.
        nearest = np.rint(point / (d + 1)) * (d + 1)
        offset = point - nearest
        for _ in range(round(abs(nearest.sum()) / (d + 1))):
            step = (d + 1) * np.sign(nearest.sum())
            worst = np.argmin(step * offset)
            nearest[worst] -= step
            offset[worst] += step
        order = np.argsort(-offset)
        descending = np.append(offset[order], offset[order[0]] - (d + 1))
        corners = {}
        for remainder in range(d + 1):
            corner = nearest + remainder
            corner[order[d + 1 - remainder :]] -= d + 1
            corners[tuple(corner.astype(int))] = 0.0
            gap = descending[d - remainder] - descending[d - remainder + 1]
            corners[tuple(corner.astype(int))] = gap / (d + 1)
        simplices.append(corners)
        for corner, weight in corners.items():
            table[corner] += weight * value
    for axis in range(d + 1):
        step = np.full(d + 1, -1)
        step[axis] = d
        table = defaultdict(
            float,
            {
                key: old + (table.get(tuple(key + step), 0) + table.get(tuple(key - step), 0)) / 2
                for key, old in table.items()
            },
        )
    return np.array([sum(w * table[c] for c, w in corners.items()) for corners in simplices])


@pytest.mark.parametrize(("d", "spread"), [(2, 3), (2, 30), (3, 3), (5, 1), (5, 4), (5, 40)])
def test_filter_is_the_slow_one(d, spread):
    # With the larger spreads most vertices belong to one point and the hash table has to grow.
    rng = np.random.default_rng(d * spread)
    points = rng.uniform(-spread, spread, (700, d)).astype(np.float32)
    values = rng.uniform(-1, 1, 700).astype(np.float32)
    lattice = _build(points)
    np.testing.assert_allclose(_filter(lattice, values), _slow_filter(points, values), atol=2e-4)


def test_filter_approximates_the_gaussian():
    y, x = np.mgrid[:24, :24] / 2
    points = np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)
    exact = np.exp(-((points[:, None] - points[None]) ** 2).sum(2) / 2)
    lattice = _build(points)
    mass = _filter(lattice, np.ones(len(points), np.float32))
    ratio = mass / exact.sum(1)
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=0.15)
    edge = (points.sum(1) > 12).astype(np.float32)
    np.testing.assert_allclose(
        _filter(lattice, edge) / mass, exact @ edge / exact.sum(1), atol=0.03
    )


def test_weights_are_barycentric_and_padding_has_none():
    points = np.random.default_rng(0).uniform(0, 5, (100, 5)).astype(np.float32)
    lattice = _build(points)
    assert lattice.weights[:100].min() > -1e-5
    np.testing.assert_allclose(lattice.weights[:100].sum(1), 1, atol=1e-5)
    assert (lattice.weights[100:] == 0).all()
    assert lattice.corners.max() == lattice.rows - 1


def test_lanes_do_not_mix():
    rng = np.random.default_rng(0)
    lattice = _build(rng.uniform(0, 4, (200, 3)).astype(np.float32))
    values = rng.random((8, len(lattice.weights)), dtype=np.float32)
    table, result = np.zeros(lattice.rows * 8, np.float32), np.zeros_like(values)
    lattice.splat(values, table)
    lattice.blur(table, 8)
    lattice.slice(table, result)
    np.testing.assert_allclose(result, [lattice.filter(v) for v in values], rtol=1e-6, atol=1e-7)


def test_splat_and_slice_are_adjoint():
    rng = np.random.default_rng(0)
    lattice = _build(rng.uniform(0, 4, (200, 4)).astype(np.float32))
    values = rng.random((1, len(lattice.weights)), dtype=np.float32)
    vertices = rng.random(lattice.rows, dtype=np.float32)
    splatted, sliced = np.zeros_like(vertices), np.zeros_like(values)
    lattice.splat(values, splatted)
    lattice.slice(vertices, sliced)
    assert np.vdot(splatted, vertices) == pytest.approx(np.vdot(values, sliced), rel=1e-5)


def test_too_wide_a_spread_is_an_error():
    points = np.eye(5, dtype=np.float32) * 1e6
    with pytest.raises(UsageError, match="too narrow"):
        _build(points)
