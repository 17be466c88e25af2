"""Masks for a folder of your own photos with a ``labels.csv`` (``image,labels``).

    python examples/own_photos.py my-photos runs/mine

It is what ``clipes run --dataset folder`` does, and continues where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import clipes


def main(photos: str, out: str, weights: str = "auto") -> None:
    """Write ``out/pseudo/<id>.png`` for every photo that can be used, and name the others."""
    classes = clipes.open_dataset("folder", root=Path(photos)).classes
    labeler = clipes.load(weights, classes)
    result = labeler.run(photos, out, follow=show)
    for failure in result.failures:
        print(f"skipping {failure.id}: {failure.reason}")
    print(f"{result.masks.done} masks made, {result.masks.skipped} there before")
    for id_ in result.run.ids("pseudo"):
        pseudo = result.run.load_pseudo(id_)
        print(f"{id_}: sure of {(pseudo.confidence >= 0.95).mean():.0%} of it")
    print(f"look at them in {result.report}")


def show(stage: str, done: int, total: int) -> None:
    """Say how far a stage is, on one line."""
    print(f"{stage}: {done}/{total}", end="\n" if done == total else "\r", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
