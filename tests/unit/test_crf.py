"""The dense CRF against the authors' code, against its definition, and on odd input."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from clipes.config import CrfParams
from clipes.errors import BackendError, ImageError, UsageError
from clipes.masks.crf import dense_crf

IMAGES = ("2007_000032", "2007_000063", "2007_000170", "2007_000250", "2007_001225")


def _scene(height: int, width: int, labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy scores and a noisy image that agree on blobs of one colour each."""
    rng = np.random.default_rng(seed)
    fields = rng.random((height, width, labels)).astype(np.float32)
    fields = cv2.GaussianBlur(fields, (0, 0), max(height, width) / 8).reshape(height, width, labels)
    truth = fields.argmax(2)
    colours = rng.integers(40, 216, (labels, 3))
    image = (colours[truth] + rng.normal(0, 3, (height, width, 3))).clip(0, 255).astype(np.uint8)
    return _scores(truth, labels, rng), image


def _scores(truth: np.ndarray, labels: int, rng: np.random.Generator) -> np.ndarray:
    """Return a blurred and noisy version of a mask, as activation maps are: (L, H, W)."""
    blur = max(truth.shape) / 40
    maps = [cv2.GaussianBlur((truth == k).astype(np.float32), (0, 0), blur) for k in range(labels)]
    noisy = np.stack(maps) + 1.3 * rng.random((labels, *truth.shape), dtype=np.float32)
    return noisy / noisy.sum(0)


def _exact(probs: np.ndarray, image: np.ndarray, params: CrfParams) -> np.ndarray:
    """Mean field with the kernels' definition: all pairs of pixels, double precision."""
    labels, height, width = probs.shape
    y, x = np.divmod(np.arange(height * width), width)
    position = np.stack([x, y], 1).astype(float)
    colour = image.reshape(-1, 3) / params.bilateral_srgb
    kernel = np.zeros((height * width, height * width))
    for features, compat in (
        (position / params.gaussian_sxy, params.gaussian_compat),
        (np.hstack([position / params.bilateral_sxy, colour]), params.bilateral_compat),
    ):
        pairs = np.exp(-((features[:, None] - features[None]) ** 2).sum(2) / 2)
        root = np.sqrt(pairs.sum(1))
        kernel += compat * pairs / root[:, None] / root[None]
    unary = np.log(np.clip(probs.reshape(labels, -1), 1e-5, 1))
    q = np.exp(unary)
    for _ in range(params.iterations + 1):
        q /= q.sum(0)
        result = q
        logits = unary + q @ kernel
        q = np.exp(logits - logits.max(0))
    return result.reshape(probs.shape)


def _assert_probabilities(q: np.ndarray) -> None:
    assert q.dtype == np.float32
    assert q.min() >= 0
    assert q.max() <= 1
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-5)


# --- the authors' code


@pytest.mark.parametrize("name", IMAGES)
def test_agrees_with_pydensecrf_on_photos(shared, name):
    pytest.importorskip("pydensecrf", reason="pydensecrf2 is not installed")
    sample = shared / "data" / "voc_sample"
    image = np.array(Image.open(sample / "JPEGImages" / f"{name}.jpg").convert("RGB"))
    mask = np.array(Image.open(sample / "SegmentationClassAug" / f"{name}.png"))
    present = [0, *(k for k in np.unique(mask) if k not in (0, 255))]
    truth = np.searchsorted(present, np.where(mask == 255, 0, mask))
    probs = _scores(truth, len(present), np.random.default_rng(0))
    ours, theirs = dense_crf(probs, image), dense_crf(probs, image, backend="pydensecrf")
    assert (ours.argmax(0) != probs.argmax(0)).mean() > 0.01, "the CRF has nothing to do here"
    np.testing.assert_array_equal(ours.argmax(0), theirs.argmax(0))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (3, 5), (16, 16), (61, 47)])
@pytest.mark.parametrize("labels", [2, 3, 5, 12])
def test_agrees_with_pydensecrf_at_any_size(size, labels):
    pytest.importorskip("pydensecrf", reason="pydensecrf2 is not installed")
    probs, image = _scene(*size, labels)
    theirs = dense_crf(probs, image, backend="pydensecrf")
    np.testing.assert_allclose(dense_crf(probs, image), theirs, atol=1e-3)


