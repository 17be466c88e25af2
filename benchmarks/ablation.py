"""What each part of the presets `fast` and `default` is worth, on real images of VOC or COCO.

    python benchmarks/ablation.py [--data voc_sample|voc_more/train|voc_more/val|coco_sample ...]
                                  [--rows WORD ...] [--limit N] [--crf main|all]
                                  [--dino SOURCE] [--json FILE]

Several data sets are one run, whose images learn from each other, and are scored one by one. An
image is encoded once for all rows that need the same of it; all steps are the product's own, on the
registry's weights and the text features of docs/weights.md. The tables go to stdout: mIoU of half
A (images 0, 2, 4, ...), half B (the others) and of all, of the maps and, with ``--crf``, of the
masks; and the processor's seconds per image. A row for which only some settings are named has the
others of its section's first row.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from common import sample, write_text_features
from tapes import FOLDS, Photo, Row, Score, score_row, tape_all

from clipes.config import LooksRound, NeighbourParams, get_preset
from clipes.datasets import open_dataset
from clipes.device import keep_freed_memory
from clipes.listener import Listener
from clipes.maps.maker import CamMaker
from clipes.stages.setup import load_dino, open_weights
from clipes.towers.side_by_side import Towers
from clipes.words.features import load_text_features

DATA = ("voc_sample", "voc_more/train", "voc_more/val", "coco_sample")

Sections: TypeAlias = dict[str, list[Row]]
MakeMaker: TypeAlias = Callable[[Row], CamMaker]


@dataclass(frozen=True)
class Result:
    """A row's scores on a data set; ``crf`` is None if its masks were not asked for."""

    section: str
    row: str
    data: str
    cam: Score
    crf: Score | None


def sections(kind: str) -> Sections:
    """Return all rows for a kind of data set; those of a section differ from its first."""
    published, fast, clip, default = (
        row_of(name, kind) for name in ("reference", "fast", "clip", "default")
    )
    others = _vary(default, f"other images only, {FOLDS} parts", held_out=True, own=False)
    small = [(f"a sample of {count}, and its own", count) for count in (10, 41, 82)]
    return {
        "Published": [
            replace(published, name="published"),
            _cam(published, "boxes may touch the border", last_row_in_box=True),
        ],
        "One image alone": [
            fast,
            *_common(fast, published),
            *(_cam(fast, f"t = {power}", walk_power=power) for power in (1, 3)),
        ],
        "What the classes of the run look like, to CLIP alone": [clip],
        "What they look like to both towers": [
            default,
            *_common(default, published),
            _patches(default, "t = 2", walk_power=2),
            *_each(default, "strong", (0.6, 0.8)),
            *_each(default, "weak", (0.2, 0.4)),
            *_each(default, "ridge", (0.005, 0.1)),
            *_each(default, "looks_weight", (0.05, 0.2)),
            *_each(default, "words_weight", (0.0, 0.25, 1.0)),
        ],
        "Rounds and towers": [default, *_rounds(default)],
        "Neighbours": [default, *_neighbours(default)],
        "A closer look": [
            default,
            *(replace(row, main=True) for row in _each(default, "finer", (1.0, 2.0))),
            *(replace(row, main=True) for row in _each(default, "finer_parts", (1, 3))),
            *_each(default, "finer_block", (2, 4, 12)),
            *_each(default, "finer_temperature", (0.035, 0.1)),
        ],
        "Whose patches say what the classes look like": [
            *(_patches(default, name, statistics_images=count) for name, count in small),
            replace(others, main=True),
            replace(others, name=f"other images and its own, {FOLDS} parts", own=True, main=True),
        ],
    }


def row_of(name: str, kind: str) -> Row:
    """Return the row of a preset, on a kind of data set."""
    preset = get_preset(name).for_dataset(kind)
    return Row(name, preset.cam, preset.crf, preset.background_exponent, main=True)


