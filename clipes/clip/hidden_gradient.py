"""The gradient of one class at an MLP's hidden units, in one pass over memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clipes.clip.tiles import computes_alone, flat, shape_of_tiles
from clipes.simd import Width, add_lanes, fill, fma, jit, load, store, width
from clipes.types import Float32Array


def gradient_at_hidden(
    direct: Tensor,
    along: Tensor,
    common: Tensor,
    slope: Tensor,
    factor: Tensor,
    unit: tuple[Tensor, Tensor],
    mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return G = factor slope (direct - along common), G . (unit[0] - unit[1]) and G . mean.

    Args:
        direct: (C,) what reaches the hidden units C of all tokens N alike.
        along: (N,).
        common: (N, C).
        slope: (N, C) of the activation function.
        factor: (N,).
        unit: (N, C) and (C,).
        mean: (C,).

    Returns:
        (N, C), (N,) and (N,).
    """
    channels = slope.shape[1]
    lanes, _ = shape_of_tiles()
    if channels % lanes or not computes_alone(slope):
        at_hidden = torch.addcmul(direct, along[:, None], common, value=-1)
        at_hidden *= slope * factor[:, None]
        return at_hidden, (at_hidden * (unit[0] - unit[1])).sum(1), at_hidden @ mean
    at_hidden = torch.empty_like(slope)
    along_unit, along_mean = torch.empty_like(along), torch.empty_like(along)
    read = (direct, along, common, slope, factor, *unit, mean)
    arrays = [flat(part.contiguous()) for part in (*read, at_hidden, along_unit, along_mean)]
    _gradient_at_hidden(width(lanes), *arrays)
    return at_hidden, along_unit, along_mean


@jit
def _gradient_at_hidden(
    lanes: Width,
    direct: Float32Array,
    along: Float32Array,
    common: Float32Array,
    slope: Float32Array,
    factor: Float32Array,
    unit: Float32Array,
    offset: Float32Array,
    mean: Float32Array,
    at_hidden: Float32Array,
    along_unit: Float32Array,
    along_mean: Float32Array,
) -> None:
    """Write the last three arrays; all flat."""
    n, channels = len(lanes), direct.size
    for token in range(along.size):
        less, factors = fill(-along[token], lanes), fill(factor[token], lanes)
        to_unit = fill(np.float32(0), lanes)
        to_mean = to_unit
        for k in range(0, channels, n):
            at = token * channels + k
            at_output = fma(less, load(common, at, lanes), load(direct, k, lanes))
            gradient = at_output * (load(slope, at, lanes) * factors)
            store(at_hidden, at, gradient)
            to_unit = fma(gradient, load(unit, at, lanes) - load(offset, k, lanes), to_unit)
            to_mean = fma(gradient, load(mean, k, lanes), to_mean)
        along_unit[token] = add_lanes(to_unit)
        along_mean[token] = add_lanes(to_mean)
