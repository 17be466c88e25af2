"""Masks and a segmenter from image-level labels alone, on all real VOC images beside the checkout.

    python benchmarks/frozen.py OUT [--preset default] [--segmenter frozen] [--seeds 0 1 2]
        [--third 0] [--truth] [--relabel] [-- OPTIONS]

One run over voc_sample and voc_more/train, 484 images: maps, masks, their scores on both parts.
Then ``train-seg`` on these masks (with ``--truth``, also on the ground truth, which is the most
that can be hoped for), and the scores of its predictions of voc_more/val, 75 images without any
label, before and after the dense CRF; with ``--relabel`` also those of the masks that it gives the
images it learnt from; halves A and B are every second image of voc_sample. ``--third 0`` (1, 2)
leaves voc_more/val alone, where settings are chosen: every third image of the 484, from the first
(second, third) on, is predicted by what was learnt from the others. OPTIONS go to train-seg.
Everything continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import clipes, make_maps, make_masks, sample, write_text_features

from clipes.datasets import VOC_CLASSES
from clipes.disk.images import read_mask
from clipes.masks.scores import ConfusionMatrix
from clipes.run.folder import Run
from clipes.stages.cam import DataRequest

PARTS = {"voc_sample": ("voc_sample", "train"), "voc_more/train": ("voc_more", "train"),
         "voc_more/val": ("voc_more", "val")}  # fmt: skip
LEARNT = ("voc_sample", "half A", "half B", "voc_more/train")
TRUTH, LISTS = "SegmentationClassAug", Path("ImageSets", "Segmentation")


def join(folder: Path) -> dict[str, list[str]] | None:
    """Lay the images of all parts into one VOC folder, as links; return the ids of each part."""
    ids: dict[str, list[str]] = {}
    (folder / LISTS).mkdir(parents=True, exist_ok=True)
    for part, (name, split) in PARTS.items():
        data = sample(name)
        if data is None:
            return None
        ids[part] = (data / LISTS / f"{split}.txt").read_text().split()
        for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml"), (TRUTH, "png")):
            (folder / kind).mkdir(exist_ok=True)
            for one in ids[part]:
                link = folder / kind / f"{one}.{suffix}"
                if not link.is_symlink():
                    link.symlink_to(data.resolve() / kind / link.name)
    learnt = [*ids["voc_sample"], *ids["voc_more/train"]]
    ids["half A"], ids["half B"] = ids["voc_sample"][::2], ids["voc_sample"][1::2]
    lists = {"train": learnt, "val": ids["voc_more/val"]}
    for third in range(3):
        ids[f"third-{third}"] = lists[f"third-{third}"] = learnt[third::3]
        lists[f"not-third-{third}"] = [one for i, one in enumerate(learnt) if i % 3 != third]
    for name, some in lists.items():
        (folder / LISTS / f"{name}.txt").write_text("\n".join(some) + "\n")
    return ids


def miou(masks: Path, data: Path, ids: Sequence[str]) -> float:
    """Return the mIoU in % of masks of some images."""
    matrix = ConfusionMatrix(1 + len(VOC_CLASSES))
    for one in ids:
        matrix.update(read_mask(data / TRUTH / f"{one}.png"), read_mask(masks / f"{one}.png"))
    return 100 * matrix.scores().miou


def train(run: Path, data: Path, out: Path, val: Sequence[str], options: Sequence[str]) -> str:
    """Train and predict; return minutes, and the scores without and with the CRF, as a row."""
    start = time.monotonic()
    clipes("train-seg", run, "--root", data, "--out", out, "--no-crf", *options)
    minutes = (time.monotonic() - start) / 60
    images = [data / "JPEGImages" / f"{one}.jpg" for one in val]
    clipes("predict", out / "checkpoints" / "final.pt", *images, "--out", out / "crf", "--crf")
    scores = [miou(out / name, data, val) for name in ("predictions", "crf")]
    return f"{minutes:.1f} | {scores[0]:.2f} | {scores[1]:.2f}"


def relabel(run: Run, data: Path, out: Path, ids: Mapping[str, Sequence[str]]) -> str:
    """Let a trained segmenter label again what it learnt from; return the scores as cells."""
    clipes("relabel", run.root, "--from", out / "checkpoints" / "final.pt", "--root", data)
    masks = run.root / "relabelled" / "pseudo"
    return " | ".join(f"{miou(masks, data, ids[part]):.2f}" for part in LEARNT)


def options_of() -> tuple[argparse.Namespace, list[str]]:
    """Return what is asked for, and what is passed on to train-seg."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--preset", default="default", help="of the masks")
    parser.add_argument("--seeds", nargs="*", default=["0"], help="of the trainings; none: none")
    parser.add_argument("--segmenter", default="frozen", help="preset of train-seg")
    parser.add_argument("--third", type=int, choices=range(3), help="predict that, not the val")
    parser.add_argument("--truth", action="store_true", help="also learn the ground truth")
    parser.add_argument("--relabel", action="store_true", help="also label the images again")
    behind = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    return parser.parse_args(sys.argv[1:behind]), sys.argv[behind + 1 :]


def main() -> None:
    """Make masks, train, and print both tables."""
    asked, of_training = options_of()
    data, run = (asked.out / "data").absolute(), Run(asked.out / f"masks-{asked.preset}")
    if (ids := join(data)) is None:
        return
    text = asked.out / "text.npz"
    write_text_features(text, "voc")
    make_maps(DataRequest("voc", root=data, split="train"), text, asked.preset, run)
    make_masks(run)
    print(f"\n| masks of preset {asked.preset} | CRF |\n|---|---|")
    for part in LEARNT:
        print(f"| {part} | {miou(run.root / 'pseudo', data, ids[part]):.2f} |", flush=True)
    rows: dict[str, str] = {}
    held_out, kept = "voc_more/val", []
    if asked.third is not None:
        held_out = f"third-{asked.third}"
        kept = ["--split", f"not-{held_out}", "--val", held_out]
    for seed in asked.seeds:
        for name in ("masks", "truth")[: 1 + asked.truth]:
            which = f"{asked.preset}-{asked.segmenter}-{name}-{seed}"
            out = asked.out / (f"{held_out}-{which}" if kept else which)
            truth = ["--no-cgl", "--masks", str(data / TRUTH)] if name == "truth" else []
            options = ["--preset", asked.segmenter, *truth, "--seed", seed, *kept, *of_training]
            row = train(run.root, data, out, ids[held_out], options)
            if asked.relabel:
                row += f" | {relabel(run, data, out, ids)}"
            rows[f"{name}, seed {seed}"] = row
            (asked.out / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    again = [f"{part} again" for part in LEARNT if asked.relabel]
    columns = ["learnt from", "minutes", held_out, "+ CRF", *again]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, row in rows.items():
        print(f"| {name} | {row} |")


if __name__ == "__main__":
    main()
