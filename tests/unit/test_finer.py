"""Maps on a finer grid, against the definition written out, and what they are for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clipes.maps.finer import finer_maps
from clipes.towers.taps import finer_grid


def written_out(
    maps: np.ndarray, tokens: np.ndarray, fine: np.ndarray, temperature: float
) -> np.ndarray:
    """Every fine patch by itself: joint bilateral upsampling, its distance in coarse patches."""
    classes, height, width = maps.shape
    down, across, _ = fine.shape
    found = np.zeros((classes, down, across))
    for y in range(down):
        for x in range(across):
            place = ((y + 0.5) * height / down - 0.5, (x + 0.5) * width / across - 0.5)
            total = 0.0
            for i in range(height):
                for j in range(width):
                    one, other = fine[y, x], tokens[i * width + j]
                    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
                    away = (place[0] - i) ** 2 + (place[1] - j) ** 2
                    weight = math.exp((cosine - 1) / temperature - away / (2 * 1.5**2))
                    found[:, y, x] += weight * maps[:, i, j]
                    total += weight
            found[:, y, x] /= total
    found -= found.min((1, 2), keepdims=True)
    surest = 2 * down * across // (height * width)
    for one in found:
        one /= np.mean(sorted(one.ravel())[-surest:])
    return np.minimum(found, 1)


@pytest.mark.parametrize("grid", [(6, 9), (7, 5), (4, 6)])
def test_it_is_joint_bilateral_upsampling(grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((2, 4, 6), np.float32)
    tokens = rng.standard_normal((24, 8)).astype(np.float32)
    fine = rng.standard_normal((*grid, 8)).astype(np.float32)
    got = finer_maps(maps, torch.from_numpy(tokens), torch.from_numpy(fine), 0.3)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, written_out(maps, tokens, fine, 0.3), atol=2e-5)


def test_an_edge_is_where_the_closer_look_sees_it() -> None:
    """An object that ends in the middle of a patch ends there on the finer grid."""
    left, right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    columns = torch.stack([left] * 2 + [left + right] + [right] * 3)  # the third shows both
    tokens = columns.repeat(4, 1)
    maps = np.tile(np.float32([1, 1, 0.5, 0, 0, 0]), (1, 4, 1))
    fine = torch.stack([left] * 5 + [right] * 7).repeat(8, 1, 1)
    got = finer_maps(maps, tokens, fine, 0.1)[0]
    assert (got[:, :5] > 0.8).all()
    assert (got[:, 5:] < 0.2).all()


def test_a_patch_that_stands_out_leaves_the_rest_of_a_small_object() -> None:
    """On the finer grid its peak is cut off, and what is half as sure stays an object."""
    maps = np.zeros((1, 8, 8), np.float32)
    maps[0, 3, 3:6] = (1, 0.45, 0.45)
    tokens = torch.eye(64)
    fine = tokens.view(8, 8, 64).repeat_interleave(2, 0).repeat_interleave(2, 1)
    got = finer_maps(maps, tokens, fine, 0.02)[0]
    assert got.max() == 1
    assert (got[6:8, 8:12] > 0.5).all()
    assert got[:5].max() < 1e-3


def test_sides_are_rounded() -> None:
    assert finer_grid((23, 31), 1.5) == (34, 46)
    assert finer_grid((1, 1), 1.5) == (2, 2)
