"""Writes the page and the table of the review queue, image by image.

Rows of all images and pictures of some lie in the page as inert data; its script shows a few at a
time, so that the page stays quick with many thousand images.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np

from clipes.files import atomic_write
from clipes.metrics import Scores
from clipes.report.charts import confidence_histogram, coverage_curve, curve_table
from clipes.report.measure import Row, Tally
from clipes.report.pictures import Pictures, colour, confidence_bar, heat_bar, swatch

_NO_SCRIPT = (
    "This browser runs no script, so the images below are not shown; review.csv, beside this page, "
    "lists them."
)


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
    """

    title: str
    classes: Sequence[str]
    facts: Mapping[str, str]
    commands: Sequence[str] = ()
    note: str = ""
    shown: str = ""


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
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(_head(head))
        file.write(_charts(rows, tally, scores, head.classes))
        file.write(_gallery(head))
        for one in pictures:
            if one.failure:
                rows[one.index] = replace(rows[one.index], failure=one.failure)
            else:
                file.write(
                    f'<template data-row="{one.index}" data-thumb="{one.thumbnail}">'
                    f"{one.figures}</template>\n"
                )
        file.write('<script type="application/json" id="rows">[\n')
        for index, row in enumerate(rows):
            file.write(f"{',' if index else ''}{_inert(_plain(row))}\n")
        file.write("]</script>\n")
        file.write(_foot(head.classes))
    return rows


def write_queue(path: Path, rows: Sequence[Row], classes: Sequence[str]) -> None:
    """Write the review queue as CSV, what needs a person most first.

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
        for place, row in enumerate(sorted(rows, key=lambda row: -row.urgency), start=1):
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


def _inert(value: object) -> str:
    """Return JSON that cannot end the element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _head(head: Head) -> str:
    facts = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in head.facts.items()
    )
    caveat = f'<p class="note"><strong>Note.</strong> {escape(head.note)}</p>' if head.note else ""
    lines = "".join(f"<code>{escape(command)}</code>" for command in head.commands)
    made = f"<details><summary>How it was made</summary>{lines}</details>" if lines else ""
    # The policy makes the browser refuse whatever is not in the page itself.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(head.title)}</title>
<style>
{_template("report.css")}</style>
</head>
<body>
<main>
<h1>{escape(head.title)}</h1>
<dl class="facts">{facts}</dl>
{made}
{caveat}
"""


def _charts(
    rows: Sequence[Row], tally: Tally, scores: Mapping[str, Scores], classes: Sequence[str]
) -> str:
    parts = [_scores(scores, classes)] if scores else []
    cards = []
    if bars := tally.histogram():
        cards.append(f"<h3>Confidence of all pixels</h3>{confidence_histogram(bars)}")
    if points := tally.curve():
        legend = (
            '<div class="legend"><span><span class="key accuracy"></span>pixel accuracy</span>'
            '<span><span class="key miou"></span>mIoU</span></div>'
        )
        numbers = f"<details><summary>The numbers</summary>{curve_table(points)}</details>"
        title = "<h3>How right the surest pixels are</h3>"
        cards.append(f"{title}{legend}{coverage_curve(points)}{numbers}")
    cards.append(f"<h3>Classes, the most doubtful first</h3>{_class_table(rows, classes)}")
    inside = "".join(f'<section class="card chart">{card}</section>\n' for card in cards)
    parts.append(f'<h2>How sure the masks are</h2>\n<div class="charts">\n{inside}</div>\n')
    return "".join(parts)


def _class_table(rows: Sequence[Row], classes: Sequence[str]) -> str:
    """Return what is known of each class without ground truth, the highest mean score first."""
    images, empty, disputed, scores = np.zeros((4, len(classes)))
    refined = any(row.signs is not None and row.signs.unsure is not None for row in rows)
    for row in rows:
        for one in row.signs.classes if row.signs is not None else ():
            images[one.label] += 1
            empty[one.label] += not one.area
            disputed[one.label] += one.disagreement or 0.0
            scores[one.label] += row.score or 0.0
    lines = []
    for label in sorted(np.flatnonzero(images).tolist(), key=lambda at: -scores[at] / images[at]):
        count = images[label]
        agreement = f"<td>{_percent(1 - disputed[label] / count)}</td>" if refined else ""
        lines.append(
            f"<tr><th>{swatch(label + 1)}{escape(classes[label])}</th><td>{count:.0f}</td>"
            f"<td>{empty[label]:.0f}</td>{agreement}<td>{scores[label] / count:.2f}</td></tr>\n"
        )
    column = "<th title=\"mean IoU of the map's mask and the CRF's\">agreement, %</th>"
    return (
        '<div class="scroll"><table><thead><tr><th>class</th><th>images</th>'
        f"<th>nothing labelled</th>{column if refined else ''}<th>mean score</th></tr></thead>"
        f"<tbody>\n{''.join(lines)}</tbody></table></div>"
    )


def _scores(scores: Mapping[str, Scores], classes: Sequence[str]) -> str:
    tiles = "".join(
        f'<section class="card tile" style="{_stage(index)}"><h3>{escape(name)}</h3>'
        f'<div class="big">{_percent(score.miou)} <small>% mIoU</small></div>'
        f"<dl><div><dt>pixel accuracy</dt><dd>{_percent(score.pixel_accuracy)} %</dd></div>"
        f"<div><dt>pixels covered</dt><dd>{_percent(score.coverage)} %</dd></div>"
        f"<div><dt>images</dt><dd>{score.images:,}</dd></div></dl></section>\n"
        for index, (name, score) in enumerate(scores.items())
    )
    rows = []
    for label, name in enumerate(("background", *classes)):
        values = [score.iou[label] for score in scores.values()]
        if all(value is None for value in values):
            continue
        bars = "".join(
            f'<span class="bar" style="{_stage(index)}">'
            f'<i style="width:{100 * (value or 0):.1f}%"></i></span>'
            for index, value in enumerate(values)
        )
        numbers = "".join(
            f'<span style="{_stage(index)}">{"–" if value is None else _percent(value)}</span>'
            for index, value in enumerate(values)
        )
        rows.append(
            f'<div class="class"><b title="{escape(name)}">{swatch(label)}{escape(name)}</b>'
            f'<span class="bars">{bars}</span><span class="numbers">{numbers}</span></div>\n'
        )
    legend = "".join(
        f'<span><span class="swatch" style="--colour:var(--stage-{index % 4})"></span>'
        f"{escape(name)}</span>"
        for index, name in enumerate(scores)
    )
    return f"""<h2>Scores against the ground truth</h2>
