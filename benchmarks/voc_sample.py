"""CAM and CRF mIoU on the real VOC sample, with the text features the reference was scored with.

    python benchmarks/voc_sample.py [--preset reference] [--limit N] [--out RUN]

Runs ``clipes cam``, ``refine`` and ``eval`` as a user would. Weights: registry. Text features and
background rows: as in shared/WEIGHTS.md, where the reference's own scores are (66.50 CAM, 68.57
with CRF).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from clipes.datasets import VOC_CLASSES

SHARED = Path(os.environ.get("CLIPES_SHARED", Path(__file__).resolve().parents[2] / "shared"))

# Background words of WEIGHTS.md and their rows in coco_single.npy (COCO, then COCO-Stuff by name).
BACKGROUND = {
    "ground-other": 114, "dirt": 99, "grass": 112, "tree": 157, "building-other": 84,
    "wall-other": 161, "sky-other": 145, "water-other": 166, "river": 136, "sea": 143,
    "railroad": 135, "keyboard": 66, "clouds": 94, "house": 116, "mountain": 123, "road": 137,
    "rock": 138, "pavement": 128, "hill": 115, "bridge": 83, "floor-other": 103, "stone": 150,
}  # fmt: skip


def text_features(path: Path) -> None:
    """Write the classes and background words of WEIGHTS.md in the ``--text-features`` format."""
    classes = np.load(SHARED / "features" / "voc12_single.npy", allow_pickle=False)
    coco = np.load(SHARED / "features" / "coco_single.npy", allow_pickle=False)
    rows = list(BACKGROUND.values())
    np.savez(
        path,
        names=np.array([*VOC_CLASSES, *BACKGROUND]),
        features=np.concatenate([classes, coco[rows]]).astype(np.float32),
        background=np.arange(len(VOC_CLASSES) + len(rows)) >= len(VOC_CLASSES),
        model=np.array("OpenAI ViT-B/16, 'a photo of a {}'"),
    )


def main() -> None:
    """Run the stages and print the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="reference")
    parser.add_argument("--limit", type=int, help="only the first N images of the list")
    parser.add_argument("--out", type=Path, help="keep the run folder here")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    options = parser.parse_args()
    data = SHARED / "data" / "voc_sample"
    if not data.is_dir():
        print(f"skipped: the VOC sample is not at {data}; set CLIPES_SHARED")
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run = options.out or work / "run"
        text_features(work / "text.npz")
        ids = (data / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
        (work / "split.txt").write_text("\n".join(ids[: options.limit]) + "\n")
        cam = ["cam", "--dataset", "voc", "--root", data, "--split", work / "split.txt"]
        cam += ["--weights", "registry", "--text-features", work / "text.npz"]
        clipes(*cam, "--preset", options.preset, "--out", run)
        clipes("refine", run)
        clipes("eval", run, *(["--json", options.json] if options.json else []))


def clipes(*arguments: object) -> None:
    """Run a command of the product; stop if it fails."""
    command = [sys.executable, "-m", "clipes", *map(str, arguments)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
