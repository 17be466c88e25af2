"""The nearest regions of other images, against the definition written out, and what they mend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipes.config import NeighbourParams
from clipes.maps.neighbours import Neighbours, Regions, regions_of

PARAMS = NeighbourParams(regions=4, neighbours=3)
CPU = torch.device("cpu")


def tokens(seed: int, count: int = 30, width: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, width))).float()


def maps(seed: int, classes: int, grid: tuple[int, int] = (5, 6)) -> np.ndarray:
    found = np.random.default_rng(seed).random((classes, *grid), np.float32)
    low = found.min((1, 2), keepdims=True)
    return (found - low) / (found.max((1, 2), keepdims=True) - low)


def some_regions() -> Regions:
    labels = ((0,), (0, 2), (1,), (0,), (2,))  # no patch of the third says background
    parts = [
        regions_of(f"image {k}", tokens(k), maps(k, len(some)) ** 0.1, some, 3, PARAMS)
        for k, some in enumerate(labels)
    ]
    return Regions.joined(parts)


def test_regions_share_out_an_image() -> None:
    rows, found = tokens(0), maps(0, 2)
    regions = regions_of("one", rows, found, (2, 0), 3, PARAMS)
    assert set(regions.owners) == {"one"}
    assert len(regions.owners) == len(regions.centres) <= PARAMS.regions
    centres = regions.centres.float().numpy()
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, atol=2e-3)
    # Each patch belongs to the region it is nearest to, and a region shows what its patches show.
    unit = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
    nearest = (unit @ centres.T).argmax(1)
    parts = np.concatenate([1 - found.max(0, keepdims=True), found]).reshape(3, -1) ** 3
    parts /= parts.sum(0)
    for region in range(len(centres)):
        mean = parts[:, nearest == region].mean(1)
        got = regions.shares[region].float().numpy()
        np.testing.assert_allclose(got, [mean[0], mean[2], 0, mean[1]], atol=2e-3)


def test_an_image_of_fewer_patches_than_regions_has_a_region_a_patch() -> None:
    regions = regions_of("small", tokens(0, 2), maps(0, 1, (1, 2)), (0,), 3, PARAMS)
    assert regions.centres.shape == (2, 8)


@pytest.mark.parametrize("owner", ["image 1", "of no one"])
def test_votes_are_those_of_the_nearest_regions_of_others(owner: str) -> None:
    regions, labels = some_regions(), (0, 2)
    got = Neighbours(regions, CPU, PARAMS).votes(owner, tokens(1), labels).numpy()
    centres, shares = regions.centres.float().numpy(), regions.shares.float().numpy()[:, [0, 1, 3]]
    asked = [k for k in range(len(centres)) if regions.owners[k] != owner and shares[k].sum() > 0.5]
    assert 0 < len(asked) < len(centres)
    total = shares[asked].sum(0)
    expected = []
    for row in tokens(1).numpy():
        alike = sorted((float(row @ centres[k] / np.linalg.norm(row)), k) for k in asked)[-3:]
        weights = np.exp([(cosine - 1) / PARAMS.temperature for cosine, _ in alike])
        vote = (weights / weights.sum()) @ shares[[k for _, k in alike]]
        expected.append(vote / np.sqrt(total / total.sum()))
    found = np.array(expected)
    found = found + 0.02 * found.mean() + 1e-4
    np.testing.assert_allclose(got, (found / found.sum(1, keepdims=True)).T, atol=2e-3)


def test_an_image_alone_is_told_nothing() -> None:
    regions = regions_of("alone", tokens(0), maps(0, 1), (0,), 3, PARAMS)
    neighbours = Neighbours(regions, CPU, PARAMS)
    votes = neighbours.votes("alone", tokens(0), (0,))
    torch.testing.assert_close(votes, torch.full((2, 30), 0.5))
    strong = [np.arange(30) < 5]
    assert neighbours.contradict("alone", strong, votes, (0,)) == []


WATER, BOAT = torch.eye(8)[0], torch.eye(8)[1]


def harbour(boats: int) -> Regions:
    """Return the regions of images in which boats are at the left, water at the right."""
    found = np.repeat(np.float32([[1, 1, 0, 0]]), 3, axis=0)[None]
    rows = torch.stack([BOAT, BOAT, WATER, WATER]).repeat(3, 1)
    parts = [
        regions_of(str(k), rows + tokens(k, 12) / 50, found, (0,), 1, PARAMS) for k in range(boats)
    ]
    return Regions.joined(parts)


@pytest.mark.parametrize(("boats", "mended"), [(6, [0]), (PARAMS.least_images, [])])
def test_a_map_where_others_see_background_is_contradicted_if_enough_others_know(
    boats: int, mended: list[int]
) -> None:
    neighbours = Neighbours(harbour(boats), CPU, PARAMS)
    rows = torch.stack([WATER] * 24 + [BOAT] * 6)
    votes = neighbours.votes("0", rows, (0,))
    assert votes[1, 24:].min() > 0.9 > 0.1 > votes[1, :24].max()
    on_water, on_boat = np.arange(30) < 24, np.arange(30) >= 24
    assert neighbours.contradict("0", [on_water], votes, (0,)) == mended
    assert neighbours.contradict("0", [on_boat], votes, (0,)) == []
    assert neighbours.contradict("0", [np.zeros(30, bool)], votes, (0,)) == []


def test_where_no_one_sees_the_class_the_map_stays() -> None:
    neighbours = Neighbours(harbour(6), CPU, PARAMS)
    rows = torch.stack([WATER] * 30)
    votes = neighbours.votes("0", rows, (0,))
    assert neighbours.contradict("0", [np.arange(30) < 24], votes, (0,)) == []
