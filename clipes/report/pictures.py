"""The pictures of one image: a thumbnail of its mask, and each map, mask and confidence large."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from clipes.artifacts import Run
from clipes.config import CONFIDENCE_THRESHOLD
from clipes.errors import ClipesError
from clipes.images import read_image, read_mask
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
from clipes.pseudo import cam_mask
from clipes.report.measure import check_image, check_size, load_outputs
from clipes.types import IGNORE, CamMaps, PseudoLabel, Sample, UInt8Array

SIDE, THUMB_SIDE = 400, 160
"""Longest side of large pictures and of thumbnails, in pixels."""

_QUALITY, _EFFORT = 75, 2  # of WebP; more effort takes twice the time for a twentieth of the bytes


@dataclass(frozen=True)
class Pictures:
    """The pictures of one image, as HTML.

    Attributes:
        index: Its place in the data set.
        thumbnail: Data URI of its mask on it.
        figures: HTML of the large pictures; empty where none were asked for.
        failure: Why it cannot be shown; empty if it can.
    """

    index: int
    thumbnail: str = ""
    figures: str = ""
    failure: str = ""


def draw(
    index: int, sample: Sample, run: Run, classes: Sequence[str], exponent: float, *, large: bool
) -> Pictures:
    """Draw what a run made for one image.

    Args:
        index: Its place in the data set.
        sample: The image.
        run: The run folder.
        classes: Class names in mask order.
        exponent: alpha of the background score.
        large: Whether large pictures are wanted beside the thumbnail.
    """
    try:
        image = read_image(sample.image)
        cams, pseudo = load_outputs(run, sample, len(classes))
        check_image(sample, (image.shape[0], image.shape[1]), cams)
        mask = cam_mask(cams, exponent) if pseudo is None else pseudo.mask
        small = shrink(image, THUMB_SIDE)
        thumbnail = _webp(mask_overlay(small, shrink(mask, THUMB_SIDE)))
        figures = ""
        if large:
            figures = "".join(_figures(sample, image, cams, mask, pseudo, classes))
    except ClipesError as error:
        return Pictures(index, failure=str(error))
    return Pictures(index, thumbnail, figures)


def _figures(
    sample: Sample,
    image: UInt8Array,
    cams: CamMaps,
    mask: UInt8Array,
    pseudo: PseudoLabel | None,
    classes: Sequence[str],
) -> Iterator[str]:
    id_, small = sample.id, shrink(image, SIDE)
    yield _figure(_webp(small), small, f"{id_}: image", "<span>Image</span>")
    for label, map_ in zip(cams.labels.tolist(), cams.maps, strict=True):
        name = classes[label]
        caption = f"<span>Map</span><small>{swatch(label + 1)}{escape(name)}</small>"
        yield _figure(_webp(heat_overlay(small, map_)), small, f"{id_}: map of {name}", caption)
    what = "Mask" if pseudo is not None else "Mask of the maps"
    yield _masked(small, mask, f"{id_}: mask", what, classes)
    if pseudo is not None:
        sure = float((pseudo.confidence >= CONFIDENCE_THRESHOLD).mean())
        caption = (
            f"<span>Confidence</span><small>≥ {CONFIDENCE_THRESHOLD:g}: {100 * sure:.1f} %</small>"
            f"<small>{confidence_bar()}</small>"
        )
        yield _figure(_confidence_png(pseudo), small, f"{id_}: confidence", caption)
    if sample.mask is not None and sample.mask.is_file():
        truth = read_mask(sample.mask)
        check_size(truth, cams.size, "ground truth")
        yield _masked(small, truth, f"{id_}: ground truth", "Ground truth", classes)


def _masked(
    small: UInt8Array, mask: UInt8Array, alt: str, what: str, classes: Sequence[str]
) -> str:
    picture = mask_overlay(small, shrink(mask, SIDE))
    caption = f"<span>{what}</span>{_areas(mask, classes)}"
    return _figure(_webp(picture), small, alt, caption)


def _areas(mask: UInt8Array, classes: Sequence[str]) -> str:
    """Return which share of the image each class of a mask takes."""
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)
    shares = (
        f'<span title="{escape(name)}">{swatch(label)}'
        f"{100 * counts[label] / mask.size:.1f} %</span>"
        for label, name in enumerate(classes, start=1)
        if counts[label]
    )
    return f'<small class="areas">{" ".join(shares)}</small>'


def _figure(uri: str, picture: UInt8Array, alt: str, caption: str) -> str:
    """Return a figure; ``caption`` is HTML, all else is text."""
    height, width = picture.shape[:2]
    return (
        f'<figure><img src="{uri}" width="{width}" height="{height}" alt="{escape(alt)}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _webp(picture: UInt8Array) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=_QUALITY, method=_EFFORT)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _confidence_png(pseudo: PseudoLabel) -> str:
    """Return a palette PNG of the confidence: exact colours, and smaller than RGB."""
    steps = shrink(np.floor(pseudo.confidence * 255 + 0.5).astype(np.uint8), SIDE)
    image = Image.fromarray(steps)
    image.putpalette(ramp(CONFIDENCE, np.arange(256) / 255).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def swatch(label: int) -> str:
    """Return the colour mark of a mask value."""
    return f'<span class="swatch" style="--colour:{colour(label)}"></span>'


def colour(label: int) -> str:
    """Return the CSS colour of a mask value."""
    red, green, blue = class_colour(label - 1) if label else (128, 128, 128)
    return f"rgb({red} {green} {blue})"


def heat_bar() -> str:
    """Return the colour bar of maps."""
    return _bar(HEAT)


def confidence_bar() -> str:
    """Return the colour bar of confidence, both sides of the threshold equally long.

    Nearly all pixels lie in the last twentieth, which a linear bar would not show.
    """
    below = tuple(stop for stop in CONFIDENCE if stop[0] < CONFIDENCE_THRESHOLD)
    above = tuple(stop for stop in CONFIDENCE if stop[0] >= CONFIDENCE_THRESHOLD)
    return f'<span class="split">0 {_bar(below)} {CONFIDENCE_THRESHOLD:g} {_bar(above)} 1</span>'


def _bar(colours: Ramp) -> str:
    """Return a colour bar from the ramp's first value to its last."""
    low, high = colours[0][0], colours[-1][0]
    stops = ",".join(
        f"rgb({r} {g} {b}) {100 * (at - low) / (high - low):.1f}%" for at, (r, g, b) in colours
    )
    return f'<span class="ramp" style="--ramp:linear-gradient(90deg,{stops})"></span>'
