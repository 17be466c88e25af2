"""The activation function of a tower's MLPs, and its slope, in one pass over memory."""

from __future__ import annotations

import math

import numpy as np
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from clipes.clip.tiles import computes_alone, flat, shape_of_tiles
from clipes.simd import Width, exp, fill, fma, jit, load, maximum, store, width
from clipes.types import Float32Array

_QUICK = 1.702  # QuickGELU(x) = x sigmoid(1.702 x)
_LOWEST = -87.0  # where the sigmoid, 1e-38, is as good as nothing and its exponential still a float


def activate(activation: nn.Module, hidden: Tensor) -> Tensor:
    """Apply an MLP's activation function; ``hidden`` is overwritten where that is faster."""
    if not _is_compiled(activation, hidden):
        output: Tensor = activation(hidden)
        return output
    nothing = np.empty(0, np.float32)
    _quick_gelu(flat(hidden), flat(hidden), nothing, width(shape_of_tiles()[0]))
    return hidden


def activate_with_slope(activation: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return an MLP's activation function, QuickGELU or GELU, at ``hidden``, and its derivative."""
    if _is_compiled(activation, hidden):
        output, slope = torch.empty_like(hidden), torch.empty_like(hidden)
        _quick_gelu(flat(hidden), flat(output), flat(slope), width(shape_of_tiles()[0]))
        return output, slope
    if isinstance(activation, QuickGELU):
        gate = torch.sigmoid(_QUICK * hidden)
        return hidden * gate, gate * (1 + _QUICK * hidden * (1 - gate))
    density = torch.exp(-0.5 * hidden * hidden) / math.sqrt(2 * math.pi)
    slope = 0.5 * (1 + torch.erf(hidden / math.sqrt(2))) + hidden * density
    return activation(hidden), slope


def _is_compiled(activation: nn.Module, hidden: Tensor) -> bool:
    return isinstance(activation, QuickGELU) and hidden.is_contiguous() and computes_alone(hidden)


@jit
def _quick_gelu(
    hidden: Float32Array, output: Float32Array, slope: Float32Array, lanes: Width
) -> None:
    """Write the activation and, where there is room, its derivative; all arrays flat."""
    n = len(lanes)
    whole = hidden.size - hidden.size % n
    quick, lowest = fill(np.float32(_QUICK), lanes), fill(np.float32(_LOWEST), lanes)
    zero, one = fill(np.float32(0), lanes), fill(np.float32(1), lanes)
    rest = np.zeros(3 * n, np.float32)
    rest[: hidden.size - whole] = hidden[whole:]
    for k in range(0, hidden.size, n):
        x = load(hidden, k, lanes) if k < whole else load(rest, 0, lanes)
        z = x * quick
        gate = one / (one + exp(zero - maximum(z, lowest)))
        derivative = gate * fma(z, one - gate, one)
        if k < whole:
            store(output, k, x * gate)
            if slope.size > 0:
                store(slope, k, derivative)
        else:
            store(rest, n, x * gate)
            store(rest, 2 * n, derivative)
    for k in range(whole, hidden.size):
        output[k] = rest[n + k - whole]
        if slope.size > 0:
            slope[k] = rest[2 * n + k - whole]