@pytest.mark.parametrize(
    "params",
    [
        CrfParams(iterations=0),
        CrfParams(iterations=3, gaussian_sxy=0.3, bilateral_sxy=10, bilateral_srgb=20),
        CrfParams(gaussian_sxy=3, bilateral_sxy=80, bilateral_srgb=13, bilateral_compat=10),
        CrfParams(gaussian_compat=0),
        CrfParams(bilateral_compat=0),
    ],
)
def test_agrees_with_pydensecrf_for_other_parameters(params):
    pytest.importorskip("pydensecrf", reason="pydensecrf2 is not installed")
    probs, image = _scene(60, 80, 4)
    theirs = dense_crf(probs, image, params, backend="pydensecrf")
    np.testing.assert_allclose(dense_crf(probs, image, params), theirs, atol=5e-3)


def test_missing_pydensecrf_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(BackendError, match="pip install pydensecrf2"):
        dense_crf(*_scene(4, 5, 2), backend="pydensecrf")


# --- the definition


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_sum_over_all_pairs(seed):
    # Narrower kernels than the default, so that they end inside of an image this small. The
    # lattice only approximates a Gaussian, but what the CRF makes of it is close.
    params = CrfParams(gaussian_sxy=1, bilateral_sxy=8, bilateral_srgb=10)
    probs, image = _scene(28, 36, 3, seed)
    exact, ours = _exact(probs, image, params), dense_crf(probs, image, params)
    assert (ours.argmax(0) != probs.argmax(0)).mean() > 0.03, "the CRF has nothing to do here"
    assert (ours.argmax(0) == exact.argmax(0)).mean() >= 0.99
    assert np.abs(ours - exact).mean() < 2e-3


def test_without_iterations_it_is_the_normalised_scores():
    probs, image = _scene(20, 30, 5)
    probs[0, 0, :5] = 0
    result = dense_crf(probs * np.float32(0.5), image, CrfParams(iterations=0))
    expected = np.maximum(probs * 0.5, 1e-5)
    np.testing.assert_allclose(result, expected / expected.sum(0), atol=1e-6)


def test_smoothing_removes_noise():
    probs, image = _scene(60, 80, 3)
    clean = cv2.medianBlur(probs.argmax(0).astype(np.uint8), 9)
    before = (probs.argmax(0) == clean).mean()
    after = (dense_crf(probs, image).argmax(0) == clean).mean()
    assert after > before + 0.02


# --- properties


@pytest.mark.parametrize("labels", [2, 3, 6, 11])
def test_permuting_labels_permutes_the_result(labels):
    probs, image = _scene(40, 50, labels)
    order = np.random.default_rng(1).permutation(labels)
    result = dense_crf(probs, image)
    _assert_probabilities(result)
    np.testing.assert_allclose(dense_crf(probs[order], image), result[order], atol=1e-4)


def test_undecided_pixels_stay_undecided():
    _, image = _scene(40, 50, 2)
    result = dense_crf(np.full((4, 40, 50), 0.25, np.float32), image)
    np.testing.assert_allclose(result, 0.25, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_flipping_nearly_commutes(axis):
    # Only nearly: the vertices of the lattice do not move along.
    probs, image = _scene(60, 80, 3)
    flipped = dense_crf(np.flip(probs, axis + 1), np.flip(image, axis))
    result = np.flip(dense_crf(probs, image), axis + 1)
    assert (flipped.argmax(0) == result.argmax(0)).mean() >= 0.99
    assert np.abs(flipped - result).mean() < 2e-3


def test_labels_that_nobody_has_change_nothing():
    # 3, 6 and 13 labels are filtered in different blocks.
    probs, image = _scene(40, 50, 3)
    result = dense_crf(probs, image, CrfParams(iterations=5))
    for extra in (3, 10):
        more = np.concatenate([probs, np.zeros((extra, 40, 50), np.float32)])
        padded = dense_crf(more, image, CrfParams(iterations=5))
        np.testing.assert_allclose(padded[:3], result, atol=1e-3)
        assert padded[3:].max() < 1e-3


def test_certain_scores_are_fine():
    probs, image = _scene(30, 40, 3)
    certain = (probs == probs.max(0)).astype(np.float32)
    result = dense_crf(certain, image)
    _assert_probabilities(result)
    assert (result.argmax(0) == certain.argmax(0)).mean() > 0.9


def test_layout_and_precision_of_the_scores_do_not_matter():
    probs, image = _scene(30, 40, 3)
    expected = dense_crf(probs, image)
    swapped = np.ascontiguousarray(probs.transpose(2, 1, 0)).transpose(2, 1, 0)
    np.testing.assert_array_equal(dense_crf(swapped, image), expected)
    np.testing.assert_array_equal(dense_crf(probs.astype(np.float64), image), expected)
    columns = np.asfortranarray(image)
    np.testing.assert_array_equal(dense_crf(probs, columns), expected)


def test_arguments_are_left_alone():
    probs, image = _scene(30, 40, 3)
    probs.flags.writeable = image.flags.writeable = False
    np.testing.assert_array_equal(dense_crf(probs, image), dense_crf(probs, image))


def test_threads_get_the_same_result():
    scenes = [_scene(30 + k, 40, 3, k) for k in range(4)] * 2
    alone = [dense_crf(*scene) for scene in scenes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda scene: dense_crf(*scene), scenes))
    np.testing.assert_array_equal(np.concatenate(together, 1), np.concatenate(alone, 1))


