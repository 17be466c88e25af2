"""A mask for one photo.

    python examples/one_photo.py photo.jpg cat,sofa mask.png

Weights are fetched on the first run. With the registry's, labels are VOC's 20 classes and some 70
other things; see docs/weights.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import clipes


def main(photo: str, labels: str, target: str, weights: str = "auto") -> None:
    """Write the mask of ``photo`` to ``target``, and its confidence beside it."""
    labeler = clipes.load(weights, classes=labels.split(","))
    pseudo = labeler.segment(photo, labeler.classes)
    clipes.write_mask(target, pseudo.mask)
    path = Path(target)
    clipes.write_confidence(path.with_stem(f"{path.stem}-confidence"), pseudo.confidence)
    for value, name in enumerate(labeler.classes, start=1):
        print(f"{name}: {(pseudo.mask == value).mean():.1%} of the pixels, mask value {value}")


if __name__ == "__main__":
    main(*sys.argv[1:])