<div class="tiles">
{tiles}</div>
<h2>IoU of each class, %</h2>
<div class="legend">{legend}</div>
<div class="card classes">
{"".join(rows)}</div>
"""


def _gallery(head: Head) -> str:
    shown = f'<p class="quiet">{escape(head.shown)}</p>\n' if head.shown else ""
    return f"""<h2 id="images">Images</h2>
{shown}<noscript><p class="note">{_NO_SCRIPT}</p></noscript>
<form id="tools" hidden>
<label class="grow">search <input type="search" id="q" placeholder="name or reason"></label>
<label>class <select id="class"><option value="">all</option></select></label>
<label>order <select id="sort"><option value="queue">needs a person</option>
<option value="sure">least confident</option><option value="worst">lowest mIoU</option>
<option value="best">highest mIoU</option><option value="name">name</option>
<option value="data">data set</option></select></label>
<label>show <select id="view"><option value="sheet">contact sheet</option>
<option value="list">large pictures</option></select></label>
</form>
<div class="legend">
<span class="scale">map 0 {heat_bar()} 1</span>
<span class="scale">confidence {confidence_bar()}</span>
<span><span class="swatch hatched"></span>not labelled</span>
<span class="keys">keys: / search, ← → page, j k image, Enter open, Esc close</span>
</div>
<nav class="pager" hidden><button type="button" value="-1">← back</button>
<output aria-live="polite"></output><button type="button" value="1">next →</button></nav>
<div id="items"></div>
<nav class="pager" hidden><button type="button" value="-1">← back</button>
<output></output><button type="button" value="1">next →</button></nav>
<dialog aria-label="one image"></dialog>
"""


def _foot(classes: Sequence[str]) -> str:
    named = [[name, colour(label)] for label, name in enumerate(classes, start=1)]
    return f"""<script type="application/json" id="classes">{_inert(named)}</script>
<footer>Made by clipes. Maps: softmax-GradCAM refined by attention (CLIP-ES, CVPR 2023); masks and
confidence: dense CRF.</footer>
</main>
<script>
{_template("report.js")}</script>
</body>
</html>
"""


def _stage(index: int) -> str:
    return f"--stage:var(--stage-{index % 4})"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f}"


def _template(name: str) -> str:
    return (resources.files("clipes") / "templates" / name).read_text("utf-8")
