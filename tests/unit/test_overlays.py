from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.report.overlays import (
    CONFIDENCE,
    HEAT,
    class_colour,
    heat_overlay,
    mask_overlay,
    ramp,
    shrink,
)
from clipes.types import IGNORE

RNG = np.random.default_rng(3)
IMAGE = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def test_classes_that_may_meet_have_colours_that_differ() -> None:
    colours = np.array([class_colour(index) for index in range(20)], float)
    closest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2))
    assert closest > 30
    assert (colours.max(1) > 100).all(), "no class is nearly black, as in VOC's palette"


@pytest.mark.parametrize("colours", [HEAT, CONFIDENCE])
def test_a_ramp_passes_through_its_colours_and_is_straight_between(colours) -> None:
    for value, colour in colours:
        assert tuple(ramp(colours, np.array(value))) == colour
    for (low, a), (high, b) in itertools.pairwise(colours):
        middle = ramp(colours, np.array((low + high) / 2)).astype(float)
        np.testing.assert_allclose(middle, (np.array(a) + b) / 2, atol=1)


def test_the_colour_of_confidence_jumps_at_the_threshold() -> None:
    below, above = ramp(CONFIDENCE, np.array([CONFIDENCE_THRESHOLD - 0.01, CONFIDENCE_THRESHOLD]))
    assert below[0] > below[2], "warm"
    assert above[0] < above[2], "cold"


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 100))
def test_shrinking_bounds_the_side_and_invents_no_label(height: int, width: int, side: int) -> None:
    mask = np.random.default_rng(height * 91 + width).choice(
        np.array([0, 7, IGNORE], np.uint8), (height, width)
    )
    small = shrink(mask, side)
    assert max(small.shape) == min(side, max(height, width))
    assert set(np.unique(small)) <= {0, 7, IGNORE}
    if max(height, width) <= side:
        np.testing.assert_array_equal(small, mask)


def test_heat_hides_the_image_where_it_is_hot_and_only_there() -> None:
    map_ = np.zeros((4, 6), np.float32)
    map_[:, 3:] = 1
    hot = heat_overlay(IMAGE, map_).astype(float)
    nothing = heat_overlay(IMAGE, np.zeros((4, 6), np.float32)).astype(float)
    assert hot.shape == IMAGE.shape
    np.testing.assert_array_equal(hot[:, :24], nothing[:, :24])
    np.testing.assert_allclose(hot[:, 36:], np.broadcast_to(HEAT[-1][1], (40, 24, 3)), atol=40)
    # What shows through without heat is the image, darker and with little colour.
    assert np.ptp(nothing, axis=-1).max() <= 0.3 * 0.7 * 255 + 1
    assert np.corrcoef(nothing.mean(-1).ravel(), IMAGE.mean(-1).ravel())[0, 1] > 0.99


def test_masks_are_tinted_inside_outlined_at_the_edge_and_faded_outside() -> None:
    grey = np.full((40, 60, 3), 128, np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 10:30] = 3
    mask[10:30, 30:50] = 8
    picture = mask_overlay(grey, mask).astype(float)
    background = picture[0, 0]
    assert (picture[mask == 0] == background).all()
    for label, inside, edge in ((3, (20, 18), (20, 29)), (8, (20, 42), (20, 30))):
        colour = np.array(class_colour(label - 1), float)
        np.testing.assert_allclose(picture[inside], 0.65 * 128 + 0.35 * colour, atol=1)
        np.testing.assert_allclose(picture[edge], 0.9 * colour + 0.1 * picture[inside], atol=2)


def test_what_is_ignored_is_hatched() -> None:
    black = np.zeros((40, 60, 3), np.uint8)
    picture = mask_overlay(black, np.full((40, 60), IGNORE, np.uint8))
    values, counts = np.unique(picture, return_counts=True)
    assert values.tolist() == [0, 153]
    assert counts[0] == counts[1]


def test_a_label_that_fills_the_image_has_no_outline_at_its_border() -> None:
    picture = mask_overlay(np.full((20, 20, 3), 99, np.uint8), np.full((20, 20), 5, np.uint8))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) == 1
