"""Time of scoring templates by sharpness from cached image features: 500 templates x 1000 images.

    python benchmarks/sharpness.py [--templates 500] [--images 1000] [--classes 20] [--json]

Features are random: only their number matters. Encoding, done once per image, is not in it.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from clipes.words.features import unit_rows
from clipes.words.sharpness import class_scores, sharpness

WIDTH = 512  # of OpenAI's ViT-B/16


def main() -> None:
    """Score all templates and print the seconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--templates", type=int, default=500)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    images = unit_rows(rng.standard_normal((options.images, WIDTH)))
    present = rng.random((options.images, options.classes)) < 0.1
    present[np.arange(options.images), rng.integers(0, options.classes, options.images)] = True
    templates = [
        unit_rows(rng.standard_normal((options.classes, WIDTH))) for _ in range(options.templates)
    ]
    start = time.perf_counter()
    scores = [sharpness(class_scores(images, words, 100.0), present) for words in templates]
    seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps({"seconds": seconds, "templates": len(scores), "images": len(images)}))
    else:
        print(f"{len(scores)} templates x {len(images)} images: {seconds:.2f} s")


if __name__ == "__main__":
    main()
