"""What each part of the presets `fast` and `default` is worth, on the real VOC or COCO sample.

    python benchmarks/ablation.py [--data voc_sample|coco_sample] [--rows WORD ...]
                                  [--skip WORD ...] [--limit N] [--crf main|all] [--json FILE]

Every image is encoded once for all rows; all steps are the product's own functions, on the
registry's weights and the text features of docs/weights.md. The table goes to stdout: mIoU of
half A (images 0, 2, 4, ...), half B (the others) and of all, of the maps and, with ``--crf``, of
the masks; and the processor time per image, the published method's being 1. A row for which only
some settings are named has the others of its section's first row.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import sample, write_text_features
from tapes import (
    ALIKE,
    FIRST_ONLY,
    FOLDS,
    GRADIENT,
    MIRRORED,
    RIVALS,
    SECOND_ONLY,
    WITH_GRADIENT,
    Learn,
    Row,
    Score,
    Tape,
    Towers,
    Words,
    make_tape,
    pieces_needed,
    score_row,
)

from clipes.config import BOX_THRESHOLDS, Preset, get_preset
from clipes.datasets import open_dataset
from clipes.device import keep_freed_memory
from clipes.stages.setup import open_weights
from clipes.words.features import load_text_features

KINDS = {"voc_sample": "voc", "coco_sample": "coco"}


@dataclass(frozen=True)
class Section:
    """Rows that differ from the first of them."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Result:
    """A row's scores; ``crf`` is None if its masks were not asked for."""

    section: str
    row: str
    cam: Score
    crf: Score | None


def sections(kind: str) -> list[Section]:
    """Return all rows for a kind of data set."""
    published, fast, default = (_row(name, kind) for name in ("reference", "fast", "default"))
    ten = published.crf
    gradient = _vary(fast, "gradient maps, boxes may touch the border", look=GRADIENT)
    return [
        Section("Published", (replace(published, name="published"), gradient)),
        Section(
            "One image alone",
            (
                fast,
                _vary(fast, "fast, 10 CRF iterations", crf=ten, main=True),
                _vary(fast, "own values only", look=FIRST_ONLY),
                _vary(fast, "alike values only", look=SECOND_ONLY),
                *_each(fast, "temperature", (25.0, 100.0)),
                *_common(fast),
                *(_cam(fast, f"t = {t}", walk_power=t) for t in (1, 3)),
                *_helpless(fast),
                _vary(fast, "mean with the gradient maps", look=WITH_GRADIENT),
            ),
        ),
        Section(
            "With what the classes of the run look like",
            (
                default,
                _vary(default, "default, 10 CRF iterations", crf=ten, main=True),
                _patches(default, "t = 2", walk_power=2),
                _patches(default, "t = 2, strong 0.6", walk_power=2, strong=0.6),
                *_each(default, "strong", (0.6, 0.8)),
                *_each(default, "weak", (0.2, 0.4)),
                *_each(default, "ridge", (0.005, 0.1)),
                *_each(default, "looks_weight", (0.05, 0.2)),
                *_each(default, "words_weight", (0.0, 0.25, 1.0)),
                *_each(default, "temperature", (25.0, 100.0)),
                *_common(default),
                _vary(default, "own values only", look=FIRST_ONLY),
                _vary(default, "alike values only", look=SECOND_ONLY),
                _vary(default, "learnt from gradient maps", look=GRADIENT),
                *_helpless(default),
                _vary(default, "mean with the maps at scale 1.5", enlarge=1.5, main=True),
            ),
        ),
        Section(
            "Whose patches say what the classes look like",
            (
                *_samples(default),
                _vary(default, f"other images only, {FOLDS} parts", learn=Learn.held_out,
                      main=True),
                _vary(default, f"other images and its own, {FOLDS} parts",
                      learn=Learn.held_out_own, main=True),
                _vary(default, "all images, its own twice", learn=Learn.twice),
                _vary(default, "means of its own, covariance of all", learn=Learn.own_means),
                replace(_patches(default, "its own only, ridge 0.1", ridge=0.1), learn=Learn.own),
            ),
        ),
    ]  # fmt: skip


def _row(name: str, kind: str) -> Row:
    preset: Preset = get_preset(name)
    if kind in BOX_THRESHOLDS:
        preset = preset.with_box_threshold(BOX_THRESHOLDS[kind])
    return Row(name, preset.cam, preset.crf, preset.background_exponent, main=True)


def _common(base: Row) -> list[Row]:
    """Return the rows of both presets about boxes and background."""
    threshold = base.cam.box_threshold
    near = [round(threshold + step, 1) for step in (-0.1, 0.1)]
    return [
        *(_cam(base, f"lambda {value:g}", box_threshold=value) for value in near),
        _cam(base, "no boxes", box_threshold=0.0),
        *(_vary(base, f"alpha {value:g}", exponent=value) for value in (0.5, 0.75, 1.5)),
    ]


def _helpless(base: Row) -> list[Row]:
    """Return the rows of both presets that were tried and are not used."""
    return [
        _vary(base, "mean with the mirrored image's patches", look=MIRRORED),
        _vary(base, "absent classes compete, too", look=RIVALS),
        _vary(base, "affinity: queries and keys alike", look=ALIKE),
    ]


def _samples(base: Row) -> list[Row]:
    return [
        _patches(base, f"a sample of {count}, and its own", statistics_images=count)
        for count in (10, 41, 82)
    ]


def _each(base: Row, setting: str, values: Iterable[float]) -> list[Row]:
    name = setting.replace("_weight", "' weight")
    return [_patches(base, f"{name} {value:g}", **{setting: value}) for value in values]


