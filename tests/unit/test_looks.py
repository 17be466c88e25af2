"""The linear discriminant against its textbook form, and what must not change it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipes.config import CamParams, PatchParams
from clipes.maps.affinity import sinkhorn
from clipes.maps.evidence import PatchEvidence, first_maps
from clipes.maps.looks import Looks, Statistics, class_means, shown_by
from clipes.maps.looks import statistics_of as of_patches
from clipes.maps.maker import CamMaker, EncodedImage
from clipes.maps.patches import strong_patches
from clipes.towers.side_by_side import Towers
from clipes.words.features import TextFeatures
from tests.unit.clip_support import small_backbone

PATCHES = PatchParams(weak=0.5)
PARAMS = CamParams(box_threshold=0.0, patches=PATCHES)
GRID, WIDTH, CLASSES = (5, 6), 7, 4


@pytest.fixture(scope="module")
def maker() -> CamMaker:
    """Only makes maps of what is seen: no image is encoded."""
    names, vectors = ("c", "d", "a", "b"), np.eye(CLASSES, 32, dtype=np.float32)
    text = TextFeatures(names, ("x",), vectors, vectors[:1], "made up")
    return CamMaker(Towers(small_backbone()), text, PARAMS)


def image(given: PatchEvidence, labels: tuple[int, ...]) -> EncodedImage:
    """Labels in the order of their names, as the rows of the evidence."""
    return EncodedImage(labels, (80, 96), given)


def evidence(seed: int, classes: int = 2) -> PatchEvidence:
    rng = np.random.default_rng(seed)
    count = GRID[0] * GRID[1]
    attention = torch.from_numpy(rng.random((count, count), dtype=np.float32)) + 40 * torch.eye(
        count
    )
    words = torch.from_numpy(rng.random((1 + classes, count), dtype=np.float32))
    return PatchEvidence(
        rng.random((classes, *GRID), dtype=np.float32),
        attention,
        {"clip": torch.from_numpy(rng.standard_normal((count, WIDTH)).astype(np.float32))},
        words.softmax(0).log(),
    )


def statistics_of(given: PatchEvidence, labels: tuple[int, ...] = (2, 0)) -> Statistics:
    shown = shown_by(first_maps(given, PARAMS), labels, PATCHES)
    return of_patches(given.tokens["clip"], shown, CLASSES)


def statistics(seeds: range, labels: tuple[int, ...] = (2, 0)) -> Statistics:
    total = Statistics.empty(CLASSES, WIDTH)
    for seed in seeds:
        total.add(statistics_of(evidence(seed), labels))
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
                x = given.tokens["clip"][patch].double().numpy()
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


def scaled(maps: np.ndarray) -> np.ndarray:
    low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
    return (maps - low) / (high - low)


@pytest.mark.parametrize("own", [False, True])
def test_final_maps_against_gaussian_densities(maker, own):
    """The discriminant is the log-density of Gaussians of one covariance, but for a constant."""
    labels, given = (2, 0), evidence(99)
    others = statistics(range(10))
    looks = Looks.of(others, PATCHES)
    mine = statistics_of(given)
    informed = maker.with_looks(looks)
    got = informed.maps(image(given, labels), in_statistics=not own).maps
    logits = []
    for row, column in zip((0, 3, 1), given.log_words.double().numpy(), strict=True):
        total = others.sums[row] + (mine.sums[row] if own else 0)
        mean = total / (others.mass[row] + (mine.mass[row] if own else 0))
        difference = given.tokens["clip"].double().numpy() - mean
        density = -0.5 * np.einsum("nd,de,ne->n", difference, looks.precision, difference)
        logits.append(PATCHES.looks_weight * density + PATCHES.words_weight * column)
    sources = scaled(torch.tensor(np.array(logits)).softmax(0).numpy()[1:])
    walk = sinkhorn(given.attention, 3)
    spread = walk.step(torch.from_numpy(sources.T.astype(np.float32))).T.numpy()
    np.testing.assert_allclose(got, scaled(spread).reshape(got.shape), atol=2e-4)
    without = informed.maps(image(given, labels), in_statistics=True).maps
    assert (np.abs(got - without).max() > 1e-3) == own


def test_a_class_never_seen_beyond_doubt_keeps_its_first_maps(maker):
    given = image(evidence(5), (0, 1))
    informed = maker.with_looks(Looks.of(statistics(range(10)), PATCHES))
    got = informed.maps(given, in_statistics=True).maps
    np.testing.assert_array_equal(got, first_maps(given.evidence, PARAMS))
    # Unless the image itself shows it.
    assert np.abs(informed.maps(given).maps - got).max() > 0.01


def test_nothing_to_go_by(maker):
    assert Looks.of(Statistics.empty(CLASSES, WIDTH), PATCHES) is None
    same = Statistics.empty(CLASSES, WIDTH)
    same.sums[0], same.mass[0], same.moment[:] = 1.0, 1.0, 1.0  # one patch has no variance
    assert Looks.of(same, PATCHES) is None
    given = image(evidence(5), (0, 1))
    for informed in (maker, maker.with_looks(None)):
        got = informed.maps(given).maps
        np.testing.assert_array_equal(got, first_maps(given.evidence, PARAMS))


def test_means_are_those_of_the_run_with_a_share_for_the_images_own_background():
    run = Statistics(np.arange(10.0).reshape(5, 2), np.array([2.0, 4, 1, 1, 1]), np.eye(2))
    looks = Looks(run.sums, run.mass, np.eye(2))
    own = Statistics(np.full((5, 2), 6.0), np.array([3.0, 0, 0, 2, 0]), np.zeros((2, 2)))
    own.sums[own.mass == 0] = 0
    plain = np.stack([run.sums[k] / run.mass[k] for k in (0, 3, 1)])

    def means(**how: object) -> np.ndarray:
        return class_means(
            looks, (2, 0), own, **{"in_statistics": True, "own_background": 0.0} | how
        )

    np.testing.assert_allclose(means(), plain)
    mixed = [0.75 * plain[0] + 0.25 * 2, plain[1], plain[2]]
    np.testing.assert_allclose(means(own_background=0.25), np.stack(mixed))
    np.testing.assert_allclose(means(own_background=1.0), [[2, 2], plain[1], plain[2]])
    added = [(run.sums[k] + own.sums[k]) / (run.mass[k] + own.mass[k]) for k in (0, 3, 1)]
    np.testing.assert_allclose(means(in_statistics=False), np.stack(added))
    share = 0.25 * np.array([2.0, 2.0]) + 0.75 * added[0]
    both = means(in_statistics=False, own_background=0.25)
    np.testing.assert_allclose(both, np.stack([share, *added[1:]]))
    nowhere = Looks(run.sums, np.array([2.0, 0, 1, 1, 1]), np.eye(2))
    assert class_means(nowhere, (2, 0), own, in_statistics=True, own_background=1.0) is None


def test_looks_find_what_words_miss(maker):
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
        pictures.append(
            PatchEvidence(
                typical[None],
                torch.eye(count),
                {"clip": torch.from_numpy(x.astype(np.float32))},
                torch.from_numpy(np.log(fit).astype(np.float32)),
            )
        )
        shown = shown_by(first_maps(pictures[-1], PARAMS), (0,), PATCHES)
        total.add(of_patches(pictures[-1].tokens["clip"], shown, 1))
    informed = maker.with_looks(Looks.of(total, PATCHES))
    (found,) = informed.maps(image(pictures[0], (0,)), in_statistics=True).maps
    (first,) = first_maps(pictures[0], PARAMS)
    missed = np.s_[1:4, 3:5]
    assert first[missed].max() < 0.1
    assert found[missed].mean() > first[missed].mean() + 0.1


def test_maps_that_are_empty_teach_nothing_of_the_background_either():
    shown = shown_by(np.zeros((2, 1, 1), np.float32), (0, 3), PATCHES)
    assert {value: patches.tolist() for value, patches in shown.items()} == {
        0: [False],
        1: [False],
        4: [False],
    }
