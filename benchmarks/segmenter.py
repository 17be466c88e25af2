"""What the confidence-guided loss is worth to a small segmenter, on the real VOC sample.

    python benchmarks/segmenter.py RUN --backbone-weights resnet50_v1.safetensors --out OUT

RUN is a complete run of ``clipes cam`` and ``refine`` on voc_sample (see voc_sample.py), the
weights come from convert_backbone.py. The sample has no validation images, so its 164 are halved:
every second one (in the order of its list) is trained on, the others are predicted and scored.
Three trainings differ in nothing but what they learn: pseudo-masks cut by confidence, the same
masks whole, ground truth. Each goes through the command line as a user would do it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import SHARED, clipes

from clipes.cli.console import print_scores
from clipes.cli.options import listener
from clipes.disk.files import write_json
from clipes.run.folder import Run
from clipes.stages.evaluate import evaluate_run, scores_to_json

DATA = SHARED / "data" / "voc_sample"
ARMS = {
    "pseudo-masks, CGL": ["--cgl"],
    "pseudo-masks, no CGL": ["--no-cgl"],
    "ground truth": ["--no-cgl", "--masks", str(DATA / "SegmentationClassAug")],
}


def halves(folder: Path) -> tuple[Path, Path]:
    """Write the list of images to train on and that of images to predict."""
    ids = (DATA / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    paths = folder / "half.txt", folder / "other-half.txt"
    folder.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(paths):
        path.write_text("\n".join(ids[index::2]) + "\n")
    return paths


def train(run: Path, out: Path, learns: list[str], recipe: list[str]) -> dict[str, Any]:
    """Train one arm and return its scores."""
    start = time.monotonic()
    clipes("train-seg", "--run", run, "--out", out, *learns, *recipe)
    seconds = time.monotonic() - start
    scored = evaluate_run(Run(out), DATA, None, [1.0], listener())
    print_scores(scored, per_class=False)
    write_json(out / "segmenter.json", scores_to_json(scored))
    (scores,) = scores_to_json(scored)["stages"].values()
    return {"seconds": round(seconds), **scores}


def main() -> None:
    """Train the three, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder with pseudo-masks of voc_sample")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three")
    parser.add_argument("--backbone", default="resnet50_v1")
    parser.add_argument("--backbone-weights", required=True)
    parser.add_argument("--iterations", default="320")
    parser.add_argument("--crop", default="161")
    parser.add_argument("--batch", default="4")
    parser.add_argument("--lr", default="1.5e-4")
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    if not DATA.is_dir():
        print(f"skipped: the VOC sample is not at {DATA}; set CLIPES_SHARED")
        return
    half, other = (path.absolute() for path in halves(options.out))
    recipe = ["--preset", "small", "--split", half, "--val", other, "--root", DATA]
    recipe += ["--backbone", options.backbone, "--backbone-weights", options.backbone_weights]
    recipe += ["--iterations", options.iterations, "--crop", options.crop]
    recipe += ["--batch", options.batch, "--test-scales", "1", "--no-flip", "--save-every", "50"]
    recipe += ["--amp", options.amp, "--seed", options.seed, "--lr", options.lr]
    table = {}
    for name in options.arms:
        folder = options.out / name.replace(", ", "-").replace(" ", "-").lower()
        table[name] = train(options.run, folder, ARMS[name], list(map(str, recipe)))
        (options.out / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    print("learnt from\tmIoU\tpixel accuracy\tseconds")
    for name, row in table.items():
        miou, accuracy = 100 * row["miou"], 100 * row["pixel_accuracy"]
        print(f"{name}\t{miou:.2f}\t{accuracy:.2f}\t{row['seconds']}")


if __name__ == "__main__":
    main()