def _rounds(default: Row) -> list[Row]:
    """Return the rows about how often, with which towers and whose background it is looked."""
    assert default.cam.patches is not None
    dino, alike = default.cam.patches.rounds
    clip, both = LooksRound(), replace(alike, likeness_weight=0.0)

    def rounds(name: str, *some: LooksRound) -> Row:
        return _vary(_patches(default, name, rounds=some), name, main=True)

    shares = (replace(dino, own_background=share) for share in (0.0, 0.25, 0.5))
    weighed = (replace(both, likeness_weight=weight) for weight in (0.35, 0.65, 1.0))
    return [
        rounds("CLIP twice", clip, clip),
        rounds("DINOv2 once", dino),
        rounds("both towers once, and their walk", alike),
        rounds("DINOv2, then both, CLIP's walk", dino, both),
        rounds("DINOv2, then both, their walk twice", replace(alike, towers=dino.towers), alike),
        *(rounds(f"own background {one.own_background:g}", one, alike) for one in shares),
        rounds("three rounds", dino, alike, alike),
        rounds("own background in both rounds", dino, replace(alike, own_background=0.15)),
        *(rounds(f"likeness' weight {one.likeness_weight:g}", dino, one) for one in weighed),
        *_each(default, "likeness_temperature", (0.07, 0.15)),
    ]


_AROUND_NEIGHBOURS: Mapping[str, tuple[float, ...]] = {
    "regions": (12, 48),
    "neighbours": (10, 50),
    "temperature": (0.05, 0.1),
    "balance": (0.0, 1.0),
    "sure": (0.75, 0.95),
    "doubted": (0.4, 0.6),
    "least_images": (2, 8),
}


def _neighbours(default: Row) -> list[Row]:
    """Return the rows about asking neighbours: never, with other settings, after both rounds."""
    assert default.cam.patches is not None
    first, second = default.cam.patches.rounds
    assert first.neighbours is not None

    def asking(name: str, neighbours: NeighbourParams | None) -> Row:
        rounds = (replace(first, neighbours=neighbours), second)
        return _vary(_patches(default, name, rounds=rounds), name, main=True)

    return [
        asking("no neighbours", None),
        *(
            asking(
                f"neighbours: {name.replace('_', ' ')} {value:g}",
                replace(first.neighbours, **{name: value}),
            )
            for name, values in _AROUND_NEIGHBOURS.items()
            for value in values
        ),
    ]


def _common(base: Row, published: Row) -> list[Row]:
    """Return the rows of both presets about words, boxes, background and CRF."""
    threshold = base.cam.box_threshold
    near = [round(threshold + step, 1) for step in (-0.1, 0.1)]
    return [
        _vary(base, f"{base.name}, 10 CRF iterations", crf=published.crf, main=True),
        *_each(base, "temperature", (25.0, 100.0)),
        *(_cam(base, f"lambda {value:g}", box_threshold=value) for value in near),
        _cam(base, "no boxes", box_threshold=0.0),
        *(_vary(base, f"alpha {value:g}", exponent=value) for value in (0.5, 0.75, 1.5)),
    ]


def _each(base: Row, setting: str, values: Iterable[float]) -> list[Row]:
    name = setting.replace("_", " ")
    return [_patches(base, f"{name} {value:g}", **{setting: value}) for value in values]


def _vary(base: Row, name: str, **changes: Any) -> Row:  # noqa: ANN401 - the fields of a row
    return replace(base, **{"name": name, "main": False, **changes})


def _cam(base: Row, name: str, **settings: Any) -> Row:  # noqa: ANN401 - the fields of CamParams
    return _vary(base, name, cam=replace(base.cam, **settings))


def _patches(base: Row, name: str, **settings: Any) -> Row:  # noqa: ANN401 - of PatchParams
    assert base.cam.patches is not None
    return _cam(base, name, patches=replace(base.cam.patches, **settings))


def chosen(given: Sections, words: Sequence[str]) -> Sections:
    """Keep the rows of which ``section: name`` holds one of ``words``; all if there are none."""
    kept = {
        title: [row for row in rows if any(word in f"{title}: {row.name}" for word in words)]
        for title, rows in given.items()
    }
    return {title: rows for title, rows in kept.items() if rows} if words else given


