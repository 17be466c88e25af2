"""Maps to masks."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest

from clipes.choices import CrfBackend
from clipes.config import CrfParams
from clipes.errors import ImageError
from clipes.masks import pseudo as module
from clipes.masks.pseudo import (
    cam_mask,
    cam_masks,
    disagreement,
    label_pixels,
    pseudo_label,
    upsample,
    with_background,
)
from clipes.types import CamMaps


def test_disagreement_is_what_counting_patches_says() -> None:
    one, other = np.random.default_rng(0).random((2, 3, 6, 7), dtype=np.float32)
    one[2] = other[2] = 0
    found = disagreement(one, other)
    masks = []
    for maps in (one, other):
        scores = [[[1 - maps[:, y, x].max(), *maps[:, y, x]] for x in range(7)] for y in range(6)]
        masks.append(np.argmax(scores, axis=2))
    for k in (0, 1):
        first, second = ({*zip(*np.nonzero(mask == k + 1), strict=True)} for mask in masks)
        assert found[k] == pytest.approx(1 - len(first & second) / len(first | second))
    assert found[2] == 1, "what neither labels anywhere"
    assert not disagreement(one, one)[:2].any()


def test_upsampling_is_bilinear_between_pixel_centres() -> None:
    full = upsample(np.array([[[0.0, 1.0]]], np.float16), (1, 4))
    np.testing.assert_allclose(full, [[[0, 0.25, 0.75, 1]]], atol=1e-6)


def test_the_background_is_what_no_class_claims() -> None:
    maps = np.array([[[0.0, 0.8, 0.3]], [[0.2, 0.1, 0.6]]], np.float32)
    scores = with_background(maps, 2.0)
    np.testing.assert_allclose(scores[0], [[0.64, 0.04, 0.16]], rtol=1e-6)
    np.testing.assert_array_equal(scores[1:], maps)


def test_a_larger_exponent_never_shrinks_the_objects() -> None:
    maps = np.random.default_rng(0).random((2, 9, 11), dtype=np.float32)
    cams = CamMaps(np.array([4, 7]), maps, (90, 110))
    covered = [(cam_mask(cams, exponent) > 0).sum() for exponent in (0.5, 1, 2, 4)]
    assert covered == sorted(covered)
    assert covered[0] < covered[-1]


def test_mask_values_are_one_above_the_labels() -> None:
    scores = np.zeros((3, 1, 3), np.float32)
    scores[[0, 1, 2], 0, [0, 1, 2]] = 1
    assert label_pixels(scores, np.array([19, 0])).tolist() == [[0, 20, 1]]


def test_the_crf_follows_an_edge_that_the_map_only_hints_at() -> None:
    image = np.full((64, 64, 3), 40, np.uint8)
    image[16:48, 16:48] = 200
    maps = np.full((1, 4, 4), 0.05, np.float32)
    maps[0, 1:3, 1:3] = 0.9
    cams = CamMaps(np.array([2]), maps, (64, 64))
    truth = np.where(image[:, :, 0] == 200, 3, 0)
    pseudo = pseudo_label(image, cams, CrfParams())
    assert (pseudo.mask == truth).mean() > (cam_mask(cams, 1.0) == truth).mean()
    assert (pseudo.mask == truth).mean() > 0.99
    assert pseudo.confidence.dtype == np.float32
    assert 0.5 <= pseudo.confidence.min() <= pseudo.confidence.max() <= 1


def _noisy_image(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    noise = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 3)


@pytest.mark.parametrize("backend", CrfBackend.names())
@pytest.mark.parametrize("classes", [2, 3, 5, 11])
@pytest.mark.parametrize("seed", range(3))
def test_of_equal_maps_the_first_class_wins(backend: str, classes: int, seed: int) -> None:
    if backend == "pydensecrf":
        pytest.importorskip("pydensecrf", reason="pydensecrf2 is not installed")
    rng = np.random.default_rng(seed)
    size = (48 + 13 * seed, 64)
    maps = rng.random((classes, -(-size[0] // 16), 4)).astype(np.float16)
    maps[1:-1] *= np.float16(0.6)  # lest the two lose everywhere
    maps[-1] = maps[0]
    cams = CamMaps(np.arange(classes) * 3, maps, size)
    first, second = 1, 3 * (classes - 1) + 1
    refined = pseudo_label(_noisy_image(size, rng), cams, CrfParams(), backend=backend).mask
    for mask in (cam_mask(cams, 1.0), refined):
        assert first in mask
        assert second not in mask


@pytest.mark.parametrize("backend", ["numba"])  # pydensecrf2 breaks ties by rounding
@pytest.mark.parametrize("classes", [2, 4])
def test_the_order_of_the_labels_in_a_file_changes_nothing(backend: str, classes: int) -> None:
    rng = np.random.default_rng(classes)
    size = (61, 47)
    maps = rng.random((classes, 4, 3)).astype(np.float16)
    maps[1] = maps[0]
    labels = rng.permutation(20)[:classes]
    order = np.roll(np.arange(classes), 1)
    cams = CamMaps(labels, maps, size)
    moved = CamMaps(labels[order], maps[order], size)
    np.testing.assert_array_equal(cam_mask(moved, 1.0), cam_mask(cams, 1.0))
    image = _noisy_image(size, rng)
    expected = pseudo_label(image, cams, CrfParams(), backend=backend)
    got = pseudo_label(image, moved, CrfParams(), backend=backend)
    np.testing.assert_array_equal(got.mask, expected.mask)
    np.testing.assert_array_equal(got.confidence, expected.confidence)


def test_the_background_wins_a_tie_with_a_class() -> None:
    rng = np.random.default_rng(0)
    cams = CamMaps(np.array([3]), np.full((1, 3, 4), 0.5, np.float16), (48, 64))
    assert not cam_mask(cams, 1.0).any()
    assert not pseudo_label(_noisy_image((48, 64), rng), cams, CrfParams()).mask.any()


def test_maps_of_another_image_are_refused() -> None:
    cams = CamMaps(np.array([0]), np.zeros((1, 2, 2), np.float32), (32, 32))
    with pytest.raises(ImageError, match="made at"):
        pseudo_label(np.zeros((32, 33, 3), np.uint8), cams, CrfParams())


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_labels_without_a_crf_are_the_argmax_of_all_scores(classes: int) -> None:
    rng = np.random.default_rng(classes)
    maps = rng.integers(0, 5, (classes, 4, 3)).astype(np.float16) / 4  # many are equal
    cams = CamMaps(rng.permutation(20)[:classes], maps, (61, 47))
    order = np.argsort(cams.labels)
    full = upsample(maps[order], cams.size)
    for mask, exponent in zip(cam_masks(cams, (0.5, 1, 2)), (0.5, 1, 2), strict=True):
        wanted = label_pixels(with_background(full, exponent), cams.labels[order])
        np.testing.assert_array_equal(mask, wanted)


def test_tiled_pictures_are_labelled_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cams = CamMaps(np.arange(3), rng.random((3, 5, 6)).astype(np.float16), (61, 47))
    (whole,) = cam_masks(cams, [1.0])
    monkeypatch.setattr(module, "MAX_PIXELS", 61 * 47 - 1)
    monkeypatch.setattr(module, "_STRIP", 47 * 7)
    (strips,) = cam_masks(cams, [1.0])
    assert (strips != whole).mean() < 0.001  # ties, rounded the other way


def test_labels_take_no_memory_by_the_class() -> None:
    maps = np.random.default_rng(0).random((50, 4, 4)).astype(np.float16)
    size = (500, 600)
    tracemalloc.start()
    cam_masks(CamMaps(np.arange(50), maps, size), [1.0])
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 30 * size[0] * size[1]  # bytes; all maps at once have 200 a pixel
