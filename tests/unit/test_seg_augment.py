"""Image, mask and confidence stay aligned through every random change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clipes.config import IMAGENET_MEAN, IMAGENET_STD, SegmenterPreset
from clipes.seg.augment import Example, augment, crop, normalise, recolour, scale
from clipes.types import IGNORE

PRESET = SegmenterPreset("test", crop=96, scale=(0.5, 2.0), colour=0.0)
CODES = np.array([[40, 40, 40], [220, 60, 60], [60, 220, 60], [60, 60, 220]], np.uint8)
SURE = np.array([0.2, 0.4, 0.6, 0.8], np.float32)


def example(height: int = 90, width: int = 130) -> Example:
    """An example whose colour and confidence follow from its label."""
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 4, (height // 15 + 1, width // 15 + 1))
    mask = np.kron(blocks, np.ones((15, 15), np.int64))[:height, :width].astype(np.uint8)
    return CODES[mask], mask, SURE[mask]


@pytest.mark.parametrize("seed", range(20))
def test_the_three_stay_aligned(seed: int) -> None:
    image, mask, confidence = augment(example(), PRESET, np.random.default_rng(seed))
    assert image.shape == (96, 96, 3)
    assert mask.shape == confidence.shape == (96, 96)
    inside = mask != IGNORE
    assert inside.any()
    # A pixel's confidence is exactly its label's; its colour too, but where two blocks blend.
    assert np.array_equal(confidence[inside], SURE[mask[inside]])
    assert (confidence[~inside] == 0).all()
    assert (image[~inside] == np.rint(np.multiply(IMAGENET_MEAN, 255))).all()
    distance = np.abs(image[inside].astype(int)[:, None] - CODES[None].astype(int)).sum(-1)
    assert (distance.argmin(1) == mask[inside]).mean() > 0.97


def test_chance_decides_scale_place_and_mirroring() -> None:
    views = [augment(example(), PRESET, np.random.default_rng(seed))[1] for seed in range(10)]
    assert len({view.tobytes() for view in views}) == 10
    again = augment(example(), PRESET, np.random.default_rng(3))[1]
    assert np.array_equal(again, views[3])


def test_half_the_views_are_mirrored() -> None:
    preset = replace(PRESET, scale=(1.0, 1.0), crop=90)
    image = np.zeros((90, 90, 3), np.uint8)
    mask = np.zeros((90, 90), np.uint8)
    mask[:, :45] = 1
    sure = np.ones((90, 90), np.float32)
    views = [augment((image, mask, sure), preset, np.random.default_rng(s))[1] for s in range(200)]
    assert 70 < sum(int(view[0, 0] == 0) for view in views) < 130


def test_scaling_keeps_labels_and_centres() -> None:
    image, mask, sure = scale(example(), 0.5)
    assert image.shape == (45, 65, 3)
    full = example()[1]
    corners = np.stack([full[0::2, 0::2], full[1::2, 0::2], full[0::2, 1::2], full[1::2, 1::2]])
    assert (corners == mask).any(0).all()
    assert np.array_equal(sure, SURE[mask])
    one = scale(example(), 1.0)
    assert all(np.array_equal(a, b) for a, b in zip(one, example(), strict=True))


def test_a_crop_is_a_part_or_is_padded() -> None:
    image, mask, sure = crop(example(), 50, np.random.default_rng(0))
    full_image, full_mask, _ = example()
    places = [
        (y, x)
        for y in range(41)
        for x in range(81)
        if np.array_equal(full_mask[y : y + 50, x : x + 50], mask)
    ]
    assert any(np.array_equal(full_image[y : y + 50, x : x + 50], image) for y, x in places)
    _, padded, sure = crop(example(), 200, np.random.default_rng(0))
    assert (padded != IGNORE).sum() == full_mask.size
    assert (sure > 0).sum() == full_mask.size


def test_colours_change_within_bounds_and_nothing_else_does() -> None:
    plain = augment(example(), PRESET, np.random.default_rng(1))
    coloured = augment(example(), replace(PRESET, colour=0.3), np.random.default_rng(1))
    assert np.array_equal(plain[1], coloured[1])
    assert np.array_equal(plain[2], coloured[2])
    assert not np.array_equal(plain[0], coloured[0])
    grey = np.full((4, 4, 3), 100, np.uint8)
    values = [recolour(grey, 0.2, np.random.default_rng(seed))[0, 0, 0] for seed in range(50)]
    assert 79 <= min(values) < 90
    assert 110 < max(values) <= 121


def test_normalised_as_torchvision_does_it() -> None:
    image = example()[0]
    pixel = normalise(image)[:, 3, 4]
    assert pixel == pytest.approx(
        (image[3, 4] / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD), rel=1e-5
    )
