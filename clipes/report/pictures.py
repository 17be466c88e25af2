"""The pictures of one image: a thumbnail of its mask, and each map, mask and confidence large."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.disk.images import read_image, read_mask
from clipes.errors import ClipesError
from clipes.masks.pseudo import cam_mask
from clipes.masks.values import check_size, value_of
from clipes.report.measure import check_image, load_outputs
from clipes.report.overlays import CONFIDENCE, heat_overlay, mask_overlay, ramp, shrink
from clipes.run.corrected import Chosen
from clipes.types import IGNORE, CamMaps, PseudoLabel, Sample, UInt8Array

SIDE, THUMB_SIDE = 400, 160
"""Longest side of large pictures and of thumbnails, in pixels."""

_QUALITY, _EFFORT = 75, 2  # of WebP; more effort takes twice the time for a twentieth of the bytes


@dataclass(frozen=True)
class Figure:
    """A large picture and what is said below it.

    Attributes:
        uri: Data URI.
        size: (H, W) of the picture.
        alt: What it shows, for those who do not see it.
        title: What it is.
        label: Mask value of the class that a map is of.
        areas: Share of the image that each mask value takes in a mask.
        sure: Share of the image that is confident.
    """

    uri: str
    size: tuple[int, int]
    alt: str
    title: str
    label: int | None = None
    areas: Mapping[int, float] | None = None
    sure: float | None = None


@dataclass(frozen=True)
class Pictures:
    """The pictures of one image.

    Attributes:
        index: Its place in the data set.
        thumbnail: Data URI of its mask on it.
        figures: The large pictures; empty where none were asked for.
        failure: Why it cannot be shown; empty if it can.
    """

    index: int
    thumbnail: str = ""
    figures: tuple[Figure, ...] = ()
    failure: str = ""


def draw(
    index: int,
    sample: Sample,
    masks: Chosen,
    classes: Sequence[str],
    exponent: float,
    *,
    large: bool,
) -> Pictures:
    """Draw what a run made for one image.

    Args:
        index: Its place in the data set.
        sample: The image.
        masks: Which masks of the run count.
        classes: Class names in mask order.
        exponent: alpha of the background score.
        large: Whether large pictures are wanted beside the thumbnail.
    """
    try:
        image = read_image(sample.image)
        cams, pseudo = load_outputs(masks.run, sample, len(classes))
        check_image(sample, (image.shape[0], image.shape[1]), cams)
        mask = cam_mask(cams, exponent) if pseudo is None else pseudo.mask
        mended = masks.corrected_mask(sample, len(classes))
        small = shrink(image, THUMB_SIDE)
        counts = mask if mended is None else mended
        thumbnail = _webp(mask_overlay(small, shrink(counts, THUMB_SIDE)))
        shown = (mask, mended)
        figures = tuple(_figures(sample, image, cams, shown, pseudo, classes)) if large else ()
    except ClipesError as error:
        return Pictures(index, failure=str(error))
    return Pictures(index, thumbnail, figures)


def _figures(
    sample: Sample,
    image: UInt8Array,
    cams: CamMaps,
    masks: tuple[UInt8Array, UInt8Array | None],
    pseudo: PseudoLabel | None,
    classes: Sequence[str],
) -> Iterator[Figure]:
    id_, small, (mask, mended) = sample.id, shrink(image, SIDE), masks
    size = small.shape[0], small.shape[1]
    yield Figure(_webp(small), size, f"{id_}: image", "Image")
    for label, map_ in zip(cams.labels.tolist(), cams.maps, strict=True):
        heat, alt = _webp(heat_overlay(small, map_)), f"{id_}: map of {classes[label]}"
        yield Figure(heat, size, alt, "Map", label=value_of(label))
    what = "Mask" if pseudo is not None else "Mask of the maps"
    picture, areas = _webp(mask_overlay(small, shrink(mask, SIDE))), _areas(mask, classes)
    yield Figure(picture, size, f"{id_}: mask", what, areas=areas)
    if mended is not None:
        picture, areas = _webp(mask_overlay(small, shrink(mended, SIDE))), _areas(mended, classes)
        yield Figure(picture, size, f"{id_}: corrected mask", "Corrected mask", areas=areas)
    if pseudo is not None:
        sure = float((pseudo.confidence >= CONFIDENCE_THRESHOLD).mean())
        alt = f"{id_}: confidence"
        yield Figure(_confidence_png(pseudo), size, alt, "Confidence", sure=sure)
    if sample.mask is not None and sample.mask.is_file():
        truth = read_mask(sample.mask)
        check_size(truth, cams.size, "ground truth")
        picture, areas = _webp(mask_overlay(small, shrink(truth, SIDE))), _areas(truth, classes)
        yield Figure(picture, size, f"{id_}: ground truth", "Ground truth", areas=areas)


def _areas(mask: UInt8Array, classes: Sequence[str]) -> dict[int, float]:
    """Return which share of the image each class of a mask takes, by mask value."""
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1).tolist()
    return {
        label: counts[label] / mask.size for label in range(1, 1 + len(classes)) if counts[label]
    }


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
