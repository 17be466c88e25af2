"""CAM mIoU of fitted class vectors on images they were not fitted on: two folds of real VOC images.

    python benchmarks/standin.py [--preset NAME] [--cache DIR] [--json FILE]

Every second image of the VOC sample, with all of the COCO and the MSRC sample, teaches the vectors
(labels only); ``clipes cam`` with them is scored on the other half. Encoded
images and maps are kept in the cache, so a second run takes seconds. Weights: registry.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from common import SHARED, make_maps

from clipes.cli.console import progress_bar
from clipes.cli.options import listener
from clipes.config import get_preset
from clipes.datasets import VOC_CLASSES, open_dataset
from clipes.disk.files import atomic_write
from clipes.disk.images import read_mask
from clipes.listener import Listener
from clipes.masks.pseudo import label_pixels, upsample, with_background
from clipes.masks.scores import ConfusionMatrix
from clipes.run.folder import Run
from clipes.stages.cam import DataRequest
from clipes.stages.setup import OpenedWeights, open_weights
from clipes.standin.fit import EncodedImage, FitParams, LabelledImage, encode, fit, gather
from clipes.standin.patches import PatchFeatures
from clipes.types import Sample
from clipes.weights import cache_dir
from clipes.words.features import save_text_features

PRESET = get_preset("reference")  # what the vectors are fitted with


def encoded(opened: OpenedWeights, images: list[LabelledImage], cache: Path) -> list[EncodedImage]:
    """Encode images, or read them from the cache."""
    settings = repr((opened.weights.sha256, PRESET.cam, FitParams(), images))
    path = cache / f"encoded-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        backbone = opened.backbone(fp16_positions=PRESET.cam.fp16_positions)
        heard = Listener(
            report=lambda failure: sys.exit(f"{failure.id}: {failure.reason}"),
            progress=progress_bar,
        )
        made = encode(backbone, images, heard, max_patches=PRESET.cam.max_patches)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                features=np.stack([image.features.feature for image in made]),
                patches=np.concatenate([image.features.patches for image in made]),
                ends=np.cumsum([len(image.features.patches) for image in made]),
            )
    with np.load(path, allow_pickle=False) as arrays:
        patches = np.split(arrays["patches"], arrays["ends"][:-1])
        return [
            EncodedImage(image.names, PatchFeatures(feature, part))
            for image, feature, part in zip(images, arrays["features"], patches, strict=True)
        ]


def maps(text: Path, samples: list[Sample], cache: Path, preset: str) -> Run:
    """Make the maps of ``samples`` as a user would, in a run folder named after the vectors."""
    run = Run(cache / f"{preset}-{hashlib.sha256(text.read_bytes()).hexdigest()[:16]}")
    split = run.root.with_suffix(".txt")
    split.write_text("".join(f"{sample.id}\n" for sample in samples))
    images = DataRequest("voc", root=SHARED / "data" / "voc_sample", split=str(split))
    make_maps(images, text, preset, run)
    return run


def score(run: Run, samples: list[Sample]) -> ConfusionMatrix:
    """Score the maps of a run, the background being 1 - max."""
    matrix = ConfusionMatrix(len(VOC_CLASSES) + 1)
    for sample in samples:
        if sample.mask is None:
            raise SystemExit(f"{sample.id} has no mask")
        cams = run.load_cams(sample.id)
        scores = with_background(upsample(cams.maps, cams.size), PRESET.background_exponent)
        matrix.update(read_mask(sample.mask), label_pixels(scores, cams.labels))
    return matrix


def main() -> None:
    """Fit and score both folds; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="reference", help="of the maps")
    parser.add_argument("--cache", type=Path, help="[default: in the cache of clipes]")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    options = parser.parse_args()
    data = SHARED / "data"
    if not (data / "voc_sample").is_dir():
        print(f"skipped: the samples are not at {data}; set CLIPES_SHARED")
        return
    cache = (options.cache or cache_dir() / "standin").absolute()
    voc = open_dataset("voc", root=data / "voc_sample", split="train")
    others = [open_dataset("folder", root=data / f"{name}_sample") for name in ("coco", "stuff")]
    opened = open_weights("registry", "ViT-B-16", "cpu", listener())
    images = encoded(opened, gather([voc, *others], VOC_CLASSES), cache)
    first, rest = images[: len(voc.samples)], images[len(voc.samples) :]
    matrices = {}
    for fold, name in enumerate(("even images", "odd images")):
        held_out = list(voc.samples[fold::2])
        fitted = fit(
            [*first[1 - fold :: 2], *rest],
            VOC_CLASSES,
            logit_scale=opened.logit_scale,
            model=opened.weights.name,
            note=f"fitted for {Path(__file__).name}, {name} held out",
            progress=lambda _done, _total: None,
        )
        text = cache / f"fold-{fold}.npz"
        save_text_features(text, fitted.text)
        matrices[name] = score(maps(text, held_out, cache, options.preset), held_out)
    matrices["all images"] = matrices["even images"] + matrices["odd images"]
    print("| held out | images | CAM mIoU | pixel accuracy |\n|---|---|---|---|")
    for name, matrix in matrices.items():
        scores = matrix.scores()
        accuracy = 100 * scores.pixel_accuracy
        print(f"| {name} | {scores.images} | {100 * scores.miou:.2f} | {accuracy:.2f} |")
    pooled = matrices["all images"].scores()
    iou = dict(zip(("background", *VOC_CLASSES), pooled.iou, strict=True))
    print("\nIoU:", " ".join(f"{name} {100 * (value or 0):.1f}" for name, value in iou.items()))
    if options.json:
        table = {name: matrix.scores().miou for name, matrix in matrices.items()}
        options.json.write_text(json.dumps({"miou": table, "iou": iou}, indent=2) + "\n")


if __name__ == "__main__":
    main()
