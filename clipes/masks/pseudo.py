"""From refined maps to a pseudo-mask and a confidence map (paper sections 3.3 and 3.4).

No torch in here: the workers of ``clipes refine`` import this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import cv2
import numpy as np

from clipes.config import CrfParams
from clipes.disk.images import MAX_PIXELS
from clipes.errors import ImageError
from clipes.masks.crf import BYTES_PER_LABEL, BYTES_PER_PIXEL, dense_crf
from clipes.masks.values import value_count, value_of
from clipes.types import (
    CamMaps,
    Float32Array,
    FloatArray,
    Int64Array,
    PseudoLabel,
    UInt8Array,
    shrunk_size,
)

SHRUNK = "are so large that their masks were made on a smaller copy, with 2 GB of memory"
"""Said of images beyond ``workable_size``."""

_STRIP = 1 << 22  # pixels of a tiled picture that are labelled at a time

_MEMORY = 2 << 30  # bytes for the work on one image, beside the image and its output


def workable_size(
    size: tuple[int, int],
    labels: int,
    *,
    crf: bool = True,
    bytes_per_label: int = 0,
) -> tuple[int, int]:
    """Return the size at which an image is worked on: its own, if that fits into memory.

    What takes memory by the pixel and by the label is held to 2 GB, so that neither a photo of 100
    megapixels nor 250 labels end a run: with the CRF 4.5 megapixels for two labels, 2.9 for 21.

    Args:
        size: (H, W) of the image.
        labels: Labels, background included.
        crf: Whether the dense CRF is part of the work.
        bytes_per_label: What else is needed for each pixel and label.
    """
    return shrunk_size(size, _MEMORY // _bytes_per_pixel(labels, crf, bytes_per_label))


def _bytes_per_pixel(labels: int, crf: bool, bytes_per_label: int) -> int:
    needed = labels * bytes_per_label
    return needed + (BYTES_PER_PIXEL + labels * BYTES_PER_LABEL if crf else 0)


def shrunk(image: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Return an image (H, W, 3) at a smaller ``size``, itself if that is its own."""
    if image.shape[:2] == size:
        return image
    return np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), np.uint8)


