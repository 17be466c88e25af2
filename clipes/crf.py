"""Dense CRF: mean-field inference in a fully connected CRF with Gaussian pairwise terms.

Kraehenbuehl and Koltun 2011, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials". Two implementations give the same result up to rounding: ``numba``, in here, and
``pydensecrf``, the authors' code, which is optional because it needs a compiler to install.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clipes.config import CrfParams
from clipes.errors import BackendError, ImageError, UsageError
from clipes.lattice import TILE, Lattice, build_lattice
from clipes.simd import exp, fill, jit, load, maximum, store, width
from clipes.types import Float32Array, FloatArray, UInt8Array

BACKENDS = ("numba", "pydensecrf")

MIN_PROBABILITY = 1e-5
"""Probabilities are clipped here before the logarithm (``unary_from_softmax`` of pydensecrf)."""

_BLOCK = 8  # Labels filtered at a time: 16 are no faster per label and need twice the memory.
_CACHED_PIXELS = 2**20  # Smoothness kernels of larger images are not kept: 50 bytes per pixel.


def dense_crf(
    probs: FloatArray,
    image: UInt8Array,
    params: CrfParams = CrfParams(),  # noqa: B008, it is frozen
    *,
    backend: str = "numba",
) -> Float32Array:
    """Refine label probabilities so that nearby pixels of similar colour agree.

    The energy of a label is -log(probability), without renormalisation over labels; pairs of pixels with different labels
    pay a smoothness kernel (distance) and an appearance kernel (distance and colour), both
    symmetrically normalised.

    The memory needed is about 110 bytes per pixel, 100 more for each thousand vertices.

    Args:
        probs: (L, H, W) scores in [0, 1] of L labels.
        image: (H, W, 3) RGB uint8.
        params: Iterations, kernel widths and weights.
        backend: ``numba`` or ``pydensecrf``.

    Returns:
        (L, H, W) float32 in [0, 1], summing to 1 over labels.

    Raises:
        ImageError: The image is empty or not RGB uint8.
        UsageError: The scores do not fit the image or are no probabilities, a parameter is out of
            range, or there is no such backend.
        BackendError: ``pydensecrf`` is asked for but not installed.
    """
    scores = _checked(probs, image, params)
    if backend not in BACKENDS:
        raise UsageError(f"unknown CRF backend '{backend}'", f"choose one of {', '.join(BACKENDS)}")
    if len(scores) == 1:
        return np.ones(scores.shape, np.float32)
    run = _mean_field if backend == "numba" else _pydensecrf
    return run(scores, np.ascontiguousarray(image), params)


def _checked(probs: FloatArray, image: UInt8Array, params: CrfParams) -> Float32Array:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ImageError(
            f"image of shape {image.shape} and type {image.dtype}", "convert it to RGB uint8 (H, W, 3)"
        )
    if image.size == 0:
        raise ImageError(f"image of shape {image.shape} has no pixels")
    if probs.ndim != 3 or len(probs) == 0 or probs.dtype.kind != "f":
        raise UsageError(
            f"label scores of shape {probs.shape} and type {probs.dtype}", "give floats (L, H, W)"
        )
    if probs.shape[1:] != image.shape[:2]:
        raise UsageError(
            f"label scores of size {probs.shape[1:]} for an image of size {image.shape[:2]}",
            "resize the scores to the image",
        )
    low, high = float(probs.min()), float(probs.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise UsageError(f"label scores from {low:g} to {high:g}", "give probabilities in [0, 1]")
    if params.iterations < 0:
        raise UsageError(f"{params.iterations} CRF iterations", "give 0 or more")
    for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
        value = getattr(params, name)
        if not 0 < value < math.inf:
            raise UsageError(f"{name} is {value}", "give a positive number")
    for name in ("gaussian_compat", "bilateral_compat"):
        value = getattr(params, name)
        if not 0 <= value < math.inf:
            raise UsageError(f"{name} is {value}", "give a number of at least 0")
    return np.ascontiguousarray(probs, np.float32)


def _pydensecrf(probs: Float32Array, image: UInt8Array, params: CrfParams) -> Float32Array:
    try:
        from pydensecrf.densecrf import DenseCRF2D
        from pydensecrf.utils import unary_from_softmax
    except ImportError as error:
        raise BackendError(
            f"the CRF backend pydensecrf is not installed ({error})",
            "pip install pydensecrf2 (Python below 3.13 and a C++ compiler), or use numba",
        ) from error
    labels, height, width_ = probs.shape
    crf = DenseCRF2D(width_, height, labels)
    crf.setUnaryEnergy(unary_from_softmax(probs, clip=MIN_PROBABILITY))
    crf.addPairwiseGaussian(sxy=params.gaussian_sxy, compat=params.gaussian_compat)
    crf.addPairwiseBilateral(
        sxy=params.bilateral_sxy,
        srgb=params.bilateral_srgb,
        rgbim=image,
        compat=params.bilateral_compat,
    )
    result = np.array(crf.inference(params.iterations), np.float32)
    return result.reshape(probs.shape)


# --- numba


@dataclass(frozen=True)
class _Kernel:
    """A pairwise term.

    Normalisation and Potts weight are in the lattice's barycentric weights, once on the way in and
    once on the way out, so that filtering probabilities gives messages.

    Attributes:
        lattice: The lattice with those weights.
        total: (P,) float32, the message of probabilities that are 1 everywhere.
    """

    lattice: Lattice
    total: Float32Array


def _kernel(features: Float32Array, points: int, compat: float) -> _Kernel:
    lattice = build_lattice(features, points)
    ones = np.ones((1, len(lattice.weights)), np.float32)
    mass = lattice.filter(ones)[0] * np.float32(lattice.gain)
    root = (1 / np.sqrt(mass + np.float64(1e-20))).astype(np.float32)
    lattice.weights[:] *= (root * np.float32(math.sqrt(compat * lattice.gain)))[:, None]
    return _Kernel(lattice, lattice.filter(ones)[0])


def _padded(points: int) -> int:
    tiles = -(-points // 64)
    return (tiles + (tiles % 2 == 0)) * 64


def _grid(height: int, width_: int, sxy: float, channels: int) -> Float32Array:
    """Return (2 + channels, P) features, of which x / sxy and y / sxy are filled in."""
    points = height * width_
    features = np.zeros((2 + channels, _padded(points)), np.float32)
    y, x = np.divmod(np.arange(points), width_)
    features[0, :points] = x.astype(np.float32) / np.float32(sxy)
    features[1, :points] = y.astype(np.float32) / np.float32(sxy)
    return features


@lru_cache(maxsize=4)
def _smoothness(height: int, width_: int, sxy: float, compat: float) -> _Kernel:
    return _kernel(_grid(height, width_, sxy, 0), height * width_, compat)


def _appearance(image: UInt8Array, params: CrfParams) -> _Kernel:
    height, width_ = image.shape[:2]
    points = height * width_
    features = _grid(height, width_, params.bilateral_sxy, 3)
    features[2:, :points] = image.reshape(points, 3).T
    features[2:] /= np.float32(params.bilateral_srgb)
    return _kernel(features, points, params.bilateral_compat)


def _blocks(labels: int) -> list[int]:
    """Return how many labels to filter at a time, powers of two."""
    blocks = [_BLOCK] * (labels // _BLOCK)
    rest = labels % _BLOCK
    return blocks + [1 << (rest - 1).bit_length()] * (rest > 0)


def _mean_field(probs: Float32Array, image: UInt8Array, params: CrfParams) -> Float32Array:
    labels, height, width_ = probs.shape
    points = height * width_
    smoothness = _smoothness if points <= _CACHED_PIXELS else _smoothness.__wrapped__
    kernels = (
        _appearance(image, params),
        smoothness(height, width_, params.gaussian_sxy, params.gaussian_compat),
    )

    # Probabilities sum to 1, so the messages of all labels sum to a number known for each pixel,
    # and what the last label receives is what the others leave: it is never filtered.
    others = labels - 1
    blocks = _blocks(others)
    padded = _padded(points)
    logits = np.zeros((others, padded), np.float32)
    flat = np.log(np.clip(probs.reshape(labels, points), MIN_PROBABILITY, 1))
    np.subtract(flat[:others], flat[others], out=logits[:, :points])
    q = np.zeros((sum(blocks), padded), np.float32)
    total = np.zeros(padded, np.float32)
    _normalise(logits, total, q, width(64))
    for kernel in kernels:
        total += kernel.total
    tables = [np.empty(k.lattice.rows * max(blocks), np.float32) for k in kernels]
    for _ in range(params.iterations):
        first = 0
        for lanes in blocks:
            block = q[first : first + lanes]
            for kernel, table in zip(kernels, tables, strict=True):
                table[:] = 0
                kernel.lattice.splat(block, table)
                kernel.lattice.blur(table, lanes)
            block[:] = 0
            for kernel, table in zip(kernels, tables, strict=True):
                kernel.lattice.slice(table, block)
            first += lanes
        _normalise(logits, total, q, width(64))

    result = np.empty((labels, points), np.float32)
    result[:others] = q[:others, :points]
    result[others] = np.maximum(1 - result[:others].sum(0), 0)
    return result.reshape(probs.shape)


@jit
def _normalise(logits, total, q, tile):
    """Replace messages by probabilities: softmax of logits plus messages over labels."""
    labels, points = logits.shape
    logits, q = logits.ravel(), q.ravel()
    zero = fill(np.float32(0), tile)
    for first in range(0, points, len(tile)):
        left = zero - load(total, first, tile)
        end = first + labels * points
        for at in range(first, end, points):
            left = left + load(q, at, tile)
        top = zero
        for at in range(first, end, points):
            score = load(logits, at, tile) + load(q, at, tile) + left
            store(q, at, score)
            top = maximum(top, score)
        mass = exp(zero - top)
        for at in range(first, end, points):
            value = exp(load(q, at, tile) - top)
            store(q, at, value)
            mass = mass + value
        scale = fill(np.float32(1), tile) / mass
        for at in range(first, end, points):
            store(q, at, load(q, at, tile) * scale)
