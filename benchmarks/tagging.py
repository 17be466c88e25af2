"""Precision and recall of zero-shot tags on real images, and masks from tags instead of labels.

    python benchmarks/tagging.py [--data voc_sample|voc_more/train|voc_more/val|coco_sample ...]
                                 [--keep FOLDER]
    python benchmarks/tagging.py --masks [--data voc_more/val] [--preset NAME] [--keep FOLDER]

Tags each data set as ``clipes tag`` does, as one run, on the registry's weights and published text
features. No label is used for them, nor for the threshold, which is a probability; halves A
(images 0, 2, 4, ...) and B (the others) are scored for themselves, and beside the default stands
the threshold that is best on the other half. Labels: the XMLs', difficult objects included. F1 is
over all pairs of image and class together. With ``--masks`` maps and masks are made twice, from
tags and from the labels, and both are scored against all of the ground truth: an image without a
tag is all background.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from common import make_maps, make_masks, sample, write_text_features

from clipes.cli.options import listener
from clipes.config import AUTO_LABELS, TagParams
from clipes.datasets import Dataset, open_dataset
from clipes.disk.images import read_mask
from clipes.maps.tag_odds import class_probabilities
from clipes.masks.scores import ConfusionMatrix
from clipes.run.folder import Run
from clipes.stages.cam import ClipRequest, DataRequest
from clipes.stages.tag import tag_images
from clipes.stages.tag_candidates import kept

DATA = ("voc_sample", "voc_more/train", "coco_sample")

Scores = npt.NDArray[np.float64]
Shown = npt.NDArray[np.bool_]


def opened(name: str) -> tuple[str, DataRequest] | None:
    """Return the kind of a data set and what asks for its images and labels; None without them."""
    folder, _, split = name.partition("/")
    root = sample(folder)
    if root is None:
        return None
    kind = folder.split("_")[0]
    return kind, DataRequest(kind, root=root, split=split or None)


def tagged(kind: str, images: DataRequest, run: Run) -> tuple[Dataset, Scores]:
    """Tag images in a run folder; return them with their labels, and (n, C) probabilities."""
    text = run.root / "text.npz"
    run.root.mkdir(parents=True, exist_ok=True)
    write_text_features(text, kind)
    asked = replace(images, labels=Path(AUTO_LABELS))
    tag_images(asked, ClipRequest("registry", text_features=text), run, listener())
    data = open_dataset(kind, root=images.root, split=images.split)
    count = images.tags.count(len(data.classes))
    found = [kept(run, item.id, count) for item in data.samples]
    said = [one.candidates for one in found if one is not None]
    scores = np.zeros((len(said), len(data.classes)))
    for row, one, odds in zip(
        scores, said, class_probabilities(said, len(data.classes), images.tags), strict=True
    ):
        row[one.labels] = odds
    return data, scores


def quality(scores: Scores, shown: Shown, threshold: float) -> tuple[float, float, float]:
    """Return precision, recall and F1 of the tags over all images together."""
    tags = scores >= threshold
    hits = int((tags & shown).sum())
    precision = hits / max(1, int(tags.sum()))
    recall = hits / int(shown.sum())
    return precision, recall, 2 * precision * recall / max(1e-9, precision + recall)


def best_threshold(scores: Scores, shown: Shown) -> float:
    """Return the threshold with the best F1."""
    order = np.argsort(-scores, axis=None)
    hits = np.cumsum(shown.ravel()[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + shown.sum())
    return float(scores.ravel()[order][f1.argmax()])


def print_tags(name: str, data: Dataset, scores: Scores, default: float) -> None:
    """Print precision, recall and F1 of the tags of a data set, and of its halves."""
    shown = np.zeros(scores.shape, np.bool_)
    for row, item in zip(shown, data.samples, strict=True):
        row[list(item.labels)] = True
    even = np.arange(len(scores)) % 2 == 0
    print(f"{name}: {len(scores)} images, {shown.sum(1).mean():.2f} labels each")
    print("  threshold            of      precision  recall  F1")
    for half, other, which in ((even, ~even, "A"), (~even, even, "B")):
        best = best_threshold(scores[other], shown[other])
        print_row(f"{best:.2f} best of other", which, quality(scores[half], shown[half], best))
        print_row(f"{default:.2f} default", which, quality(scores[half], shown[half], default))
    print_row(f"{default:.2f} default", "all", quality(scores, shown, default))
    tags = scores >= default
    print(f"  images with exactly their labels: {100 * (tags == shown).all(1).mean():.0f} %")
    print(f"  images without a tag: {100 * (~tags.any(1)).mean():.0f} %")


def print_row(threshold: str, which: str, values: tuple[float, float, float]) -> None:
    """Print one line of the table."""
    numbers = "".join(f"{100 * value:<9.1f}" for value in values)
    print(f"  {threshold:<20} {which:<7} {numbers}".rstrip())


def print_masks(name: str, kind: str, images: DataRequest, folder: Path, preset: str) -> None:
    """Make masks from tags and from labels, and print the mIoU of both."""
    data = open_dataset(kind, root=images.root, split=images.split)
    for source, labels in (("tags", Path(AUTO_LABELS)), ("labels", None)):
        run = Run(folder / source)
        run.root.mkdir(parents=True, exist_ok=True)
        text = run.root / "text.npz"
        write_text_features(text, kind)
        make_maps(replace(images, labels=labels), text, preset, run)
        make_masks(run)
        matrix, without = ConfusionMatrix(1 + len(data.classes)), 0
        for item in data.samples:
            assert item.mask is not None
            truth = read_mask(item.mask)
            is_made = run.pseudo_path(item.id).is_file()
            without += not is_made
            matrix.update(truth, run.load_pseudo(item.id).mask if is_made else 0 * truth)
        miou = 100 * matrix.scores().miou
        print(f"{name}, from {source}: mIoU {miou:.2f} with CRF; {without} images without a mask")


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    """Tag the images and print a table of each data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", help=f"default: {' '.join(DATA)}")
    parser.add_argument("--keep", type=Path, help="keep the run folders here, and go on with them")
    parser.add_argument("--masks", action="store_true", help="masks from tags, and from labels")
    parser.add_argument("--preset", default="default", help="of the masks")
    options = parser.parse_args()
    for name in options.data or (["voc_more/val"] if options.masks else DATA):
        found = opened(name)
        if found is None:
            return
        kind, images = found
        with _folder(options.keep) as folder:
            place = folder / name.replace("/", "_")
            if options.masks:
                print_masks(name, kind, images, place, options.preset)
            else:
                data, scores = tagged(kind, images, Run(place / "tags"))
                print_tags(name, data, scores, TagParams().threshold)


if __name__ == "__main__":
    main()
