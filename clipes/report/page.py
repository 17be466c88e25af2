"""Writes the page and the table of the review queue, image by image.

Rows of all images and pictures of some lie in the page as inert data; its script shows a few at a
time, so that the page stays quick with many thousand images.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import numpy as np

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.datasets.base import is_rare
from clipes.disk.files import atomic_write
from clipes.masks.scores import Scores
from clipes.masks.values import class_of, value_of
from clipes.report.charts import confidence_histogram, coverage_curve, training_curve
from clipes.report.measure import Row, Tally, review_queue
from clipes.report.overlays import CONFIDENCE, HEAT, Ramp, class_colour
from clipes.report.pictures import Pictures
from clipes.run.curve import TrainingPoint


@dataclass(frozen=True)
class Head:
    """What stands above the images.

    Attributes:
        title: Headline of the page.
        classes: Class names in mask order.
        facts: What the header tells of the run, by label.
        commands: The commands that made it.
        note: A caveat shown so that nobody misses it, such as that text vectors are stand-ins.
        shown: Which images have pictures, in words.
        training: How the segmenter was trained; none without one.
    """

    title: str
    classes: Sequence[str]
    facts: Mapping[str, str]
    commands: Sequence[str] = ()
    note: str = ""
    shown: str = ""
    training: Sequence[TrainingPoint] = ()


def write_page(
    path: Path,
    head: Head,
    rows: Sequence[Row],
    tally: Tally,
    scores: Mapping[str, Scores],
    pictures: Iterable[Pictures],
) -> list[Row]:
    """Write the page, replacing the one before.

    Args:
        path: Where to.
        head: What stands above the images.
        rows: The images, in the order of the data set.
        tally: Their sums, for the charts.
        scores: Scores of each stage by its name, in the order of the pipeline; empty where there is
            no ground truth.
        pictures: Of some images, taken one at a time; not more than one is in memory.

    Returns:
        The rows, with what went wrong while pictures were drawn.

    Raises:
        ArtifactError: The page cannot be written.
    """
    rows = list(rows)
    environment = _environment()
    page = environment.get_template("report.html").generate(
        head=head,
        classes=head.classes,
        scores=scores,
        iou=_iou(scores, head.classes),
        bars=tally.histogram(),
        points=tally.curve(),
        refined=any(row.signs is not None and row.signs.unsure is not None for row in rows),
        doubts=_doubts(rows, len(head.classes)),
        pictures=_shown(pictures, rows),
        rows=map(_plain, rows),  # asked for after the pictures: they say what cannot be shown
        named=[[name, _colour(value_of(label))] for label, name in enumerate(head.classes)],
    )
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(page)
    return rows


def write_queue(path: Path, rows: Sequence[Row], classes: Sequence[str]) -> None:
    """Write the review queue as CSV, what needs a person most first, without what one corrected.

    Columns: place, image, score, reasons (by semicolon), labels (by semicolon), confident (share of
    the pixels with a confidence of at least 0.95), agreement (mean IoU of the map's mask and the
    CRF's over the labels), miou (only with ground truth). What is not known is left blank.

    Args:
        path: Where to.
        rows: The images.
        classes: Class names in mask order.

    Raises:
        ArtifactError: It cannot be written.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        columns = ("place", "image", "score", "reasons", "labels", "confident", "agreement", "miou")
        table.writerow(columns)
        for place, row in enumerate(review_queue(rows), start=1):
            reasons = [f"cannot be shown: {row.failure}"] if row.failure else []
            table.writerow(
                [
                    place,
                    row.id,
                    _digits(row.score),
                    "; ".join((*reasons, *row.reasons)),
                    ";".join(classes[label] for label in row.labels),
                    _digits(_confident(row)),
                    _digits(_agreement(row)),
                    _digits(row.miou),
                ]
            )


def _confident(row: Row) -> float | None:
    return None if row.signs is None or row.signs.unsure is None else 1 - row.signs.unsure


def _agreement(row: Row) -> float | None:
    if row.signs is None or row.signs.unsure is None or not row.signs.classes:
        return None
    return 1 - row.signs.disputed / len(row.signs.classes)


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _plain(row: Row) -> list[object]:
    """Return a row as the page's script knows it; the order is the one of its ``Row``."""
    known = (row.score, _confident(row), row.miou)
    numbers = [None if value is None else round(value, 4) for value in known]
    return [row.id, list(row.labels), list(row.size), *numbers, list(row.reasons), row.failure]


def _shown(pictures: Iterable[Pictures], rows: list[Row]) -> Iterator[Pictures]:
    """Yield what can be shown; rows are told why the others cannot."""
    for one in pictures:
        if one.failure:
            rows[one.index] = replace(rows[one.index], failure=one.failure)
        else:
            yield one


@dataclass(frozen=True)
class _Doubt:
    """What is known of a class without ground truth."""

    label: int
    images: int
    rare: bool
    empty: int
    agreement: float
    score: float


def _doubts(rows: Sequence[Row], classes: int) -> list[_Doubt]:
    """Return what is known of each class that occurs, the highest mean score first."""
    images, empty, disputed, scores = np.zeros((4, classes))
    for row in rows:
        for one in row.signs.classes if row.signs is not None else ():
            images[one.label] += 1
            empty[one.label] += not one.area
            disputed[one.label] += one.disagreement or 0.0
            scores[one.label] += row.score or 0.0
    found = [
        _Doubt(
            label,
            int(images[label]),
            is_rare(int(images[label]), len(rows)),
            int(empty[label]),
            1 - disputed[label] / images[label],
            scores[label] / images[label],
        )
        for label in np.flatnonzero(images).tolist()
    ]
    return sorted(found, key=lambda one: -one.score)


def _iou(
    scores: Mapping[str, Scores], classes: Sequence[str]
) -> list[tuple[int, str, list[float | None]]]:
    """Return mask value, name and IoU at each stage of the classes that have one."""
    names = enumerate(("background", *classes))
    table = [
        (label, name, [score.iou[label] for score in scores.values()]) for label, name in names
    ]
    return [row for row in table if any(value is not None for value in row[2])]


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("clipes.report", "html")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "separators": (",", ":"),
        "allow_nan": False,
    }
    environment.filters["percent"] = _percent
    environment.globals |= {
        "source": lambda name: loader.get_source(environment, name)[0],
        "histogram": confidence_histogram,
        "curve": coverage_curve,
        "training_curve": training_curve,
        "colour": _colour,
        "stops": _stops,
        "heat": HEAT,
        "unsure": tuple(stop for stop in CONFIDENCE if stop[0] < CONFIDENCE_THRESHOLD),
        "sure": tuple(stop for stop in CONFIDENCE if stop[0] >= CONFIDENCE_THRESHOLD),
        "threshold": f"{CONFIDENCE_THRESHOLD:g}",
    }
    return environment


def _percent(ratio: float, digits: int = 1) -> str:
    return f"{100 * ratio:.{digits}f}"


def _colour(label: int) -> str:
    """Return the CSS colour of a mask value."""
    red, green, blue = class_colour(class_of(label)) if label else (128, 128, 128)
    return f"rgb({red} {green} {blue})"


def _stops(colours: Ramp) -> str:
    """Return the stops of a CSS gradient from a ramp's first value to its last."""
    low, high = colours[0][0], colours[-1][0]
    return ",".join(
        f"rgb({r} {g} {b}) {100 * (at - low) / (high - low):.1f}%" for at, (r, g, b) in colours
    )
