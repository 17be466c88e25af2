"""The linear discriminant against its textbook form, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipes.config import CamParams, PatchParams
from clipes.maps.affinity import Walk, sinkhorn
from clipes.maps.looks import Looks, Statistics, final_maps, image_statistics
from clipes.maps.patches import Evidence, first_maps, strong_patches

PARAMS, PATCHES = CamParams(box_threshold=0.0), PatchParams(weak=0.5)
GRID, WIDTH, CLASSES = (5, 6), 7, 4


def evidence(seed: int, classes: int = 2) -> Evidence:
    rng = np.random.default_rng(seed)
    count = GRID[0] * GRID[1]
    attention = torch.from_numpy(rng.random((count, count), dtype=np.float32)) + 40 * torch.eye(
        count
    )
    words = torch.from_numpy(rng.random((1 + classes, count), dtype=np.float32))
    return Evidence(
        torch.from_numpy(rng.standard_normal((count, WIDTH)).astype(np.float32)),
        rng.random((classes, *GRID), dtype=np.float32),
        words.softmax(0).log(),
        sinkhorn(attention, 3),
    )


def statistics(seeds: range, labels: tuple[int, ...] = (2, 0)) -> Statistics:
    total = Statistics.empty(CLASSES, WIDTH)
    for seed in seeds:
        total.add(image_statistics(evidence(seed), labels, CLASSES, PARAMS, PATCHES))
    return total


def test_sums_against_one_patch_at_a_time():
    labels = (2, 0)
    sums, mass = np.zeros((1 + CLASSES, WIDTH)), np.zeros(1 + CLASSES)
    moment = np.zeros((WIDTH, WIDTH))
    for seed in range(6):
        given = evidence(seed)
        chosen = strong_patches(first_maps(given, PARAMS), PATCHES)
        assert all(mask.any() for mask in chosen), "the example shows nothing"
        for row, mask in zip((0, 3, 1), chosen, strict=True):
            for patch in np.flatnonzero(mask):
                x = given.activations[patch].double().numpy()
                weight = 1 / np.sqrt(mask.sum())
                sums[row] += weight * x
                mass[row] += weight
                moment += weight * np.outer(x, x)
    got = statistics(range(6), labels)
    np.testing.assert_allclose(got.sums, sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.mass, mass)
    np.testing.assert_allclose(got.moment, moment, rtol=1e-5, atol=1e-5)


def test_parts_add_up_to_the_whole():
    whole, first = statistics(range(8)), statistics(range(5))
    first.add(statistics(range(5, 8)))
    for name in ("sums", "mass", "moment"):
        np.testing.assert_allclose(getattr(first, name), getattr(whole, name), rtol=1e-9)


def test_the_covariance_is_that_within_classes():
    rng = np.random.default_rng(0)
    found = Statistics.empty(CLASSES, WIDTH)
    rows, weights, points = rng.integers(0, 1 + CLASSES, 400), rng.random(400), []
    for row, weight in zip(rows, weights, strict=True):
        x = rng.standard_normal(WIDTH) * np.arange(1, 1 + WIDTH) + 10 * row
        points.append(x)
        found.sums[row] += weight * x
        found.mass[row] += weight
        found.moment[:] += weight * np.outer(x, x)
    looks = Looks.of(found, PATCHES)
    means = np.stack([np.average(np.array(points)[rows == c], 0, weights[rows == c])
                      for c in range(1 + CLASSES)])  # fmt: skip
    centred = np.array(points) - means[rows]
    within = np.cov(centred.T, aweights=weights, ddof=0)
    within += PATCHES.ridge * np.trace(within) / WIDTH * np.eye(WIDTH)
    np.testing.assert_allclose(looks.precision @ within, np.eye(WIDTH), atol=1e-6)


@pytest.mark.parametrize("own", [False, True])
def test_final_maps_against_gaussian_densities(own):
    """The discriminant is the log-density of Gaussians of one covariance, but for a constant."""
    labels, given = (2, 0), evidence(99)
    others = statistics(range(10))
    looks = Looks.of(others, PATCHES)
    mine = image_statistics(given, labels, CLASSES, PARAMS, PATCHES) if own else None
    got = final_maps(given, labels, looks, mine, PARAMS, PATCHES)
    logits = []
    for row, column in zip((0, 3, 1), given.log_words.double().numpy(), strict=True):
        total = others.sums[row] + (mine.sums[row] if own else 0)
        mean = total / (others.mass[row] + (mine.mass[row] if own else 0))
        difference = given.activations.double().numpy() - mean
        density = -0.5 * np.einsum("nd,de,ne->n", difference, looks.precision, difference)
        logits.append(PATCHES.looks_weight * density + PATCHES.words_weight * column)
    probabilities = torch.tensor(np.array(logits)).softmax(0).numpy()[1:]
    low, high = probabilities.min(1, keepdims=True), probabilities.max(1, keepdims=True)
    sources = (probabilities - low) / (high - low)
    spread = given.walk.step(torch.from_numpy(sources.T.astype(np.float32))).T.numpy()
    low, high = spread.min(1, keepdims=True), spread.max(1, keepdims=True)
    expected = ((spread - low) / (high - low)).reshape(got.shape)
    np.testing.assert_allclose(got, expected, atol=2e-4)
    without = final_maps(given, labels, looks, None, PARAMS, PATCHES)
    assert (np.abs(got - without).max() > 1e-3) == own


def test_a_class_never_seen_beyond_doubt_keeps_its_first_maps():
    given = evidence(5)
    looks = Looks.of(statistics(range(10)), PATCHES)
    got = final_maps(given, (1, 0), looks, None, PARAMS, PATCHES)
    np.testing.assert_array_equal(got, first_maps(given, PARAMS))
    # Unless the image itself shows it.
    own = image_statistics(given, (1, 0), CLASSES, PARAMS, PATCHES)
    assert np.abs(final_maps(given, (1, 0), looks, own, PARAMS, PATCHES) - got).max() > 0.01


def test_nothing_to_go_by():
    assert Looks.of(Statistics.empty(CLASSES, WIDTH), PATCHES) is None
    same = Statistics.empty(CLASSES, WIDTH)
    same.sums[0], same.mass[0], same.moment[:] = 1.0, 1.0, 1.0  # one patch has no variance
    assert Looks.of(same, PATCHES) is None
    given = evidence(5)
    got = final_maps(given, (1, 0), None, None, PARAMS, PATCHES)
    np.testing.assert_array_equal(got, first_maps(given, PARAMS))


def test_looks_find_what_words_miss():
    """Half of each object fits its word; the other half only looks like it."""
    rng = np.random.default_rng(1)
    height, width = GRID
    count = height * width
    means = 6 * rng.standard_normal((2, WIDTH))
    total = Statistics.empty(1, WIDTH)
    pictures = []
    for _ in range(10):
        shown = np.zeros(GRID, int)
        shown[1:4, 1:5] = 1
        typical = np.zeros(GRID, np.float32)
        typical[1:4, 1:3] = 1
        x = means[shown.ravel()] + rng.standard_normal((count, WIDTH))
        fit = np.clip(np.stack([1 - typical, typical]).reshape(2, -1), 0.2, 0.8)
        walk = Walk(torch.eye(count), torch.ones(count), torch.ones(count))
        pictures.append(
            Evidence(
                torch.from_numpy(x.astype(np.float32)),
                typical[None],
                torch.from_numpy(np.log(fit).astype(np.float32)),
                walk,
            )
        )
        total.add(image_statistics(pictures[-1], (0,), 1, PARAMS, PATCHES))
    looks = Looks.of(total, PATCHES)
    (found,) = final_maps(pictures[0], (0,), looks, None, PARAMS, PATCHES)
    (first,) = first_maps(pictures[0], PARAMS)
    missed = np.s_[1:4, 3:5]
    assert first[missed].max() < 0.1
    assert found[missed].mean() > first[missed].mean() + 0.1