def largest_tile(labels: int, *, crf: bool = True, bytes_per_label: int = 0) -> int:
    """Return the side of the largest square that fits into memory; see ``workable_size``."""
    return math.isqrt(_MEMORY // _bytes_per_pixel(labels, crf, bytes_per_label))


def upsample(maps: FloatArray, size: tuple[int, int]) -> Float32Array:
    """Resize (K, h, w) maps to ``size`` (H0, W0), bilinear as cv2.resize does it: (K, H0, W0)."""
    height, width = size
    full: Float32Array = np.stack([cv2.resize(m, (width, height)) for m in maps.astype(np.float32)])
    return full


def upsample_part(
    maps: FloatArray, size: tuple[int, int], rows: slice, columns: slice
) -> Float32Array:
    """Return a part of what ``upsample`` returns, without the rest: (K, rows, columns)."""
    if (rows.stop - rows.start, columns.stop - columns.start) == size:
        return upsample(maps, size)
    down = _interpolation(maps.shape[1], size[0], rows)
    across = _interpolation(maps.shape[2], size[1], columns)
    part: Float32Array = down @ maps.astype(np.float32) @ across.T
    return part


def _interpolation(length: int, full: int, part: slice) -> Float32Array:
    """Return the weights (part, length) of ``length`` values at some of ``full`` places."""
    places = (np.arange(part.start, part.stop) + 0.5) * (length / full) - 0.5
    before = np.floor(places)
    share = (places - before).astype(np.float32)
    weights = np.zeros((len(places), length), np.float32)
    row = np.arange(len(places))
    for index, weight in ((before, 1 - share), (before + 1, share)):
        np.add.at(weights, (row, np.clip(index, 0, length - 1).astype(int)), weight)
    return weights


def with_background(maps: Float32Array, exponent: float) -> Float32Array:
    """Put the background score before the maps.

    Args:
        maps: (K, H, W) in [0, 1].
        exponent: alpha in (1 - max_k map_k)^alpha; above 1 the objects grow, below 1 they shrink.

    Returns:
        (1 + K, H, W) float32 scores, background first, not normalised.
    """
    background = _background(maps.max(0, keepdims=True), exponent)
    return np.concatenate([background, maps], dtype=np.float32)


def _background(highest: Float32Array, exponent: float) -> Float32Array:
    """Return the background score where the highest of all maps is known, of the same shape."""
    score: Float32Array = (1 - highest) ** np.float32(exponent)
    return score


def in_mask_order(cams: CamMaps) -> CamMaps:
    """Return the maps by ascending label, so that no result depends on their order in a file.

    Sums over labels round, and of equal scores ``label_pixels`` takes the first.
    """
    order = np.argsort(cams.labels, kind="stable")
    drift = None if cams.drift is None else cams.drift[order]
    return replace(cams, labels=cams.labels[order], maps=cams.maps[order], drift=drift)


def label_pixels(scores: Float32Array, labels: Int64Array) -> UInt8Array:
    """Return the mask of the highest scores; of equal ones, of the first.

    Args:
        scores: (1 + K, H, W), background first.
        labels: (K,) 0-based classes.

    Returns:
        (H, W) uint8, 0 background, class k as k + 1.
    """
    values = np.array([0, *_values(labels)], np.uint8)
    mask: UInt8Array = values[scores.argmax(0)]
    return mask


def disagreement(one: Float32Array, other: Float32Array) -> Float32Array:
    """Return how little two sets of maps agree on where each class is, patch by patch.

    Args:
        one: (K, h, w) in [0, 1].
        other: Likewise, of the same classes.

    Returns:
        (K,) float32, 1 - IoU of the patches that each labels with a class, the background score
        being 1 - max_k map_k; 1 for a class that neither labels anywhere.
    """
    first, second = (with_background(maps, 1.0).argmax(0) for maps in (one, other))
    numbers = np.arange(1, 1 + len(one))[:, None, None]
    here, there = first == numbers, second == numbers
    union = (here | there).sum((1, 2))
    both = (here & there).sum((1, 2))
    return np.asarray(1 - both / np.maximum(union, 1), np.float32)


def cam_mask(cams: CamMaps, exponent: float) -> UInt8Array:
    """Return the mask that the maps make without a CRF: (H0, W0) uint8."""
    return cam_masks(cams, [exponent])[0]


def cam_masks(cams: CamMaps, exponents: Sequence[float]) -> list[UInt8Array]:
    """Return the masks of several exponents of the background: (H0, W0) uint8 each.

    Memory does not grow with the number of classes, and beyond ``MAX_PIXELS`` hardly with the size.
    """
    cams = in_mask_order(cams)
    height, width = cams.size
    whole = height * width <= MAX_PIXELS
    step = height if whole else max(1, _STRIP // width)
    masks = [np.empty(cams.size, np.uint8) for _ in exponents]
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        resized = (
            upsample_part(one[None], cams.size, rows, slice(0, width))[0] for one in cams.maps
        )
        classes, highest = _highest(resized, _values(cams.labels))
        for mask, exponent in zip(masks, exponents, strict=True):
            mask[rows] = np.where(_background(highest, exponent) >= highest, 0, classes)
    return masks


def _highest(
    scores: Iterable[Float32Array], values: Iterable[int]
) -> tuple[UInt8Array, Float32Array]:
    """Return the value of highest score at each pixel, of equal ones the first, and that score.

    Args:
        scores: (H, W) of each value, one at a time.
        values: Of the mask.
    """
    several = zip(values, scores, strict=True)
    value, highest = next(several)
    mask = np.full(highest.shape, value, np.uint8)
    for value, one in several:
        mask[one > highest] = value
        np.maximum(highest, one, out=highest)
    return mask, highest


def _values(labels: Int64Array) -> list[int]:
    """Return the mask values of (K,) 0-based classes."""
    return [*map(value_of, labels.tolist())]


def pseudo_label(
    image: UInt8Array,
    cams: CamMaps,
    crf: CrfParams,
    *,
    background_exponent: float = 1.0,
    backend: str = "numba",
) -> PseudoLabel:
    """Refine maps with the dense CRF.

    On images beyond ``workable_size`` the CRF works on a smaller copy. Where labels are equally
    probable, the background wins, then the class that is first in mask order.

    Args:
        image: (H0, W0, 3) RGB, the image the maps belong to.
        cams: Its maps.
        crf: Settings of the CRF.
        background_exponent: alpha, see ``with_background``.
        backend: Implementation of the CRF, see ``clipes.masks.crf``.

    Returns:
        The mask and the CRF's probability of the label chosen at each pixel.

    Raises:
        ImageError: The maps were made from an image of another size.
    """
    require_size(image.shape[:2], cams)
    cams = in_mask_order(cams)
    size = workable_size(cams.size, value_count(len(cams.labels)))
    scores = with_background(upsample(cams.maps, size), background_exponent)
    probs = dense_crf(scores, shrunk(image, size), crf, backend=backend)
    return most_probable(probs, cams.labels, cams.size)


def require_size(size: tuple[int, ...], cams: CamMaps) -> None:
    """Refuse maps that were made from an image of another size than (H, W).

    Raises:
        ImageError: They were.
    """
    if size != cams.size:
        raise ImageError(
            f"the image is {size}, but its maps were made at {cams.size}",
            "run 'clipes cam' again for it",
        )


def part_probs(
    image: UInt8Array,
    cams: CamMaps,
    rows: slice,
    columns: slice,
    crf: CrfParams,
    *,
    background_exponent: float = 1.0,
    backend: str = "numba",
) -> Float32Array:
    """Return what the dense CRF says of a part of an image that knows of that part alone.

    Args:
        image: (h, w, 3) RGB of the part.
        cams: Maps of the whole image, in mask order.
        rows: Of the part.
        columns: Of the part.
        crf: As for ``pseudo_label``.
        background_exponent: As for ``pseudo_label``.
        backend: As for ``pseudo_label``.

    Returns:
        (1 + K, h, w) that sum to 1, background first.
    """
    scores = with_background(
        upsample_part(cams.maps, cams.size, rows, columns), background_exponent
    )
    return dense_crf(scores, image, crf, backend=backend)


def most_probable(probs: Float32Array, labels: Int64Array, size: tuple[int, int]) -> PseudoLabel:
    """Return the label of highest probability at each pixel, of equal ones the first.

    Args:
        probs: (1 + K, h, w), background first; enlarged to ``size``, one label at a time.
        labels: (K,) 0-based classes.
        size: (H, W) of the image.
    """
    if probs.shape[1:] == size:
        return PseudoLabel(label_pixels(probs, labels), probs.max(0))
    full = (np.asarray(cv2.resize(one, size[::-1]), np.float32) for one in probs)
    return PseudoLabel(*_highest(full, [0, *_values(labels)]))
