"""Time of the dense CRF against pydensecrf2, the authors' own code."""

from __future__ import annotations

import time
from statistics import median

import cv2
import numpy as np

from clipes.masks.crf import dense_crf
from clipes.types import Float32Array, UInt8Array


def synthetic_image(height: int = 375, width: int = 500) -> UInt8Array:
    """Return smooth noise of all scales, the coarser the stronger, and a sensor's on top."""
    rng = np.random.default_rng(0)
    image = rng.normal(0, 2, (height, width, 3)).astype(np.float32)
    for level in range(1, 8):
        coarse = rng.normal(0, 1, (height, width, 1)) + 0.3 * rng.normal(0, 1, (height, width, 3))
        smooth = np.asarray(cv2.GaussianBlur(coarse, (0, 0), 2**level / 2), np.float32)
        image += 2.5 * level * smooth / smooth.std()
    return (image + 128).clip(0, 255).astype(np.uint8)


def synthetic_scores(labels: int, height: int, width: int) -> Float32Array:
    """Return (L, H, W) scores: blobs, as activation maps have them, and noise."""
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((labels, height, width), np.float32)
    for score in scores:
        field = rng.normal(0, 1, (height, width))
        field = np.asarray(cv2.GaussianBlur(field, (0, 0), 20), np.float32)
        score += 3 * field / field.std()
    np.exp(scores, out=scores)
    scores /= scores.sum(0)
    return scores


def _timed(scores: Float32Array, image: UInt8Array, backend: str) -> tuple[float, Float32Array]:
    """Return the seconds it takes, and the result."""
    start = time.perf_counter()
    result = dense_crf(scores, image, backend=backend)
    return time.perf_counter() - start, result


def compare_crf(image: UInt8Array, labels: int, runs: int) -> dict[str, float]:
    """Time the CRF and pydensecrf2 in turns, and see how closely they agree.

    It is timed twice: on images of a size seen before, whose smoothness kernel is kept, and of a
    size that is new in each run.

    Args:
        image: (H, W, 3) RGB.
        labels: Number of labels.
        runs: Measurements of each; medians are returned.

    Returns:
        Seconds, ratios of them (speedup, speedup_new_size), and agreement, by name.

    Raises:
        BackendError: pydensecrf2 is not installed.
    """
    scores = synthetic_scores(labels, *image.shape[:2])
    ours = dense_crf(scores, image)  # compiles
    times = []
    for run in range(runs):
        seen, _ = _timed(scores, image, "numba")
        reference, theirs = _timed(scores, image, "pydensecrf")
        rows = len(image) - 1 - run
        new, _ = _timed(scores[:, :rows], image[:rows], "numba")
        times.append((seen, new * len(image) / rows, reference))
    seen, new, reference = (median(column) for column in zip(*times, strict=True))
    return {
        "seconds": seen,
        "seconds_new_size": new,
        "seconds_pydensecrf2": reference,
        "speedup": reference / seen,
        "speedup_new_size": reference / new,
        "label_agreement": float((ours.argmax(0) == theirs.argmax(0)).mean()),
        "max_difference": float(np.abs(ours - theirs).max()),
    }
