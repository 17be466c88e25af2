"""Linear layers on whatever this processor multiplies matrices fastest with, at full precision.

PyTorch's fp32 matrix product goes through MKL, which on AMD processors reaches about half of what
oneDNN does. oneDNN is behind PyTorch's convolutions, and a linear layer is a 1 x 1 convolution over
a column of tokens. Which of the two wins, and whether they agree, is measured once per process; no
global precision flag is touched, as those may permit bf16.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

Linear: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``linear(x (..., I), weight (O, I), bias (O,) or None) -> (..., O)``."""

_TOKENS, _INPUT, _OUTPUT = 768, 768, 3072  # the MLP of a ViT-B on a VOC image
_ROUNDS = 6
_SLACK = 8.0  # oneDNN may sum in another order; bf16 would be off by a factor of thousands


def linear_by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer as a 1 x 1 convolution; arguments as ``Linear``."""
    column = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    kernel = weight[:, :, None, None]
    # Dilation means nothing to a 1 x 1 kernel, but with it one thread, too, goes through oneDNN.
    out: Tensor = F.conv2d(column, kernel, bias, dilation=2).permute(0, 2, 3, 1)
    return out.reshape(*x.shape[:-1], len(weight))


def choose_linear(device: torch.device, dtype: torch.dtype) -> Linear:
    """Return the fastest linear layer for ``device`` and ``dtype`` that is exact."""
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return F.linear
    return _measured(torch.get_num_threads())


@lru_cache(maxsize=8)
@torch.inference_mode()
def _measured(_threads: int) -> Linear:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, _INPUT, generator=generator)
    weight = torch.randn(_OUTPUT, _INPUT, generator=generator)
    exact = x[:64].double() @ weight.double().T
    ways = (F.linear, linear_by_convolution)
    errors = [float((way(x, weight, None)[:64] - exact).abs().max()) for way in ways]
    # In turns, and the best of each: other processes disturb both alike.
    rounds = [[_time(way, x, weight) for way in ways] for _ in range(_ROUNDS)]
    plain, convolution = (min(column) for column in zip(*rounds, strict=True))
    exact_enough = errors[1] <= _SLACK * errors[0]
    return linear_by_convolution if exact_enough and convolution < plain else F.linear


def _time(linear: Linear, x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    linear(x, weight, None)
    return time.perf_counter() - start
