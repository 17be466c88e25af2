"""Precision and recall of zero-shot tags on real images, and the threshold that suits them.

    python benchmarks/tagging.py [--dataset voc|coco] [--limit N] [--cache FILE.npz]

Scores every class in every image of voc_sample (or coco_sample), as ``clipes tag`` does, on the
registry's weights and published text features. The threshold with the best F1 is chosen on every
second image and held to the others, both ways. Labels: the XMLs', difficult objects included.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from common import sample, write_text_features

from clipes.cli.console import progress_bar
from clipes.cli.options import listener
from clipes.config import TagParams
from clipes.datasets import Dataset, open_dataset
from clipes.disk.images import read_image
from clipes.stages.cam import ClipRequest
from clipes.stages.setup import load_clip
from clipes.stages.tag import Tagger
from clipes.words.vocabulary import load_vocabulary

Scores = npt.NDArray[np.float32]
Shown = npt.NDArray[np.bool_]


def score(data: Dataset, kind: str) -> Scores:
    """Return the (n, C) scores of the classes in the images."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.npz"
        write_text_features(text, kind)
        asked = ClipRequest("registry", text_features=text)
        clip = load_clip(asked, load_vocabulary(kind), listener())
    tagger = Tagger(clip.backbone, clip.text, TagParams())
    rows = []
    with progress_bar("tag") as progress:
        for index, item in enumerate(data.samples):
            rows.append(tagger(read_image(item.image)))
            progress(index + 1, len(data.samples))
    return np.stack(rows)


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


def main() -> None:
    """Score the images and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="voc", choices=["voc", "coco"])
    parser.add_argument("--limit", type=int, help="only the first N images")
    parser.add_argument("--cache", type=Path, help="keep the scores here, or take them from here")
    options = parser.parse_args()
    root = sample(f"{options.dataset}_sample")
    if root is None:
        return
    data = open_dataset(options.dataset, root=root)
    samples = data.samples[: options.limit]
    shown = np.zeros((len(samples), len(data.classes)), np.bool_)
    for row, item in zip(shown, samples, strict=True):
        row[list(item.labels)] = True
    if options.cache is not None and options.cache.is_file():
        with np.load(options.cache, allow_pickle=False) as arrays:
            scores = arrays["scores"]
    else:
        data = Dataset(data.name, data.root, data.classes, samples, ())
        scores = score(data, options.dataset)
        if options.cache is not None:
            np.savez(options.cache, scores=scores)
    even = np.arange(len(samples)) % 2 == 0
    print(f"{len(samples)} images, {shown.sum(1).mean():.2f} labels each")
    print("threshold  chosen on   held to     precision  recall  F1")
    for chosen, name, held, other in ((even, "even", ~even, "odd"), (~even, "odd", even, "even")):
        threshold = best_threshold(scores[chosen], shown[chosen])
        report(
            threshold,
            f"{name} images",
            f"{other} images",
            quality(scores[held], shown[held], threshold),
        )
    default = TagParams().threshold
    report(default, "(default)", "all images", quality(scores, shown, default))
    tags = scores >= default
    print(f"images with exactly their labels: {100 * (tags == shown).all(1).mean():.0f} %")
    print(f"images without a tag: {100 * (~tags.any(1)).mean():.0f} %")


def report(threshold: float, chosen: str, held: str, values: tuple[float, float, float]) -> None:
    """Print one line of the table."""
    numbers = "".join(f"{100 * value:<9.1f}" for value in values)
    print(f"{threshold:<10.3f} {chosen:<11} {held:<11} {numbers}".rstrip())


if __name__ == "__main__":
    main()
