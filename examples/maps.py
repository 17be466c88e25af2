"""Stage 1: photos and labels to activation maps, on the bundled examples.

    python examples/maps.py runs/by-hand

``clipes cam`` does the same, and more: it resumes, shards, and records its settings.
"""

from __future__ import annotations

import sys
from pathlib import Path

import clipes


def main(out: str, weights: str = "auto") -> None:
    """Write ``out/cams/<id>.npz`` for every example."""
    data = clipes.open_dataset("examples")
    labeler = clipes.load(weights, data.classes)
    run = clipes.Run(Path(out))
    for sample in data.samples:
        maps = labeler.maps(sample.image, sample.labels)
        run.save_cams(sample.id, maps)
        print(f"{sample.id}: maps {maps.maps.shape} of {[data.classes[k] for k in maps.labels]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
