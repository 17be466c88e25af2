"""Linear layers on whatever this processor multiplies matrices fastest with.

PyTorch's fp32 matrix product goes through MKL, which on AMD processors reaches about half of what
oneDNN does. oneDNN is behind PyTorch's convolutions, and a linear layer is a 1 x 1 convolution over
a column of tokens. Which of the two wins, and whether they agree, is measured once per process; no
global precision flag is touched, as those may permit bf16.

Lower precision has to be asked for. Then the factors of a product are rounded, its sums and all
else (attention, norms, residuals, the affinity) stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import lru_cache, partial
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor, nn

from clipes.clip.timing import best_times

Linear: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``linear(x (..., I), weight (O, I), bias (O,) or None) -> (..., O)``."""


class Precision(Enum):
    """What linear layers round their factors to; the values are torch's names."""

    fp32 = "float32"
    bf16 = "bfloat16"
    fp16 = "float16"
    auto = "auto"


_TOKENS, _INPUT, _OUTPUT = 768, 768, 3072  # the MLP of a ViT-B on a VOC image
_SLACK = 8.0  # oneDNN may sum in another order; bf16 would be off by a factor of thousands


def linear_by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer as a 1 x 1 convolution; arguments as ``Linear``."""
    column = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    kernel = weight[:, :, None, None]
    # Dilation means nothing to a 1 x 1 kernel, but with it one thread, too, goes through oneDNN.
    out: Tensor = F.conv2d(column, kernel, bias, dilation=2).permute(0, 2, 3, 1)
    return out.reshape(*x.shape[:-1], len(weight))


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


def choose_linear(
    device: torch.device, dtype: torch.dtype, precision: Precision = Precision.fp32
) -> Linear:
    """Return the fastest linear layer for ``device`` and ``dtype`` at a precision.

    ``auto`` is bf16 where that is faster, else fp32.
    """
    exact: Linear = F.linear
    on_processor = device.type == "cpu" and dtype == torch.float32
    if on_processor and torch.backends.mkldnn.is_available():
        exact = _measured(torch.get_num_threads())
    if precision is Precision.fp32:
        return exact
    if precision is not Precision.auto:
        return RoundedLinear(getattr(torch, precision.value))
    rounded = RoundedLinear(torch.bfloat16)
    if on_processor:
        return rounded if _rounding_pays(torch.get_num_threads()) else exact
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return rounded if supported else exact


@lru_cache(maxsize=8)
@torch.inference_mode()
def _measured(_threads: int) -> Linear:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, _INPUT, generator=generator)
    weight = torch.randn(_OUTPUT, _INPUT, generator=generator)
    exact = x[:64].double() @ weight.double().T
    ways = (F.linear, linear_by_convolution)
    errors = [float((way(x, weight, None)[:64] - exact).abs().max()) for way in ways]
    plain, convolution = best_times([partial(way, x, weight, None) for way in ways])
    exact_enough = errors[1] <= _SLACK * errors[0]
    return linear_by_convolution if exact_enough and convolution < plain else F.linear


@lru_cache(maxsize=8)
@torch.inference_mode()
def _rounding_pays(threads: int) -> bool:
    x = torch.randn(_TOKENS, _INPUT)
    weight = nn.Parameter(torch.randn(_OUTPUT, _INPUT), requires_grad=False)
    ways = (_measured(threads), RoundedLinear(torch.bfloat16))
    exact, rounded = best_times([partial(way, x, weight, None) for way in ways])
    return rounded < exact
