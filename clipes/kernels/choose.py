"""Which code computes the tower's linear layers and attention: a rule, never a measurement.

Two processes, or a run and its continuation, choose alike on one kind of machine, so that their
maps agree to the bit. What was chosen stands in ``run.json``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import torch
from torch import Tensor

from clipes.choices import Precision
from clipes.kernels.linear import has_onednn, multiply_by_onednn

_ROUNDED = {Precision.bf16: "bfloat16", Precision.fp16: "float16"}  # torch's names
_TILED_HEADS = (16, 32, 48, 64)  # widths that are whole vectors, and whose rows fit the registers


@dataclass(frozen=True)
class Kernels:
    """Names of the code that a tower computes with.

    Attributes:
        linear: ``torch``, ``onednn``, or the type that factors are rounded to.
        attention: ``torch`` or ``tiles``.
    """

    linear: str
    attention: str


@lru_cache(maxsize=1)
def processor_features() -> dict[str, bool]:
    """Return what instructions this processor has, by LLVM's names, such as ``avx512f``."""
    return dict(llvm.get_host_cpu_features())


def multiplies_bf16(device: torch.device, features: dict[str, bool]) -> bool:
    """Tell whether a device has instructions for products of bf16; arguments as below."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(features.get("avx512bf16") or features.get("amx-bf16"))


def choose_kernels(
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    precision: Precision,
    features: dict[str, bool],
) -> Kernels:
    """Return what to compute with; times are CPU seconds of a ViT-B/16 up to its last attention.

    Measured on an AMD EPYC (Zen 5) with AVX-512, and on the same one held to AVX2: torch's own
    product (MKL) makes it take 1.9 and 1.1 times as long as oneDNN's, torch's attention 1.24 and
    1.07 times as long as tiles. Elsewhere, as on ARM, nothing was measured, and
    everything is torch's own. bf16 is faster only where the processor multiplies it (0.7 times
    the time of fp32, else 2.2 to 4.6 times).

    Args:
        device: Where the tower runs.
        dtype: Of its weights.
        head_width: Channels of an attention head.
        precision: What was asked for; ``auto`` is bf16 where that is faster, else fp32.
        features: See ``processor_features``.
    """
    compiled = _compiled(device, dtype, features)
    linear = "onednn" if compiled and has_onednn() else "torch"
    if precision is Precision.auto:
        precision = Precision.bf16 if multiplies_bf16(device, features) else Precision.fp32
    linear = _ROUNDED.get(precision, linear)
    tiled = compiled and head_width in _TILED_HEADS
    return Kernels(linear, "tiles" if tiled else "torch")


def products(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of all vectors (M, D) with all others (N, D): (M, N).

    In the type that both have, on what is fastest here by the rule above.
    """
    empty = not (left.numel() and right.numel())  # oneDNN knows no such product
    if not empty and has_onednn() and _compiled(left.device, left.dtype, processor_features()):
        return multiply_by_onednn(left, right.contiguous())
    return left @ right.mT


def _compiled(device: torch.device, dtype: torch.dtype, features: dict[str, bool]) -> bool:
    """Tell whether this is a processor, and numbers, that more than torch's own is known for."""
    on_processor = device.type == "cpu" and dtype == torch.float32
    return on_processor and bool(features.get("avx2"))
