"""Masks for a folder of your own photos with a ``labels.csv`` (``image,labels``).

    python examples/own_photos.py my-photos masks

``clipes cam --dataset folder`` does the same and continues where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import clipes
from clipes.datasets import open_dataset


def main(photos: str, masks: str, weights: str = "auto") -> None:
    """Write ``masks/<name>.png`` for every photo that can be used, and name the others."""
    data = open_dataset("folder", root=Path(photos))
    labeler = clipes.load(weights, data.classes)
    for failure in data.failures:
        print(f"skipping {failure.id}: {failure.reason}")
    for sample in data.samples:
        try:
            pseudo = labeler.segment(sample.image, sample.labels)
        except clipes.ClipesError as error:
            print(f"skipping {sample.id}: {error}")
            continue
        clipes.write_mask(Path(masks) / f"{sample.id}.png", pseudo.mask)
        shown = ", ".join(data.classes[label] for label in sample.labels)
        print(f"{sample.id}: {shown}; sure of {(pseudo.confidence >= 0.95).mean():.0%} of it")


if __name__ == "__main__":
    main(*sys.argv[1:])