def run(
    given: Sections, photos: Sequence[Photo], make: MakeMaker, n_labels: int, *, crf: str
) -> list[Result]:
    """Score all rows, and masks of ``none``, ``main`` or ``all``, telling stderr about each."""
    order = [(title, row) for title, rows in given.items() for row in rows]
    found: dict[tuple[str, str], list[Result]] = {}
    for needs in dict.fromkeys(row.of_a_pass for _, row in order):
        rows = [(title, row) for title, row in order if row.of_a_pass == needs]
        _say(f"encoding {len(photos)} images for {len(rows)} rows")
        tapes = list(tape_all(make(rows[0][1]), photos))
        for title, row in rows:
            masks = crf == "all" or (crf == "main" and row.main)
            scores = score_row(row, make(row), tapes, n_labels, crf=masks)
            results = [Result(title, row.name, data, *pair) for data, pair in scores.items()]
            found[title, row.name] = results
            for one in results:
                after = "" if one.crf is None else f", CRF {one.crf.full:.2f}"
                _say(f"{title}: {row.name}: {one.data}: {one.cam.full:.2f}{after}")
    return [one for title, row in order for one in found[title, row.name]]


def table(results: Sequence[Result]) -> str:
    """Return the Markdown table of the results on one data set."""
    head = ["", "CAM A", "CAM B", "CAM", "s", "CRF A", "CRF B", "CRF", "s"]
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines, title = [head, rule], ""
    for one in results:
        if one.section != title:
            title = one.section
            lines.append([f"**{title}**", *[""] * (len(head) - 1)])
        lines.append([one.row, *_cells(one.cam), *_cells(one.crf)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(score: Score | None) -> list[str]:
    if score is None:
        return [""] * 4
    numbers = [f"{value:.2f}" for value in (score.half_a, score.half_b, score.full)]
    return [*numbers, f"{score.seconds:.3f}"]


def load_photos(names: Sequence[str], limit: int | None) -> tuple[list[Photo], tuple[str, ...]]:
    """Return the images of data sets of one kind, at most ``limit`` of each, and its classes."""
    photos: list[Photo] = []
    classes: tuple[str, ...] = ()
    for name in names:
        folder, _, split = name.partition("/")
        if (root := sample(folder)) is not None:
            dataset = open_dataset(folder.partition("_")[0], root=root, split=split or None)
            classes = dataset.classes
            with_mask = [one for one in dataset.samples if one.mask is not None][:limit]
            photos += [Photo(name, number % 2, one) for number, one in enumerate(with_mask)]
    return photos, classes


def load_maker(kind: str, classes: tuple[str, ...], others: Iterable[str], dino: str) -> MakeMaker:
    """Return what returns the maker of a row: towers, and the published vectors of ``classes``."""
    opened = open_weights("registry", "ViT-B-16", "cpu", Listener(_say))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.npz"
        write_text_features(path, kind)
        text = load_text_features(path).for_classes(classes)
    clips = {rounded: opened.backbone(fp16_positions=rounded) for rounded in (False, True)}
    beside = {name: load_dino(dino, "cpu", Listener(_say)) for name in others}

    def make(row: Row) -> CamMaker:
        some = {name: beside[name] for name in row.others}
        return CamMaker(Towers(clips[row.cam.fp16_positions], some), text, row.cam)

    return make


def main() -> None:
    """Print the tables."""
    options = _options()
    names = list(dict.fromkeys(options.data))
    kinds = {name.partition("_")[0] for name in names}
    if len(kinds) > 1:
        sys.exit("data sets of other classes cannot be one run")
    photos, classes = load_photos(names, options.limit)
    if not photos:
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    (kind,) = kinds
    given = chosen(sections(kind), options.rows)
    others = dict.fromkeys(name for rows in given.values() for row in rows for name in row.others)
    make = load_maker(kind, classes, others, options.dino)
    results = run(given, photos, make, 1 + len(classes), crf=options.crf)
    for name in dict.fromkeys(photo.data for photo in photos):
        count = sum(photo.data == name for photo in photos)
        print(table([one for one in results if one.data == name]))
        print(f"\n{count} images of {name}, in a run of {len(photos)}; seconds of one thread of")
        print(f"{platform.machine()} with torch {torch.__version__}.\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=["voc_sample"],
                        help="several are one run, scored separately")  # fmt: skip
    parser.add_argument("--rows", nargs="+", default=[], metavar="WORD",
                        help="only rows whose section and name hold one of these")  # fmt: skip
    parser.add_argument("--limit", type=int, help="only the first N images of each")
    parser.add_argument("--crf", choices=("none", "main", "all"), default="none",
                        help="rows whose masks are scored, too")  # fmt: skip
    parser.add_argument("--dino", default="auto", help="weights of DINOv2")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    return parser.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
