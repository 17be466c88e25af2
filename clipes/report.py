"""One HTML page that shows what a run made: scores, and each image with its maps and masks.

The page is a single file without a link to anything outside it, so that it can be mailed and opened
from disk. It is written image by image; no more than one image is in memory.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.errors import ArtifactError, ClipesError
from clipes.files import atomic_write
from clipes.images import read_image, read_mask
from clipes.metrics import ConfusionMatrix, Scores
from clipes.overlays import (
    CONFIDENCE,
    HEAT,
    Ramp,
    class_colour,
    heat_overlay,
    mask_overlay,
    ramp,
    shrink,
)
from clipes.types import IGNORE, CamMaps, Failure, PseudoLabel, UInt8Array

_JPEG_QUALITY = 85
_MOST_COLUMNS = 6


@dataclass(frozen=True)
class ReportItem:
    """One image of the report.

    Attributes:
        id: Its id.
        image: The image file.
        maps: Its refined maps.
        pseudo: Its mask and confidence, where they were made.
        truth: Its ground-truth mask, where there is one.
    """

    id: str
    image: Path
    maps: CamMaps
    pseudo: PseudoLabel | None = None
    truth: Path | None = None


def write_report(
    run_dir: Path,
    items: Iterable[ReportItem],
    scores: Mapping[str, Scores] | None,
    *,
    title: str,
    classes: Sequence[str],
    facts: Mapping[str, str],
    note: str = "",
    side: int = 480,
    report: Callable[[Failure], None] | None = None,
) -> Path:
    """Write ``report/index.html`` into a run folder, replacing the one before.

    Args:
        run_dir: The run folder.
        items: The images, taken one at a time.
        scores: Scores of each stage by its name, in the order of the pipeline; None or empty where
            there is no ground truth.
        title: Headline of the page.
        classes: Class names in mask order.
        facts: What the header tells of the run, by label.
        note: A caveat shown so that nobody misses it, such as that text vectors are stand-ins.
        side: Longest side of the pictures in the page, in pixels.
        report: Called with each image that cannot be shown; the page names it, and the others go
            on.

    Returns:
        Path of the page.

    Raises:
        ArtifactError: The page cannot be written.
    """
    path = run_dir / "report" / "index.html"
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(_head(title, facts, note))
        if scores:
            file.write(_scores(scores, classes))
        file.write(_gallery_head())
        for item in items:
            file.write(_item(item, classes, side, report))
        file.write(_foot())
    return path


def _head(title: str, facts: Mapping[str, str], note: str) -> str:
    rows = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in facts.items()
    )
    caveat = f'<p class="note"><strong>Note.</strong> {escape(note)}</p>' if note else ""
    # The policy makes the browser refuse whatever is not in the page itself.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{_template("report.css")}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<dl class="facts">{rows}</dl>
{caveat}
"""


def _scores(scores: Mapping[str, Scores], classes: Sequence[str]) -> str:
    tiles = "".join(
        f'<section class="card tile" style="{_stage(index)}"><h3>{escape(name)}</h3>'
        f'<div class="big">{_percent(score.miou)} <small>% mIoU</small></div>'
        f"<dl><div><dt>pixel accuracy</dt><dd>{_percent(score.pixel_accuracy)} %</dd></div>"
        f"<div><dt>pixels covered</dt><dd>{_percent(score.coverage)} %</dd></div>"
        f"<div><dt>images</dt><dd>{score.images}</dd></div></dl></section>\n"
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
            f'<div class="class"><b title="{escape(name)}">{_swatch(label)}{escape(name)}</b>'
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


def _gallery_head() -> str:
    return f"""<h2>Images</h2>
<div class="legend">
<span class="scale">map 0 {_bar(HEAT)} 1</span>
<span class="scale">confidence {_confidence_bar()}</span>
<span><span class="swatch hatched"></span>not labelled</span>
<span class="tools" hidden>
<label>show <select><option value="">all classes</option></select></label>
<label>order <select><option value="">as in the data set</option>
<option value="worst">worst first</option><option value="best">best first</option></select></label>
</span>
</div>
<div id="items">
"""


def _item(
    item: ReportItem,
    classes: Sequence[str],
    side: int,
    report: Callable[[Failure], None] | None,
) -> str:
    try:
        return _usable(item, classes, side)
    except ClipesError as error:
        if report is not None:
            report(Failure(item.id, str(error)))
        return _unusable(item.id, str(error))


def _usable(item: ReportItem, classes: Sequence[str], side: int) -> str:
    image = read_image(item.image)
    height, width = image.shape[:2]
    if item.maps.size != (height, width):
        raise ArtifactError(
            f"{item.image} is {height} x {width}, its maps are for {_by(item.maps.size)}",
            "make the run again for the image as it is now",
        )
    labels = [int(label) for label in item.maps.labels]
    if any(not 0 <= label < len(classes) for label in labels):
        raise ArtifactError(
            f"the maps are of classes {labels}, but there are {len(classes)} classes",
            "check that the run belongs to this list of classes",
        )
    score = _score(item, len(classes))
    chips = "".join(
        f'<span class="chip" data-class="{label}">'
        f"{_swatch(label + 1)}{escape(classes[label])}</span>"
        for label in labels
    )
    known = "" if score is None else f' data-iou="{score:.4f}"'
    badge = "" if score is None else f'<span class="score">mIoU {_percent(score)} %</span>'
    figures = list(_figures(item, image, classes, side))
    return f"""<article class="card item"{known}>
<header><h3>{escape(item.id)}</h3>{chips}
<span class="quiet">{width} × {height}</span>{badge}</header>
<div class="figures" style="--columns:{min(len(figures), _MOST_COLUMNS)}">
{"".join(figures)}</div>
</article>
"""


def _figures(
    item: ReportItem, image: UInt8Array, classes: Sequence[str], side: int
) -> Iterator[str]:
    small = shrink(image, side)
    yield _figure(_jpeg(small), small, f"{item.id}: image", "<span>Image</span>")
    for label, map_ in zip(item.maps.labels, item.maps.maps, strict=True):
        name = classes[label]
        caption = f"<span>Map</span><small>{_swatch(int(label) + 1)}{escape(name)}</small>"
        yield _figure(_jpeg(heat_overlay(small, map_)), small, f"{item.id}: map of {name}", caption)
    if item.pseudo is not None:
        _check_size(item.pseudo.mask, image, "mask")
        _check_size(item.pseudo.confidence, image, "confidence map")
        picture = mask_overlay(small, shrink(item.pseudo.mask, side))
        caption = f"<span>Mask</span>{_areas(item.pseudo.mask, classes)}"
        yield _figure(_jpeg(picture), small, f"{item.id}: mask", caption)
        sure = float((item.pseudo.confidence >= CONFIDENCE_THRESHOLD).mean())
        caption = (
            f"<span>Confidence</span><small>≥ {CONFIDENCE_THRESHOLD:g}: {_percent(sure)} %</small>"
            f"<small>{_confidence_bar()}</small>"
        )
        uri = _confidence_png(item.pseudo, side)
        yield _figure(uri, small, f"{item.id}: confidence", caption)
    if item.truth is not None:
        truth = read_mask(item.truth)
        _check_size(truth, image, "ground truth")
        picture = mask_overlay(small, shrink(truth, side))
        caption = f"<span>Ground truth</span>{_areas(truth, classes)}"
        yield _figure(_jpeg(picture), small, f"{item.id}: ground truth", caption)


def _areas(mask: UInt8Array, classes: Sequence[str]) -> str:
    """Return which share of the image each class of a mask takes."""
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)
    shares = (
        f'<span title="{escape(name)}">'
        f"{_swatch(label)}{_percent(counts[label] / mask.size)} %</span>"
        for label, name in enumerate(classes, start=1)
        if counts[label]
    )
    return f'<small class="areas">{" ".join(shares)}</small>'


