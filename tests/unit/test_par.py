"""Pixel-adaptive refinement against a loop over pixels and neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clipes.masks.par import DILATIONS, neighbour_weights, neighbours, par

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (7, 9)


def picture(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(seed))


def literal_weights(image: np.ndarray, y: int, x: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return the weights of a pixel's 48 neighbours, and where these are."""
    height, width = image.shape[1:]
    places, distances = [], []
    for step in DILATIONS:
        for dy in (-step, 0, step):
            for dx in (-step, 0, step):
                if dy or dx:
                    places.append((min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)))
                    distances.append(math.hypot(dy, dx))
    colours = np.array([image[:, r, c] for r, c in places])  # (48, 3)
    spread = colours.std(0, ddof=1)
    a = -((np.abs(colours - image[:, y, x]) / (spread + 1e-8) / 0.3) ** 2).mean(1)
    b = -((np.array(distances) / (np.std(distances, ddof=1) + 1e-8) / 0.3) ** 2)
    return softmax(a) + 0.01 * softmax(b), places


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def test_distances_deviate_as_published() -> None:
    distances = [math.hypot(*offset) for offset in neighbours()]
    assert len(distances) == 48
    assert np.std(distances, ddof=1) == pytest.approx(9.9003, abs=1e-4)


@pytest.mark.parametrize("image", [picture(), torch.zeros(3, *SIZE)], ids=["noise", "flat"])
def test_weights_sum_to_a_little_more_than_one(image: torch.Tensor) -> None:
    weights = neighbour_weights(image)
    assert weights.shape == (48, *SIZE)
    torch.testing.assert_close(weights.sum(0), torch.full(SIZE, 1.01))


def test_two_iterations_equal_a_loop() -> None:
    image = picture()
    maps = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(1))
    pixels = image.double().numpy()
    expected = maps.double().numpy()
    for _ in range(2):
        before, expected = expected, np.zeros_like(expected)
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                for weight, (r, c) in zip(*literal_weights(pixels, y, x), strict=True):
                    expected[:, y, x] += weight * before[:, r, c]
    got = par(image, maps, iterations=2)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4)


def test_scores_stop_at_an_edge_and_fill_what_is_alike() -> None:
    image = torch.zeros(3, 40, 40)
    image[:, :, 20:] = 1.0
    maps = torch.zeros(1, 40, 40)
    maps[0, 15:25, 2:8] = 1.0
    got = par(image, maps)[0]
    assert got[:, :20].mean() > 10 * got[:, 20:].mean()
    assert bool((got[:, :20] > 0).all())
