"""What several texts a class are worth: averaged, or the largest score at each patch.

    python benchmarks/descriptions.py [--data voc_sample|voc_more/train|voc_more/val|coco_sample]
                                      [--preset default|clip|fast] [--limit N] [--crf]

Where no text tower is to be had, published vectors of kinds and parts (`photo_of_a.npz`: minibus,
rowing boat, face, person sitting on a chair) stand for descriptions, of the classes that have some
there. An image is encoded once. The table: mIoU of half A (images 0, 2, 4, ...), half B and all, of
the maps and, with ``--crf``, of the masks; seconds are without the towers. Weights: registry.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from ablation import DATA, Result, load_photos, table
from common import SHARED, write_text_features
from tapes import Photo, Row, Tape, score_row

from clipes.choices import Descriptions, Fusion
from clipes.cli.options import listener
from clipes.config import get_preset
from clipes.device import keep_freed_memory
from clipes.disk.images import read_image
from clipes.maps.evidence import PatchEvidence, compared, look
from clipes.maps.maker import CamMaker, EncodedImage
from clipes.maps.vectors import WordVectors
from clipes.names import SAME_THING
from clipes.stages.setup import load_dino, open_weights
from clipes.towers.side_by_side import Towers
from clipes.words.encode import from_given
from clipes.words.features import TextFeatures, load_text_features, unit_rows
from clipes.words.vocabulary import Vocabulary

KINDS = {
    "aeroplane": ("airplane", "glider"),
    "bicycle": ("cyclist", "tricycle"),
    "boat": ("ship", "rowing boat", "pedalo", "jet ski"),
    "bottle": ("plastic bottle", "glass bottle", "feeding bottle"),
    "bus": ("minibus",),
    "car": ("van", "large family car", "jeep", "SUV", "pickup truck"),
    "cat": ("domestic cat",),
    "chair": ("armchair", "swivel chair", "deckchair", "stool"),
    "diningtable": ("dining table", "table for eating at", "table"),
    "dog": ("domestic dog",),
    "horse": ("pony", "donkey"),
    "motorbike": ("motorcycle", "moped", "scooter", "minibike"),
    "person": ("people", "baby", "face", "standing person", "walking person",
               "person sitting on a chair", "pedestrian", "rider"),
    "pottedplant": ("potted plant", "indoor plant in a pot", "outdoor plant in a pot", "plant"),
    "sofa": ("couch",),
    "train": ("train carriage", "tram"),
    "tvmonitor": ("tv", "monitor", "standalone screen", "crt screen", "television receiver"),
}  # fmt: skip
"""Texts of photo_of_a.npz by VOC's names."""

WAYS = (None, *Descriptions)


def described(classes: tuple[str, ...]) -> Vocabulary:
    """Return the classes with their kinds, less those that are classes themselves."""
    of_voc = {other: name for name, other, *_ in SAME_THING}
    kinds = {name: KINDS.get(name) or KINDS.get(of_voc.get(name, ""), ()) for name in classes}
    others = {name: tuple(kind for kind in of if kind not in classes) for name, of in kinds.items()}
    return Vocabulary(classes, (), descriptions={name: of for name, of in others.items() if of})


def published(kind: str) -> TextFeatures:
    """Return the vectors of docs/weights.md, and those of the kinds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.npz"
        write_text_features(path, kind)
        text = load_text_features(path)
    with np.load(SHARED / "features" / "photo_of_a.npz", allow_pickle=False) as file:
        rows = dict(zip(file["words"].tolist(), unit_rows(file["features"]), strict=True))
    more = {name: row for name, row in rows.items() if name not in text.classes}
    vectors = np.concatenate([text.class_vectors, np.stack(list(more.values()))])
    return TextFeatures((*text.classes, *more), text.background_words, vectors,
                        text.background_vectors, text.model)  # fmt: skip


def tapes(
    towers: Towers, texts: Sequence[TextFeatures], row: Row, photos: Sequence[Photo]
) -> Iterator[list[Tape]]:
    """Look at each image once, and compare what is seen with the texts, one after the other."""
    assert row.cam.patches is not None
    words = [WordVectors(text, towers.device, towers.clip.visual.proj.dtype) for text in texts]
    with listener().progress("encode") as progress:
        for number, photo in enumerate(photos):
            image = read_image(photo.sample.image)
            prepared = CamMaker(towers, texts[0], row.cam).prepare(image, photo.sample.labels)
            (seen,) = look(towers, row.cam, {n: one[None] for n, one in prepared.pixels.items()})
            tokens = {name: part.half() for name, part in seen.tokens.items()}
            of_image = []
            for vectors in words:
                labels = vectors.by_name(prepared.labels)
                told = compared(
                    seen.features, vectors, labels, seen.grid, row.cam.patches.temperature
                )
                evidence = PatchEvidence(told[0], seen.attention, tokens, told[1])
                encoded = EncodedImage(prepared.labels, prepared.size, evidence)
                of_image.append(Tape(photo, encoded, 0.0))
            yield of_image
            progress(number + 1, len(photos))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=DATA, default="voc_sample")
    parser.add_argument("--preset", choices=("default", "clip", "fast"), default="default")
    parser.add_argument("--limit", type=int, help="only the first N images")
    parser.add_argument("--crf", action="store_true", help="score masks, too")
    options = parser.parse_args()
    photos, classes = load_photos([options.data], options.limit)
    if not photos:
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    kind = options.data.partition("_")[0]
    preset = get_preset(options.preset).for_dataset(kind)
    row = Row(preset.name, preset.cam, preset.crf, preset.background_exponent)
    clip = open_weights("registry", "ViT-B-16", "cpu", listener())
    beside = {name: load_dino("auto", "cpu", listener()) for name in row.others}
    towers = Towers(clip.backbone(fp16_positions=row.cam.fp16_positions), beside)
    words, given = described(classes), published(kind)
    texts = [from_given(given, words, Fusion.sentence, way) for way in WAYS]
    columns = zip(*tapes(towers, texts, row, photos), strict=True)
    results = []
    for way, text, column in zip(WAYS, texts, columns, strict=True):
        maker = CamMaker(towers, text, row.cam)
        scores = score_row(row, maker, column, 1 + len(classes), crf=options.crf)
        (score,) = scores.values()
        results.append(Result(preset.name, str(way or "names alone"), options.data, *score))
        print(f"{results[-1].row}: {score[0].full:.2f}", file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    main()