def _score(item: ReportItem, n_classes: int) -> float | None:
    """Return the mIoU of one image over the labels that it or its mask holds."""
    if item.truth is None or item.pseudo is None:
        return None
    truth = read_mask(item.truth)
    if not (truth != IGNORE).any():
        return None
    matrix = ConfusionMatrix(n_classes + 1)
    matrix.update(truth, item.pseudo.mask)
    return matrix.scores().miou


def _unusable(id_: str, reason: str) -> str:
    return f"""<article class="card item">
<header><h3>{escape(id_)}</h3></header>
<p class="bad">Cannot be shown: {escape(reason)}</p>
</article>
"""


def _foot() -> str:
    return f"""</div>
<footer>Made by clipes. Maps: softmax-GradCAM refined by attention (CLIP-ES, CVPR 2023); masks and
confidence: dense CRF.</footer>
</main>
<dialog></dialog>
<script>
{_template("report.js")}</script>
</body>
</html>
"""


def _figure(uri: str, picture: UInt8Array, alt: str, caption: str) -> str:
    """Return a figure; ``caption`` is HTML, all else is text."""
    height, width = picture.shape[:2]
    return (
        f'<figure><img src="{uri}" width="{width}" height="{height}" alt="{escape(alt)}"'
        f' loading="lazy"><figcaption>{caption}</figcaption></figure>\n'
    )


def _jpeg(picture: UInt8Array) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _confidence_png(pseudo: PseudoLabel, side: int) -> str:
    """Return a palette PNG of the confidence: exact colours, and smaller than RGB."""
    steps = shrink(np.floor(pseudo.confidence * 255 + 0.5).astype(np.uint8), side)
    image = Image.fromarray(steps)
    image.putpalette(ramp(CONFIDENCE, np.arange(256) / 255).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _swatch(label: int) -> str:
    """Return the colour mark of a mask value."""
    red, green, blue = class_colour(label - 1) if label else (128, 128, 128)
    return f'<span class="swatch" style="--colour:rgb({red} {green} {blue})"></span>'


def _bar(colours: Ramp) -> str:
    """Return a colour bar from the ramp's first value to its last."""
    low, high = colours[0][0], colours[-1][0]
    stops = ",".join(
        f"rgb({r} {g} {b}) {100 * (at - low) / (high - low):.1f}%" for at, (r, g, b) in colours
    )
    return f'<span class="ramp" style="--ramp:linear-gradient(90deg,{stops})"></span>'


def _confidence_bar() -> str:
    """Return the colour bar of confidence, both sides of the threshold equally long.

    Nearly all pixels lie in the last twentieth, which a linear bar would not show.
    """
    below = tuple(stop for stop in CONFIDENCE if stop[0] < CONFIDENCE_THRESHOLD)
    above = tuple(stop for stop in CONFIDENCE if stop[0] >= CONFIDENCE_THRESHOLD)
    return f'<span class="split">0 {_bar(below)} {CONFIDENCE_THRESHOLD:g} {_bar(above)} 1</span>'


def _stage(index: int) -> str:
    return f"--stage:var(--stage-{index % 4})"


def _check_size(array: np.ndarray, image: UInt8Array, what: str) -> None:
    if array.shape != image.shape[:2]:
        raise ArtifactError(
            f"the {what} is {_by(array.shape)}, the image {_by(image.shape[:2])}",
            "make it again for the image as it is now",
        )


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f}"


def _template(name: str) -> str:
    return (resources.files("clipes") / "templates" / name).read_text("utf-8")
