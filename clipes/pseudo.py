"""From refined maps to a pseudo-mask and a confidence map (paper sections 3.3 and 3.4).

No torch in here: the workers of ``clipes refine`` import this module.
"""

from __future__ import annotations

import cv2
import numpy as np

from clipes.config import CrfParams
from clipes.crf import dense_crf
from clipes.errors import ImageError
from clipes.types import CamMaps, Float32Array, FloatArray, Int64Array, PseudoLabel, UInt8Array


def upsample(maps: FloatArray, size: tuple[int, int]) -> Float32Array:
    """Resize (K, h, w) maps to ``size`` (H0, W0), bilinear as cv2.resize does it: (K, H0, W0)."""
    height, width = size
    full: Float32Array = np.stack([cv2.resize(m, (width, height)) for m in maps.astype(np.float32)])
    return full


def with_background(maps: Float32Array, exponent: float) -> Float32Array:
    """Put the background score before the maps.

    Args:
        maps: (K, H, W) in [0, 1].
        exponent: alpha in (1 - max_k map_k)^alpha; above 1 the objects grow, below 1 they shrink.

    Returns:
        (1 + K, H, W) float32 scores, background first, not normalised.
    """
    background = (1 - maps.max(0, keepdims=True)) ** np.float32(exponent)
    return np.concatenate([background, maps], dtype=np.float32)


def label_pixels(scores: Float32Array, labels: Int64Array) -> UInt8Array:
    """Return the mask of the highest scores.

    Args:
        scores: (1 + K, H, W), background first.
        labels: (K,) 0-based classes.

    Returns:
        (H, W) uint8, 0 background, class k as k + 1.
    """
    values = np.concatenate([[0], labels + 1]).astype(np.uint8)
    mask: UInt8Array = values[scores.argmax(0)]
    return mask


def cam_mask(cams: CamMaps, exponent: float) -> UInt8Array:
    """Return the mask that the maps make without a CRF: (H0, W0) uint8."""
    return label_pixels(with_background(upsample(cams.maps, cams.size), exponent), cams.labels)


def pseudo_label(
    image: UInt8Array,
    cams: CamMaps,
    crf: CrfParams,
    *,
    background_exponent: float = 1.0,
    backend: str = "numba",
) -> PseudoLabel:
    """Refine maps with the dense CRF.

    Args:
        image: (H0, W0, 3) RGB, the image the maps belong to.
        cams: Its maps.
        crf: Settings of the CRF.
        background_exponent: alpha, see ``with_background``.
        backend: Implementation of the CRF, see ``clipes.crf``.

    Returns:
        The mask and the CRF's probability of the label chosen at each pixel.

    Raises:
        ImageError: The maps were made from an image of another size.
    """
    if image.shape[:2] != cams.size:
        raise ImageError(
            f"the image is {image.shape[:2]}, but its maps were made at {cams.size}",
            "run 'clipes cam' again for it",
        )
    scores = with_background(upsample(cams.maps, cams.size), background_exponent)
    probs = dense_crf(scores, image, crf, backend=backend)
    return PseudoLabel(label_pixels(probs, cams.labels), probs.max(0))
