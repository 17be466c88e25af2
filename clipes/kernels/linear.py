"""Linear layers on whatever this processor multiplies matrices fastest with.

PyTorch's fp32 matrix product goes through MKL, which on AMD processors reaches about half of what
they can do. oneDNN reaches more, with weights in an order of its own: what ``torch.compile`` uses
where there is a compiler. Which of them runs is said by ``clipes.kernels.choose``; no global
precision flag is touched, as those may permit bf16.

What was tried, as CPU seconds of a ViT-B/16 up to its last attention (768 patches, one thread),
divided by those of a product in tiles that was compiled here for the purpose and is gone since;
medians on an AMD EPYC (Zen 5) with AVX-512, and on the same one held to AVX2:

    ===============================================  ============  ====
    what                                             AVX-512       AVX2
    ===============================================  ============  ====
    oneDNN, weights packed                           0.98 to 1.01  1.03
    OpenBLAS in numpy                                1.00          1.02
    oneDNN, weights as they are                      1.03
    oneDNN through a 1 x 1 convolution               1.03 to 1.07  1.04
    ``F.linear`` (MKL)                               1.93          1.13
    ===============================================  ============  ====

OpenBLAS would need its threads set for the whole process, and environment variables make it take
another processor's code. OpenVINO took 0.65 s for all blocks as one graph, where the tiles took
0.63 to 0.71 s: not worth a second runtime.

What oneDNN is worth (``clipes bench --without linear``): the preset ``default`` takes 1.80 times as
long with ``F.linear`` on the processor with AVX-512.

Lower precision has to be asked for. Then the factors of a product are rounded, its sums and all
else (attention, norms, residuals, the affinity) stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor, nn


class Linear(Protocol):
    """A linear layer: x (..., I), weight (O, I), bias (O,) or None -> (..., O)."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False
    ) -> Tensor:
        """Apply the layer, and GELU to what it returns if asked for."""


class _Prepared:
    """Weights in another form, made when first asked for; those of a tower are kept.

    Args:
        prepare: Makes it of a weight.
    """

    def __init__(self, prepare: Callable[[Tensor], Tensor]) -> None:
        self._prepare = prepare
        self._kept: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def __call__(self, weight: Tensor) -> Tensor:
        """Return a weight in the other form."""
        if not isinstance(weight, nn.Parameter):
            return self._prepare(weight)
        if id(weight) not in self._kept:  # an id is taken again once its object is gone: keep it
            self._kept[id(weight)] = (weight, self._prepare(weight.detach()))
        return self._kept[id(weight)][1]


class OneDnnLinear:
    """A linear layer in float32 by oneDNN.

    The weights are kept a second time, in the order in which oneDNN reads them. That does not
    depend on the first image, so that a continued run computes the same.
    """

    def __init__(self) -> None:
        pack = torch.ops.mkldnn._reorder_linear_weight
        self._packed = _Prepared(lambda weight: pack(weight.contiguous()))

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False
    ) -> Tensor:
        """Apply the layer; arguments as ``Linear``."""
        return multiply_by_onednn(x, self._packed(weight), bias, gelu=gelu)


class RoundedLinear:
    """A linear layer with its input and weight rounded to fewer bits, its result in float32.

    Args:
        dtype: torch.bfloat16 or torch.float16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._rounded = _Prepared(lambda weight: weight.to(dtype))

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False
    ) -> Tensor:
        """Apply the layer; arguments as ``Linear``."""
        product = F.linear(x.to(self._dtype), self._rounded(weight)).float()
        product = product if bias is None else product.add_(bias)
        return F.gelu(product) if gelu else product


def multiply_by_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False
) -> Tensor:
    """Apply a linear layer, in the type that it has, on any device; arguments as ``Linear``."""
    product = F.linear(x, weight, bias)
    return F.gelu(product) if gelu else product


def multiply_by_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """Apply a linear layer, in float32; arguments as ``Linear``, weights packed or as they are."""
    apply = torch.ops.mkldnn._linear_pointwise
    then, how = ("gelu", "none") if gelu else ("none", "")
    out: Tensor = apply(x.contiguous(), weight, bias, then, [], how)
    return out


def has_onednn() -> bool:
    """Tell whether this PyTorch has oneDNN and lends it; its functions are not public."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


def make_linear(name: str) -> Linear:
    """Return the linear layer that ``Kernels.linear`` names."""
    if name == "torch":
        return multiply_by_torch
    return OneDnnLinear() if name == "onednn" else RoundedLinear(getattr(torch, name))
