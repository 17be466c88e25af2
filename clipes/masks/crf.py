"""Dense CRF: mean-field inference in a fully connected CRF with Gaussian pairwise terms.

Kraehenbuehl and Koltun 2011, "Efficient Inference in Fully Connected CRFs with Gaussian Edge
Potentials". There are two implementations with the same result: ``numba``, in here, and
``pydensecrf``, the authors' own, which needs a compiler to install and is optional.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from clipes.choices import CrfBackend
from clipes.config import CrfParams
from clipes.errors import BackendError, ImageError, UsageError
from clipes.kernels.lattice import Lattice, build_lattice
from clipes.kernels.simd import Width, exp, fill, jit, load, maximum, store, width
from clipes.types import Float32Array, FloatArray, UInt8Array

# Lower probabilities are taken for this one; the default of pydensecrf's unary_from_softmax.
_MIN_PROBABILITY = 1e-5
_CACHED_PIXELS = 2**20  # the smoothness kernels of larger images are not kept

BYTES_PER_PIXEL, BYTES_PER_LABEL = 450, 14
"""Memory the CRF needs at most, as on pure noise: for a pixel, and for a pixel and label."""

_TOLERANCE = 1e-3  # how far resampling may push scores out of [0, 1]
_BLOCK = 8  # labels filtered at a time: more are no faster and need more memory
_CHUNK = 64  # pixels normalised at a time; a multiple of the lattice's TILE


def dense_crf(
    probs: FloatArray,
    image: UInt8Array,
    params: CrfParams = CrfParams(),  # noqa: B008 (it is frozen)
    *,
    backend: str = "numba",
) -> Float32Array:
    """Refine the scores of labels so that near and similar pixels agree.

    A label costs -log(score), not renormalised over labels. Each pair of pixels with different
    labels costs a smoothness kernel of their distance and an appearance kernel of distance and
    colour, both normalised symmetrically.

    Labels with equal scores get equal probabilities, to the last bit.

    Gives the same result every time, ``numba`` on one core. Beside its arguments, that takes about
    200 bytes per pixel (450 for pure noise, where no two pixels share a vertex of the lattice) and
    14 more per pixel and label: 1.7 GB for a photo of 12 megapixels and 3 labels. The smoothness
    kernels of the last four image sizes below a megapixel are kept, 42 bytes per pixel.

    Args:
        probs: (L, H, W) scores of L labels, in [0, 1].
        image: (H, W, 3) RGB uint8.
        params: Iterations, and the kernels' widths and weights.
        backend: One of ``clipes.choices.CrfBackend``.

    Returns:
        (L, H, W) float32 in [0, 1] that sum to 1 over labels.

    Raises:
        ImageError: The image is empty or not RGB uint8.
        UsageError: The scores are no probabilities or do not fit the image, a parameter is out of
            range, or there is no such backend.
        BackendError: ``pydensecrf`` is asked for and not installed.
    """
    if backend not in CrfBackend.names():
        raise UsageError(
            f"unknown CRF backend '{backend}'", f"choose one of {', '.join(CrfBackend.names())}"
        )
    _check_image(image)
    _check_scores(probs, image)
    _check_params(params)
    if len(probs) == 1:
        return np.ones(probs.shape, np.float32)
    scores = np.ascontiguousarray(probs, np.float32)
    infer = {"numba": _mean_field, "pydensecrf": _pydensecrf}[backend]
    return infer(scores, np.ascontiguousarray(image), params)


def _check_image(image: UInt8Array) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ImageError(
            f"an image of shape {image.shape} and type {image.dtype}",
            "convert it to RGB uint8 of shape (H, W, 3)",
        )
    if image.size == 0:
        raise ImageError(f"an image of shape {image.shape} has no pixels")


def _check_scores(probs: FloatArray, image: UInt8Array) -> None:
    if probs.ndim != 3 or len(probs) == 0 or probs.dtype.kind != "f":
        raise UsageError(
            f"scores of shape {probs.shape} and type {probs.dtype}",
            "give floats of shape (L, H, W)",
        )
    if probs.shape[1:] != image.shape[:2]:
        raise UsageError(
            f"scores of size {probs.shape[1:]} for an image of size {image.shape[:2]}",
            "resize the scores to the image",
        )
    low, high = float(probs.min()), float(probs.max())
    if not -_TOLERANCE <= low <= high <= 1 + _TOLERANCE:  # NaN fails this, too
        raise UsageError(f"scores from {low:g} to {high:g}", "give probabilities, in [0, 1]")


def _check_params(params: CrfParams) -> None:
    if params.iterations < 0:
        raise UsageError(f"{params.iterations} iterations of the CRF", "give 0 or more")
    for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
        if not 0 < getattr(params, name) < math.inf:
            raise UsageError(f"{name} = {getattr(params, name)}", "give a positive number")
    for name in ("gaussian_compat", "bilateral_compat"):
        if not 0 <= getattr(params, name) < math.inf:
            raise UsageError(f"{name} = {getattr(params, name)}", "give 0 or a positive number")


def _pydensecrf(scores: Float32Array, image: UInt8Array, params: CrfParams) -> Float32Array:
    try:
        from pydensecrf.densecrf import DenseCRF2D
        from pydensecrf.utils import unary_from_softmax
    except ImportError as error:
        raise BackendError(
            f"the CRF backend pydensecrf cannot be imported ({error})",
            "pip install pydensecrf2 (Python before 3.13, a C++ compiler), or use numba",
        ) from error
    labels, height, columns = scores.shape
    crf = DenseCRF2D(columns, height, labels)
    crf.setUnaryEnergy(unary_from_softmax(scores, clip=_MIN_PROBABILITY))
    crf.addPairwiseGaussian(sxy=params.gaussian_sxy, compat=params.gaussian_compat)
    crf.addPairwiseBilateral(
        sxy=params.bilateral_sxy,
        srgb=params.bilateral_srgb,
        rgbim=image,
        compat=params.bilateral_compat,
    )
    q = np.array(crf.inference(params.iterations), np.float32).reshape(scores.shape)
    # It rounds some labels otherwise than others, so those with equal scores drift apart.
    _, group = np.unique(scores.reshape(len(scores), -1), axis=0, return_inverse=True)
    return np.stack([q[group.ravel() == mine].mean(0) for mine in group.ravel()])


# --- numba


def _kernel(features: Float32Array, points: int, compat: float) -> Lattice:
    """Return a pairwise term, ready to turn probabilities into messages.

    Its barycentric weights contain the normalisation and the root of the Potts weight, so that both
    apply once on the way in and once on the way out.
    """
    lattice = build_lattice(features, points)
    ones = np.ones(features.shape[1], np.float32)
    mass = np.maximum(lattice.filter(ones), np.float32(1e-20))  # there is none in the padding
    lattice.weights[:] *= (np.float32(math.sqrt(compat)) / np.sqrt(mass))[:, None]
    return lattice


def _positions(height: int, columns: int, sxy: float, colours: int) -> Float32Array:
    """Return (2 + colours, P) features: x / sxy, y / sxy, and zeros for the colours and the rest.

    P is an odd number of chunks, lest rows of such arrays fall into the same sets of the cache.
    """
    points = height * columns
    chunks = -(-points // _CHUNK)
    features = np.zeros((2 + colours, (chunks + 1 - chunks % 2) * _CHUNK), np.float32)
    x, y = np.arange(columns, dtype=np.float32), np.arange(height, dtype=np.float32)
    features[0, :points] = np.tile(x / np.float32(sxy), height)
    features[1, :points] = np.repeat(y / np.float32(sxy), columns)
    return features


@lru_cache(maxsize=4)
def _smoothness(height: int, columns: int, sxy: float, compat: float) -> Lattice:
    return _kernel(_positions(height, columns, sxy, 0), height * columns, compat)


def _appearance(image: UInt8Array, sxy: float, srgb: float, compat: float) -> Lattice:
    height, columns = image.shape[:2]
    points = height * columns
    features = _positions(height, columns, sxy, 3)
    features[2:, :points] = image.reshape(points, 3).T
    features[2:] /= np.float32(srgb)
    return _kernel(features, points, compat)


def _blocks(labels: int) -> list[int]:
    """Return how many labels to filter at a time: powers of two, together ``labels`` or more."""
    full, rest = divmod(labels, _BLOCK)
    return [_BLOCK] * full + ([1 << (rest - 1).bit_length()] if rest else [])


def _mean_field(scores: Float32Array, image: UInt8Array, params: CrfParams) -> Float32Array:
    labels, height, columns = scores.shape
    points = height * columns
    smoothness = _smoothness if points <= _CACHED_PIXELS else _smoothness.__wrapped__
    kernels = (
        _appearance(image, params.bilateral_sxy, params.bilateral_srgb, params.bilateral_compat),
        smoothness(height, columns, params.gaussian_sxy, params.gaussian_compat),
    )

    # Only differences to the first label count. The filter is linear, so it is given differences of
    # probabilities: one label less to filter, and labels with equal scores stay equal to the last
    # bit, the first one, too. (What others leave of 1 would differ from its equals by rounding,
    # which the iterations magnify until it decides.)
    others = labels - 1
    blocks = _blocks(others)
    size = len(kernels[0].corners)
    logits = np.zeros((others, size), np.float32)
    reference = np.log(np.clip(scores[0], _MIN_PROBABILITY, 1)).ravel()
    for row, score in zip(logits[:, :points], scores[1:], strict=True):
        np.log(np.clip(score.ravel(), _MIN_PROBABILITY, 1), out=row)
        row -= reference
    q = np.zeros((1 + sum(blocks), size), np.float32)
    tables = [np.empty(kernel.rows * max(blocks), np.float32) for kernel in kernels]
    for iteration in range(params.iterations + 1):
        last = iteration == params.iterations
        _normalise(logits, q, np.float32(0 if last else 1), width(_CHUNK))
        first = 1
        for lanes in [] if last else blocks:
            block = q[first : first + lanes]
            first += lanes
            for kernel, table in zip(kernels, tables, strict=True):
                table[:] = 0
                kernel.splat(block, table)
                kernel.blur(table, lanes)
            block[:] = 0
            for kernel, table in zip(kernels, tables, strict=True):
                kernel.slice(table, block)
    return np.ascontiguousarray(q[:labels, :points]).reshape(scores.shape)


@jit
def _normalise(logits: Float32Array, q: Float32Array, less: np.float32, chunk: Width) -> None:
    """Turn messages into probabilities, in place: softmax of logits plus messages over labels.

    Args:
        logits: (L - 1, P), relative to the first label.
        q: (L or more, P), the messages from row 1 on, relative to the first label; afterwards, the
            probability of the first label and those of the others.
        less: How many times the first label's probability is taken from each of the others'.
        chunk: Pixels at a time.
    """
    labels, points = logits.shape
    scores, values = logits.ravel(), q.ravel()
    zero, times = fill(np.float32(0), chunk), fill(less, chunk)
    for first in range(0, points, len(chunk)):
        end = first + labels * points
        highest = zero
        for at in range(first, end, points):
            score = load(scores, at, chunk) + load(values, at + points, chunk)
            store(values, at + points, score)
            highest = maximum(highest, score)
        reference = exp(zero - highest)
        mass = reference
        for at in range(first + points, end + points, points):
            value = exp(load(values, at, chunk) - highest)
            store(values, at, value)
            mass = mass + value
        reference = reference / mass
        store(values, first, reference)
        for at in range(first + points, end + points, points):
            store(values, at, load(values, at, chunk) / mass - times * reference)