def test_one_label_is_certain():
    _, image = _scene(5, 7, 2)
    result = dense_crf(np.zeros((1, 5, 7), np.float32), image)
    np.testing.assert_array_equal(result, np.ones((1, 5, 7), np.float32))


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (20, 1), (2, 3)])
def test_tiny_images(size):
    probs, image = _scene(*size, 3)
    _assert_probabilities(dense_crf(probs, image))


def test_noise_has_more_vertices_than_pixels():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    _assert_probabilities(dense_crf(rng.random((3, 200, 300), dtype=np.float32), image))


# --- errors

GREY = np.zeros((4, 5), np.uint8)
RGB = np.zeros((4, 5, 3), np.uint8)
HALF = np.full((2, 4, 5), 0.5, np.float32)


def _with(value: float) -> np.ndarray:
    probs = HALF.copy()
    probs[1, 2, 3] = value
    return probs


@pytest.mark.parametrize(
    ("probs", "image", "error", "message"),
    [
        (HALF, GREY, ImageError, "RGB uint8"),
        (HALF, RGB.astype(np.float32), ImageError, "float32"),
        (HALF, np.zeros((4, 5, 4), np.uint8), ImageError, "RGB"),
        (HALF[:, :0], RGB[:0], ImageError, "no pixels"),
        (HALF[0], RGB, UsageError, r"\(L, H, W\)"),
        (HALF[:0], RGB, UsageError, r"\(L, H, W\)"),
        (HALF.astype(np.uint8), RGB, UsageError, "uint8"),
        (HALF[:, :3], RGB, UsageError, r"\(3, 5\)"),
        (_with(np.nan), RGB, UsageError, "nan"),
        (_with(np.inf), RGB, UsageError, "inf"),
        (_with(1.1), RGB, UsageError, "1.1"),
        (_with(-0.1), RGB, UsageError, "-0.1"),
    ],
)
def test_unusable_arrays_are_errors(probs, image, error, message):
    with pytest.raises(error, match=message):
        dense_crf(probs, image)


@pytest.mark.parametrize(
    "params",
    [
        {"iterations": -1},
        {"gaussian_sxy": 0.0},
        {"bilateral_sxy": -67.0},
        {"bilateral_srgb": float("nan")},
        {"gaussian_compat": -1.0},
        {"bilateral_compat": float("inf")},
        {"bilateral_srgb": 1e-9},
    ],
)
def test_unusable_parameters_are_errors(params):
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    with pytest.raises(UsageError):
        dense_crf(HALF, image, CrfParams(**params))


def test_unknown_backend_is_an_error():
    with pytest.raises(UsageError, match=r"'cuda'.*numba, pydensecrf"):
        dense_crf(HALF, RGB, backend="cuda")


# --- processes


@pytest.mark.slow
def test_workers_may_all_start_with_an_empty_cache(tmp_path):
    script = (
        "import hashlib, sys; from tests.unit.test_crf import _scene, dense_crf;"
        "print(hashlib.sha256(dense_crf(*_scene(30, 40, 3)).tobytes()).hexdigest())"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", script]
    root = Path(__file__).resolve().parents[2]
    workers = [
        subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    results = {worker.communicate()[0].strip() for worker in workers}
    assert all(worker.returncode == 0 for worker in workers)
    assert results == {hashlib.sha256(dense_crf(*_scene(30, 40, 3)).tobytes()).hexdigest()}
    assert list(tmp_path.rglob("*.nbi"))
