"""Mean-field inference of the dense CRF on a torch device.

What ``clipes.crf`` describes, for images that stay on a GPU from the upload of image and scores to
the download of the result. The way there differs from the ``numba`` backend's: all labels are
filtered at once, and none is left out, because more numbers at a time cost a GPU less than more
steps.
"""

from __future__ import annotations

import math
import os
import threading
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from clipes.config import CrfParams
from clipes.crf import CACHED_PIXELS, MIN_PROBABILITY
from clipes.device import choose_device, memory_error_as
from clipes.lattice_torch import TorchLattice, build_torch_lattice
from clipes.types import Float32Array, UInt8Array

_LARGEST_COLOUR = 255

_ON_GPU = threading.Lock()  # held by the thread whose image is there


@torch.inference_mode()
def dense_crf_torch(
    scores: Float32Array,
    image: UInt8Array,
    params: CrfParams,
    device: torch.device | None = None,
) -> Float32Array:
    """Run the dense CRF; ``clipes.crf.dense_crf`` checks the arguments.

    Threads may call this at the same time. On a GPU they take turns, so that only one image needs
    memory there.

    Args:
        scores: (L, H, W) in [0, 1].
        image: (H, W, 3) RGB uint8.
        params: Iterations, and the kernels' widths and weights.
        device: Where to compute; None for a GPU if there is one, else the processor.

    Returns:
        (L, H, W) float32 in [0, 1] that sum to 1 over labels.

    Raises:
        UsageError: A kernel is too narrow for an image of this size.
        BackendError: The GPU has too little memory.
    """
    if device is None:
        device = choose_device("auto", int(os.environ.get("LOCAL_RANK", "0")))
    enough_memory = memory_error_as(
        f"{device} has too little free memory for the CRF of an image of "
        f"{image.shape[1]} x {image.shape[0]} pixels and {len(scores)} labels",
        "free some, or use the CRF backend numba",
    )
    with _ON_GPU if device.type == "cuda" else nullcontext(), enough_memory:
        probs = mean_field(
            torch.tensor(scores, device=device), torch.tensor(image, device=device), params
        )
        result: Float32Array = probs.cpu().numpy()
    return result


def mean_field(scores: Tensor, image: Tensor, params: CrfParams) -> Tensor:
    """Run the dense CRF on the device that scores (L, H, W) and image (H, W, 3) are on."""
    labels, height, columns = scores.shape
    smoothness = _smoothness if height * columns <= CACHED_PIXELS else _smoothness.__wrapped__
    kernels = (
        _appearance(image, params.bilateral_sxy, params.bilateral_srgb, params.bilateral_compat),
        smoothness(height, columns, params.gaussian_sxy, params.gaussian_compat, image.device),
    )
    logits = scores.reshape(labels, -1).t().clamp(MIN_PROBABILITY, 1).log().contiguous()
    q = logits.softmax(1)
    for _ in range(params.iterations):
        messages = kernels[0].filter(q)
        messages += kernels[1].filter(q)
        q = messages.add_(logits).softmax(1)
    return q.t().reshape(labels, height, columns)


def _appearance(image: Tensor, sxy: float, srgb: float, compat: float) -> TorchLattice:
    height, columns = image.shape[:2]
    colours = _divided(image.reshape(-1, 3).t().float(), srgb)
    features = torch.cat([_positions(height, columns, sxy, image.device), colours])
    high = [(columns - 1) / sxy, (height - 1) / sxy, *[_LARGEST_COLOUR / srgb] * 3]
    return _kernel(features, high, compat)


@lru_cache(maxsize=4)
def _smoothness(
    height: int, columns: int, sxy: float, compat: float, device: torch.device
) -> TorchLattice:
    high = [(columns - 1) / sxy, (height - 1) / sxy]
    return _kernel(_positions(height, columns, sxy, device), high, compat)


def _positions(height: int, columns: int, sxy: float, device: torch.device) -> Tensor:
    """Return (2, H * W) features: x / sxy and y / sxy."""
    x = _divided(torch.arange(columns, dtype=torch.float32, device=device), sxy)
    y = _divided(torch.arange(height, dtype=torch.float32, device=device), sxy)
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, columns)]).view(2, -1)


def _divided(values: Tensor, divisor: float) -> Tensor:
    # By a number torch would divide as it is fastest on a GPU: by multiplying with the reciprocal,
    # which is not what the other backends do.
    return values / values.new_full((), divisor)


def _kernel(features: Tensor, high: list[float], compat: float) -> TorchLattice:
    """Return a pairwise term, whose ``filter`` turns probabilities into messages.

    The weights contain the normalisation and the root of the Potts weight, so that both apply once
    on the way in and once on the way out.

    Args:
        features: (d, P) float32, none below 0.
        high: What each feature is at most.
        compat: The Potts weight.
    """
    upper = np.array(high, np.float32)
    lattice = build_torch_lattice(features, np.zeros_like(upper), upper)
    mass = lattice.filter(torch.ones_like(features[:1].t()))
    return lattice.times(math.sqrt(compat) * mass[:, 0].rsqrt())
