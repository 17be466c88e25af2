"""Stage 3: masks against ground truth, on the output of ``refine.py``.

python examples/evaluate.py runs/by-hand
"""

from __future__ import annotations

import sys
from pathlib import Path

import clipes


def main(out: str) -> None:
    """Print the mIoU of ``out/pseudo``, and the IoU of each class."""
    run = clipes.Run(Path(out))
    data = clipes.open_dataset("examples")
    matrix = clipes.ConfusionMatrix(1 + len(data.classes))
    for sample in data.samples:
        if sample.mask is not None:
            matrix.update(clipes.read_mask(sample.mask), run.load_pseudo(sample.id).mask)
    scores = matrix.scores()
    print(f"mIoU {scores.miou:.1%}, pixel accuracy {scores.pixel_accuracy:.1%}")
    for name, iou in zip(("background", *data.classes), scores.iou, strict=True):
        if iou is not None:
            print(f"{name}: {iou:.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
