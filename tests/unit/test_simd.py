"""The vector operations against numpy, and where compiled functions are kept."""

from __future__ import annotations

import numpy as np
import pytest

from clipes.kernels import simd
from clipes.kernels.simd import (
    add_lanes,
    exp,
    fill,
    fma,
    highest_lane,
    jit,
    less,
    load,
    load_strided,
    maximum,
    rint,
    store,
    store_strided,
    transpose_tile,
    where_equal,
    width,
)


@jit
def _compute(a, b, out, lanes):
    n = len(lanes)
    for start in range(0, a.size, n):
        x, y = load(a, start, lanes), load(b, start, lanes)
        results = (
            (x + y) * x / y - y,
            fma(x, y, x),
            rint(x),
            maximum(x, y),
            less(x, y),
            where_equal(rint(x), rint(y), y),
            fill(np.float32(3), lanes),
            exp(fill(np.float32(0), lanes) - x * x),
        )
        for number, result in enumerate(results):
            store(out, number * a.size + start, result)


@pytest.mark.parametrize("lanes", [1, 2, 8, 64])
def test_operations_are_those_of_numpy(lanes):
    rng = np.random.default_rng(lanes)
    a, b = rng.uniform(-8, 8, (2, 256)).astype(np.float32)
    a[:9] = np.arange(-2, 2.5, 0.5)
    b[9:20] = a[9:20]
    out = np.full((8, 256), np.nan, np.float32)
    _compute(a, b, out.ravel(), width(lanes))
    expected = [
        (a + b) * a / b - b,
        a * b + a,
        np.rint(a),
        np.maximum(a, b),
        a < b,
        np.where(np.rint(a) == np.rint(b), b, 0),
        np.full_like(a, 3),
        np.where(-a * a < -50, 0, np.exp(-a * a)),
    ]
    np.testing.assert_allclose(out, np.stack(expected), rtol=1e-5, atol=1e-6)


@jit
def _exp(a, lanes):
    for start in range(0, a.size, len(lanes)):
        store(a, start, exp(load(a, start, lanes)))


def test_exp_is_accurate_and_never_denormal():
    a = np.linspace(-50, 0, 2**16, dtype=np.float32)
    result = a.copy()
    _exp(result, width(16))
    np.testing.assert_allclose(result, np.exp(a.astype(np.float64)), rtol=3e-7)
    low = np.array([-50.001, -87, -88, -104, -1e4, -1e30, -np.inf, -51], np.float32)
    _exp(low, width(8))
    assert (low == 0).all()


@jit
def _transpose(a, out, stride, lanes):
    n = len(lanes)
    for column in range(stride):
        value = load_strided(a, column, stride, lanes)
        store(out, column * n, value)
        store_strided(a, column, stride, value + value)


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
def test_strided_access_transposes(lanes):
    a = np.random.default_rng(0).random((lanes, 11), dtype=np.float32)
    doubled, out = a.copy(), np.empty((11, lanes), np.float32)
    _transpose(doubled.ravel(), out.ravel(), 11, width(lanes))
    np.testing.assert_array_equal(out, a.T)
    np.testing.assert_array_equal(doubled, 2 * a)


def test_functions_compile_where_nothing_can_be_kept():
    # A function that comes from no file has no place in any cache, as with read-only folders.
    with pytest.raises(RuntimeError, match="cannot cache"):
        simd.numba.njit(cache=True)(eval("lambda x: x + 1"))
    assert jit(eval("lambda x: x + 1"))(2) == 3


@jit
def _across(a, lanes):
    vector = load(a, 0, lanes)
    return add_lanes(vector), highest_lane(vector)


@pytest.mark.parametrize("lanes", [1, 2, 8, 64])
def test_sums_and_maxima_across_lanes(lanes):
    a = np.random.default_rng(lanes).uniform(-8, 8, lanes).astype(np.float32)
    total, highest = _across(a, width(lanes))
    np.testing.assert_allclose(total, a.sum(dtype=np.float64), rtol=1e-5)
    assert highest == a.max()


@jit
def _transpose_square(a, b, columns, stride, lanes):
    transpose_tile(a, 1, columns, b, 2, stride, lanes)


@pytest.mark.parametrize("lanes", [1, 2, 8, 16])
@pytest.mark.parametrize("cut", [0, 1])
def test_a_square_is_transposed(lanes, cut):
    a = np.random.default_rng(lanes).uniform(size=(lanes, lanes + 3)).astype(np.float32)
    stride = max(1, lanes - cut)
    b = np.full(2 + lanes * stride + cut, np.nan, np.float32)
    _transpose_square(a.ravel(), b, lanes + 3, stride, width(lanes))
    got = b[2 : 2 + lanes * stride].reshape(lanes, stride)
    np.testing.assert_array_equal(got, a[:stride, 1 : 1 + lanes].T)
    assert np.isnan(b[:2]).all()