def _vary(base: Row, name: str, **changes: Any) -> Row:  # noqa: ANN401 - the fields of a row
    return replace(base, **{"name": name, "main": False, **changes})


def _cam(base: Row, name: str, **settings: Any) -> Row:  # noqa: ANN401 - the fields of CamParams
    return _vary(base, name, cam=replace(base.cam, **settings))


def _patches(base: Row, name: str, **settings: float) -> Row:
    assert base.cam.patches is not None
    return _cam(base, name, patches=replace(base.cam.patches, **settings))  # type: ignore[arg-type]


def chosen(
    given: Sequence[Section], words: Sequence[str], without: Sequence[str] = ()
) -> list[Section]:
    """Keep the rows whose section and name hold one of ``words``, all if none, and not ``without``.

    Both are compared with ``section: name``.
    """

    def keep(name: str) -> bool:
        wanted = not words or any(word in name for word in words)
        return wanted and not any(word in name for word in without)

    kept = [
        Section(part.title, tuple(row for row in part.rows if keep(f"{part.title}: {row.name}")))
        for part in given
    ]
    return [part for part in kept if part.rows]


def run(
    given: Sequence[Section], tapes: Sequence[Tape], towers: Towers, *, crf: str
) -> list[Result]:
    """Score all rows, telling stderr about each.

    Args:
        given: The rows.
        tapes: All images.
        towers: See ``Towers``.
        crf: Which rows' masks are scored: ``none``, ``main`` or ``all``.
    """
    results = []
    for part in given:
        for row in part.rows:
            masks = crf == "all" or (crf == "main" and row.main)
            result = Result(part.title, row.name, *score_row(row, tapes, towers, crf=masks))
            after = "" if result.crf is None else f", CRF {result.crf.full:.2f}"
            _say(f"{part.title}: {row.name}: {result.cam.full:.2f}{after}")
            results.append(result)
    return results


def table(results: Sequence[Result], published: float) -> str:
    """Return the Markdown table of results.

    Args:
        results: One per row.
        published: Seconds per image of the published method's maps.
    """
    base = _seconds_of_crf(results)
    head = ["", "CAM A", "CAM B", "CAM", "time", "CRF A", "CRF B", "CRF", "time"]
    rule = ["---", *["---:"] * (len(head) - 1)]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(rule) + " |"]
    title = ""
    for one in results:
        if one.section != title:
            title = one.section
            lines.append(f"| **{title}** |" + " |" * (len(head) - 1))
        cells = [*_cells(one.cam, published), *(_cells(one.crf, base) if one.crf else [""] * 4)]
        lines.append(f"| {one.row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(score: Score, base: float | None) -> list[str]:
    numbers = [f"{value:.2f}" for value in (score.half_a, score.half_b, score.full)]
    return [*numbers, "" if base is None else f"{score.seconds / base:.2f}"]


def _seconds_of_crf(results: Sequence[Result]) -> float | None:
    """Return the seconds per image of the published method's CRF, if it is among the results."""
    return next((one.crf.seconds for one in results if one.crf and one.row == "published"), None)


def load_towers(kind: str, classes: tuple[str, ...]) -> Towers:
    """Return the towers and the published vectors of ``classes``."""
    opened = open_weights("registry", "ViT-B-16", device="cpu", say=_say, progress=_no_progress)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.npz"
        write_text_features(path, kind)
        text = load_text_features(path).for_classes(classes)
    vectors = (text.class_vectors, text.background_vectors)
    return Towers(
        opened.backbone(fp16_positions=True),
        opened.backbone(fp16_positions=False),
        Words(*map(torch.from_numpy, vectors)),
    )


def main() -> None:
    """Print the table."""
    options = _options()
    data = sample(options.data)
    if data is None:
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    kind = KINDS[options.data]
    dataset = open_dataset(kind, root=data)
    towers = load_towers(kind, dataset.classes)
    rows = chosen(sections(kind), options.rows, options.skip)
    samples = [one for one in dataset.samples if one.mask is not None][: options.limit]
    needed = pieces_needed([row for part in rows for row in part.rows])
    tapes = []
    for count, one in enumerate(samples):
        if count % 20 == 0:
            _say(f"encoding: {count} of {len(samples)} images")
        published = _row("reference", kind).cam
        wanted = {name: name in needed for name in ("mirrored", "alike")}
        tapes.append(make_tape(towers, one, published, **wanted))
    seconds = sum(tape.seconds["encode"] + tape.seconds["gradient"] for tape in tapes) / len(tapes)
    results = run(rows, tapes, towers, crf=options.crf)
    base = _seconds_of_crf(results)
    print(table(results, seconds))
    crf = "" if base is None else f", of its CRF {base:.3f} s"
    print(f"\n{len(tapes)} images of {options.data}; time 1 of the maps is {seconds:.3f} s{crf},")
    print(f"of one thread of {platform.machine()} with torch {torch.__version__}.")
    if options.json:
        found = {"data": options.data, "images": len(tapes), "seconds_published": seconds}
        found["rows"] = [asdict(one) for one in results]
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", choices=KINDS, default="voc_sample")
    parser.add_argument("--rows", nargs="+", default=[], metavar="WORD",
                        help="only rows whose section and name hold one of these")  # fmt: skip
    parser.add_argument("--skip", nargs="+", default=[], metavar="WORD",
                        help="not those that hold one of these")  # fmt: skip
    parser.add_argument("--limit", type=int, help="only the first N images")
    parser.add_argument("--crf", choices=("none", "main", "all"), default="none",
                        help="rows whose masks are scored, too")  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    return parser.parse_args()


@contextmanager
def _no_progress(*_: object, **__: object) -> Iterator[Any]:
    yield lambda done, total: None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
