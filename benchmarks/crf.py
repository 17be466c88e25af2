"""How much faster the dense CRF is than pydensecrf2, and how closely they agree.

    python benchmarks/crf.py [IMAGE ...] [--labels 3 21] [--runs 7] [--json]

Runs of the two alternate on one core, with the default parameters; medians are compared. It is
timed twice: on images of a size seen before, whose smoothness kernel is kept, and of a size that is
new in each run. Without images, one is made up: 375 x 500 pixels with the spectrum of a photo.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import cv2
import numpy as np

from clipes.crf import dense_crf
from clipes.errors import BackendError
from clipes.images import read_image
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


def timed(scores: Float32Array, image: UInt8Array, backend: str) -> tuple[float, Float32Array]:
    """Return the seconds it takes, and the result."""
    start = time.perf_counter()
    result = dense_crf(scores, image, backend=backend)
    return time.perf_counter() - start, result


def compare(image: UInt8Array, labels: int, runs: int) -> dict[str, float]:
    """Return times in seconds, their ratios, and how closely the results agree."""
    scores = synthetic_scores(labels, *image.shape[:2])
    ours = dense_crf(scores, image)  # compiles
    times = []
    for run in range(runs):
        seen, _ = timed(scores, image, "numba")
        reference, theirs = timed(scores, image, "pydensecrf")
        rows = len(image) - 1 - run
        new, _ = timed(scores[:, :rows], image[:rows], "numba")
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


def main() -> int:
    """Compare on all images given and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="*", type=Path, help="photos; default: a synthetic one")
    parser.add_argument("--labels", nargs="+", type=int, default=[3, 21])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    images = {str(path): read_image(path) for path in options.images}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, image in (images or {"synthetic": synthetic_image()}).items():
        results[name] = {}
        for labels in options.labels:
            try:
                result = compare(image, labels, options.runs)
            except BackendError as error:
                print(error, file=sys.stderr)
                return 1
            results[name][str(labels)] = result
            if not options.json:
                print(
                    f"{name}, {image.shape[1]} x {image.shape[0]}, {labels} labels: "
                    f"{result['speedup']:.1f} times as fast ({result['speedup_new_size']:.1f} for "
                    f"a new size), {1e3 * result['seconds']:.0f} ms against "
                    f"{1e3 * result['seconds_pydensecrf2']:.0f} ms; labels agree for "
                    f"{result['label_agreement']:.4%}, probabilities to "
                    f"{result['max_difference']:.0e}"
                )
    speedup = {
        str(labels): median(result[str(labels)]["speedup"] for result in results.values())
        for labels in options.labels
    }
    if options.json:
        print(json.dumps({"speedup": speedup, "images": results}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
