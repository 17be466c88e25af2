"""How many images a class needs, if its vector is to be fitted to them: CAM and CRF IoU.

    python benchmarks/words.py [--data voc_sample|voc_more/train|coco_sample] [--preset NAME]
                               [--counts N ...] [--runs N] [--limit N] [--json FILE]

Each class is left out of the stand-in by turns. Runs of n images that show it, and n that do not,
fit its vector as ``clipes cam`` does for a class that no vector knows, and are scored by the IoU of
that class alone on the images that show it, pooled over the runs of the class; the table has the
mean over classes. The other vectors of the stand-in were fitted when the class was there, too.
Weights: registry.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path

import numpy as np
from common import make_maps, make_masks, sample

from clipes.cli.options import listener
from clipes.config import get_preset
from clipes.datasets import Dataset, open_dataset
from clipes.disk.images import read_mask
from clipes.masks.pseudo import cam_mask
from clipes.masks.scores import ConfusionMatrix
from clipes.names import folded
from clipes.run.folder import Run
from clipes.stages.cam import DataRequest
from clipes.stages.own_words import for_all
from clipes.stages.setup import open_weights
from clipes.standin.beside import fit_beside
from clipes.standin.fit import EncodedImage, LabelledImage, encode
from clipes.types import Sample, evenly_spaced
from clipes.words.features import TextFeatures, save_text_features, stand_in

COUNTS = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        data: All images with their masks.
        encoded: What the fit needs of those that runs are made of, by id.
        logit_scale: The weights' factor on cosines.
        preset: Of the maps.
        weights: CLIP's.
    """

    data: Dataset
    encoded: dict[str, EncodedImage]
    logit_scale: float
    preset: str
    weights: str = "registry"


@dataclass(frozen=True)
class Point:
    """One class with runs of one size: IoU in [0, 1] of the maps and of the masks, and how many."""

    name: str
    count: int
    runs: int
    cam: float
    crf: float


def prepare(
    data: Dataset, samples: Iterable[Sample], preset: str, weights: str = "registry"
) -> Setting:
    """Encode the images that runs are made of, each once."""
    opened, params = open_weights(weights, "ViT-B-16", "auto", listener()), get_preset(preset).cam
    images = [
        LabelledImage(s.id, s.image, tuple(data.classes[k] for k in s.labels))
        for s in {sample.id: sample for sample in samples}.values()
    ]
    backbone = opened.backbone(fp16_positions=params.fp16_positions)
    made = encode(backbone, images, listener(), max_patches=params.max_patches)
    return Setting(data, {one.id: one for one in made}, opened.logit_scale, preset, weights)


def without(vectors: TextFeatures, name: str) -> TextFeatures:
    """Return vectors as if nobody had heard of a class."""
    chosen = vectors.for_classes((name,)) if not vectors.lacks([name]) else vectors
    kept = [row for row, other in enumerate(vectors.classes) if folded(other) != folded(name)]
    return replace(
        chosen,
        classes=tuple(vectors.classes[row] for row in kept),
        class_vectors=vectors.class_vectors[kept],
    )


def parts(data: Dataset, label: int, count: int, runs: int) -> Iterator[tuple[Sample, ...]]:
    """Yield at most so many groups of ``count`` images that show a class, then as many others."""
    shown = [s for s in data.samples if label in s.labels]
    others = [s for s in data.samples if label not in s.labels]
    firsts = range(0, len(shown) - count + 1, count)
    for number in evenly_spaced(len(firsts), runs):
        first = firsts[number]
        rest = [others[k] for k in evenly_spaced(len(others), count)]
        yield (*shown[first : first + count], *rest)


def measure(setting: Setting, label: int, count: int, runs: int, folder: Path) -> Point | None:
    """Fit and score the runs of one class and size; None if too few images show it."""
    data, name = setting.data, setting.data.classes[label]
    known, total = without(stand_in(), name), len(data.classes) + 1
    cam, crf, made = ConfusionMatrix(total), ConfusionMatrix(total), 0
    for samples in parts(data, label, count, runs):
        run = Run(folder / f"{label}-{count}-{made}")
        run.root.mkdir(parents=True)
        fit(setting, samples, known, run.root / "text.npz")
        split = run.root / "split.txt"
        split.write_text("".join(f"{sample.id}\n" for sample in samples))
        images = DataRequest(data.name, root=data.root, split=str(split.absolute()))
        make_maps(images, run.root / "text.npz", setting.preset, run, setting.weights)
        make_masks(run)
        for shown in samples[:count]:
            assert shown.mask is not None
            truth = read_mask(shown.mask)
            cam.update(truth, cam_mask(run.load_cams(shown.id), 1.0))
            crf.update(truth, run.load_pseudo(shown.id).mask)
        made += 1
    if not made:
        return None
    iou = [matrix.scores().iou[label + 1] or 0.0 for matrix in (cam, crf)]
    return Point(name, count, made, *iou)


def fit(setting: Setting, samples: Sequence[Sample], known: TextFeatures, path: Path) -> None:
    """Fit the vectors of a run beside those that are known, and save them."""
    fitted = fit_beside(
        [setting.encoded[sample.id] for sample in samples],
        known,
        logit_scale=setting.logit_scale,
        model=known.model,
        note=f"fitted for {Path(__file__).name}",
        progress=lambda _done, _total: None,
    )
    save_text_features(path, for_all(fitted.text, setting.data.classes))


def table(points: Sequence[Point]) -> str:
    """Return the Markdown table: the mean over classes for each number of images."""
    lines = ["| images of the class | classes | CAM IoU | CRF IoU |", "|---:|---:|---:|---:|"]
    for count in sorted({point.count for point in points}):
        of = [point for point in points if point.count == count]
        cam, crf = (100 * float(np.mean([getattr(p, way) for p in of])) for way in ("cam", "crf"))
        lines.append(f"| {count} | {len(of)} | {cam:.2f} | {crf:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="voc_sample")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--runs", type=int, default=3, help="of a class and number, at most")
    parser.add_argument("--limit", type=int, help="only the first N classes")
    parser.add_argument("--json", type=Path, help="also write every class's IoU to this file")
    options = parser.parse_args()
    name, _, split = options.data.partition("/")
    if (root := sample(name)) is None:
        return
    data = open_dataset(name.partition("_")[0], root=root, split=split or None)
    wanted = list(product(range(len(data.classes))[: options.limit], options.counts))
    groups = [parts(data, label, count, options.runs) for label, count in wanted]
    samples = chain.from_iterable(chain.from_iterable(groups))
    setting = prepare(data, samples, options.preset)
    with tempfile.TemporaryDirectory() as folder:
        found = [
            measure(setting, label, count, options.runs, Path(folder)) for label, count in wanted
        ]
    points = [point for point in found if point is not None]
    print(table(points))
    if options.json:
        rows = [[p.name, p.count, p.runs, p.cam, p.crf] for p in points]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
