"""Pictures of maps, masks and confidence for people to look at: numpy arrays in, RGB arrays out."""

from __future__ import annotations

import colorsys
from typing import TypeAlias

import cv2
import numpy as np

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.types import IGNORE, Float32Array, FloatArray, UInt8Array

Colour: TypeAlias = tuple[int, int, int]
Ramp: TypeAlias = tuple[tuple[float, Colour], ...]
"""Values in [0, 1], rising, each with its colour; linear in between."""

HEAT: Ramp = (
    (0.0, (24, 16, 72)),
    (0.25, (96, 24, 140)),
    (0.5, (206, 48, 112)),
    (0.75, (250, 132, 50)),
    (1.0, (255, 240, 150)),
)
"""Colours of activation maps."""

# The colour jumps where the training of a segmenter begins to trust a pixel.
CONFIDENCE: Ramp = (
    (0.0, (110, 16, 40)),
    (0.6, (224, 74, 46)),
    (CONFIDENCE_THRESHOLD - 1e-6, (255, 220, 120)),
    (CONFIDENCE_THRESHOLD, (150, 214, 190)),
    (1.0, (16, 92, 110)),
)
"""Colours of confidence: warm below the threshold of the confidence-guided loss, cold above."""

_PEN = np.ones((7, 7), np.uint8)
_GOLDEN = (5**0.5 - 1) / 2


def class_colour(index: int) -> Colour:
    """Return the display colour of a class (0-based).

    VOC's own colours are made for files, not for eyes: many are nearly black. These are bright, and
    neighbours in the list are far apart in hue. Golden-ratio steps nearly repeat a hue after 13
    steps; the lightness, which repeats after 3, tells such a pair apart.
    """
    hue = (0.02 + index * _GOLDEN) % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, (0.60, 0.46, 0.73)[index % 3], 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def ramp(colours: Ramp, values: FloatArray) -> UInt8Array:
    """Return the colours of ``values`` in [0, 1] of any shape (...): (..., 3) uint8."""
    at = [value for value, _ in colours]
    channels = [np.interp(values, at, [c[i] for _, c in colours]) for i in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def shrink(image: UInt8Array, side: int) -> UInt8Array:
    """Return an image (H, W, 3), or mask (H, W), with at most ``side`` pixels a side.

    Masks keep their labels: each pixel is one of the original's.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(scale * width)), max(1, round(scale * height))
    how = cv2.INTER_AREA if image.ndim == 3 else cv2.INTER_NEAREST
    small: UInt8Array = np.asarray(cv2.resize(image, size, interpolation=how), dtype=np.uint8)
    return small


def heat_overlay(image: UInt8Array, map_: FloatArray) -> UInt8Array:
    """Lay a map over an image: the higher the value, the less of the image is left.

    Args:
        image: (H, W, 3) RGB.
        map_: (h, w) in [0, 1] at any resolution.

    Returns:
        (H, W, 3) RGB.
    """
    height, width = image.shape[:2]
    full: Float32Array = cv2.resize(map_.astype(np.float32), (width, height)).clip(0, 1)
    opacity = (0.85 * np.sqrt(full))[..., None]
    blend = (1 - opacity) * _faded(image) + opacity * ramp(HEAT, full)
    return np.rint(blend).astype(np.uint8)


def mask_overlay(image: UInt8Array, mask: UInt8Array) -> UInt8Array:
    """Tint and outline what a mask labels, fade the background, and hatch what is ignored.

    Args:
        image: (H, W, 3) RGB.
        mask: (H, W), 0 background, 1..C classes, 255 ignored.

    Returns:
        (H, W, 3) RGB.
    """
    colours = np.array([(0, 0, 0), *map(class_colour, range(IGNORE))], np.float32)
    tint = colours[mask]
    labelled = (mask > 0) & (mask < IGNORE)
    picture = _faded(image)
    picture[labelled] = 0.65 * image[labelled] + 0.35 * tint[labelled]
    rows, columns = np.indices(mask.shape)
    stripe = (mask == IGNORE) & ((rows + columns) % 8 < 4)
    picture[stripe] = 0.4 * picture[stripe] + 0.6 * 255
    # An outline runs inside the object it belongs to, so that neighbours keep theirs.
    edge = labelled & (cv2.erode(mask, _PEN) != cv2.dilate(mask, _PEN))
    picture[edge] = 0.1 * picture[edge] + 0.9 * tint[edge]
    return np.rint(picture).astype(np.uint8)


def _faded(image: UInt8Array) -> FloatArray:
    """Return an image darker and nearly grey, float in [0, 255]: a quiet ground for colours."""
    grey = image.mean(-1, keepdims=True)
    faded: FloatArray = (0.7 * (0.3 * image + 0.7 * grey)).astype(np.float32)
    return faded
