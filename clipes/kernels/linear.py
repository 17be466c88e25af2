"""Linear layers on whatever this processor multiplies matrices fastest with.

PyTorch's fp32 matrix product goes through MKL, which on AMD processors reaches less than half of
what they can do. The product compiled here reaches about nine tenths in a thread that works
alone. Several threads at one product better are PyTorch's: after each operation they wait a while
for the next, and leave no core to others. For them there is oneDNN, which is behind PyTorch's
convolutions: a linear layer is a 1 x 1 convolution over a column of tokens. Which of them runs is
said by ``clipes.kernels.choose``; no global precision flag is touched, as those may permit bf16.

Lower precision has to be asked for. Then the factors of a product are rounded, its sums and all
else (attention, norms, residuals, the affinity) stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor, nn

from clipes.kernels.simd import Width, jit, load, multiply_tile, store, transpose_tile, width
from clipes.kernels.tiles import flat, in_parts, shape_of_tiles
from clipes.types import Float32Array

Linear: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``linear(x (..., I), weight (O, I), bias (O,) or None) -> (..., O)``."""


_VECTORS = 2  # beside as many rows as registers are left for
_PANELS_AT_ONCE, _DEPTH = 4, 768  # 0.4 MB of weights: they stay in the second-level cache


def linear_by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer as a 1 x 1 convolution; arguments as ``Linear``."""
    column = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    kernel = weight[:, :, None, None]
    # Dilation means nothing to a 1 x 1 kernel, but with it one thread, too, goes through oneDNN.
    out: Tensor = F.conv2d(column, kernel, bias, dilation=2).permute(0, 2, 3, 1)
    return out.reshape(*x.shape[:-1], len(weight))


def linear_by_tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer a few rows and channels at a time; arguments as ``Linear``."""
    lanes, rows = shape_of_tiles()
    outputs, inputs = weight.shape
    panel = _VECTORS * lanes
    by_input = weight.T.is_contiguous() and not weight.is_contiguous()
    if outputs % panel or inputs % lanes:
        return F.linear(x, weight, bias)
    out = x.new_empty(*x.shape[:-1], outputs)
    arguments = (
        flat(x.contiguous()), flat(weight.T if by_input else weight.contiguous()), by_input,
        flat(x.new_zeros(outputs) if bias is None else bias), flat(out), inputs,
        width(lanes), width(rows), width(_VECTORS),
    )  # fmt: skip
    in_parts(_multiply, outputs, panel, arguments)
    return out


class RoundedLinear:
    """A linear layer with its input and weight rounded to fewer bits, its result in float32.

    Args:
        dtype: torch.bfloat16 or torch.float16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._rounded: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the layer; arguments as ``Linear``."""
        product = F.linear(x.to(self._dtype), self._round(weight)).float()
        return product if bias is None else product.add_(bias)

    def _round(self, weight: Tensor) -> Tensor:
        if not isinstance(weight, nn.Parameter):
            return weight.to(self._dtype)
        if id(weight) not in self._rounded:  # keeping the parameter keeps its id its own
            self._rounded[id(weight)] = (weight, weight.to(self._dtype))
        return self._rounded[id(weight)][1]


def make_linear(name: str) -> Linear:
    """Return the linear layer that ``Kernels.linear`` names."""
    named: dict[str, Linear] = {
        "torch": F.linear,
        "tiles": linear_by_tiles,
        "onednn": linear_by_convolution,
    }
    return named[name] if name in named else RoundedLinear(getattr(torch, name))


@jit
def _multiply(
    first: int,
    end: int,
    x: Float32Array,
    weight: Float32Array,
    by_input: bool,
    bias: Float32Array,
    out: Float32Array,
    inputs: int,
    lanes: Width,
    rows: Width,
    vectors: Width,
) -> None:
    """Compute output channels ``first`` to ``end``; all arrays flat.

    Both factors are copied to the order in which a tile reads them, of the input all rows by a
    stretch of its channels. Then a few panels of the weights at a time meet all of them.
    """
    n, count, panel = len(lanes), len(rows), len(lanes) * len(vectors)
    outputs = bias.size
    tokens = out.size // outputs
    tiles = -(-tokens // count)
    longest = min(inputs, _DEPTH)
    left = np.empty(tiles * count * longest + n, np.float32)
    left[(tiles - 1) * count * longest :] = 0  # rows beyond the last; their sums are not used
    right = np.empty(_PANELS_AT_ONCE * panel * longest, np.float32)
    tile = np.empty(count * panel, np.float32)
    for start in range(0, inputs, _DEPTH):
        depth = min(_DEPTH, inputs - start)
        for row in range(0, tokens, count):
            _interleave(left, row * depth, x, row, start, depth, tokens, inputs, lanes, rows)
        for low in range(first, end, _PANELS_AT_ONCE * panel):
            high = min(low + _PANELS_AT_ONCE * panel, end)
            for channel in range(low, high, n):
                at = (channel - low) // panel * panel * depth + (channel - low) % panel
                if by_input:
                    for k in range(depth):
                        part = load(weight, (start + k) * outputs + channel, lanes)
                        store(right, at + k * panel, part)
                else:
                    for k in range(0, depth, n):
                        from_ = channel * inputs + start + k
                        transpose_tile(weight, from_, inputs, right, at + k * panel, panel, lanes)
            for row in range(0, tokens, count):
                for channel in range(low, high, panel):
                    multiply_tile(
                        left, row * depth, 1, count, right, (channel - low) * depth, panel, depth,
                        tile, 0, panel, rows, vectors, lanes,
                    )  # fmt: skip
                    for number in range(min(count, tokens - row)):
                        for k in range(0, panel, n):
                            at = (row + number) * outputs + channel + k
                            before = load(bias, channel + k, lanes)
                            if start > 0:
                                before = load(out, at, lanes)
                            store(out, at, before + load(tile, number * panel + k, lanes))


@jit
def _interleave(
    to: Float32Array,
    at: int,
    x: Float32Array,
    row: int,
    start: int,
    depth: int,
    tokens: int,
    inputs: int,
    lanes: Width,
    rows: Width,
) -> None:
    """Copy rows ``row`` and on so that the values of one channel follow each other."""
    n, count = len(lanes), len(rows)
    if row + n <= tokens:  # a vector has more lanes than there are rows: what is too much is cut
        for k in range(0, depth, n):
            from_ = row * inputs + start + k
            transpose_tile(x, from_, inputs, to, at + k * count, count, lanes)
    else:
        for number in range(min(count, tokens - row)):
            for k in range(depth):
                to[at + k * count + number] = x[(row + number) * inputs + start + k]
