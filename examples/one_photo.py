"""A mask for one photo from Python: what ``clipes cam`` and ``clipes refine`` do, in memory.

    python examples/one_photo.py photo.jpg cat,sofa mask.png

Weights are fetched on the first run. With the registry's, labels are VOC's 20 classes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from clipes.config import get_preset
from clipes.console import progress_bar, say
from clipes.images import read_image, write_confidence, write_mask
from clipes.pseudo import pseudo_label
from clipes.stages.cam import CamMaker
from clipes.stages.setup import load_clip
from clipes.vocabulary import load_vocabulary


def main(photo: str, labels: str, target: str) -> None:
    """Write the mask of ``photo`` to ``target``, and its confidence beside it."""
    preset = get_preset("default")
    vocabulary = load_vocabulary("voc").with_classes(tuple(labels.split(",")))
    clip = load_clip(
        "auto",
        "ViT-B-16",
        vocabulary,
        text_features=None,
        fp16_positions=preset.cam.fp16_positions,
        device="auto",
        say=say,
        progress=progress_bar,
    )
    image = read_image(Path(photo))
    maps = CamMaker(clip.backbone, clip.text, preset.cam)(image, range(len(vocabulary.classes)))
    pseudo = pseudo_label(image, maps, preset.crf)
    path = Path(target)
    write_mask(path, pseudo.mask)
    write_confidence(path.with_stem(f"{path.stem}-confidence"), pseudo.confidence)
    for value, name in enumerate(vocabulary.classes, start=1):
        print(f"{name}: {(pseudo.mask == value).mean():.1%} of the pixels, mask value {value}")


if __name__ == "__main__":
    main(*sys.argv[1:])
