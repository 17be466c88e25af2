"""The activation function of a tower's MLPs, and its slope."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

_QUICK = 1.702  # QuickGELU(x) = x sigmoid(1.702 x)


@torch.no_grad()
def fold_quick_gelu(visual: VisionTransformer) -> None:
    """Replace QuickGELU by SiLU in a tower, which computes the same then.

    With z = 1.702 x, x sigmoid(1.702 x) is z sigmoid(z) / 1.702 = silu(z) / 1.702. The factor goes
    to the layer before and its inverse to the layer after, as new parameters: one pass over memory
    is left of three, on every device, and no compiled code is needed. Where weights have fewer
    bits than fp32, scaling would round them noticeably, and nothing is changed.
    """
    for block in visual.transformer.resblocks:
        mlp = block.mlp
        if isinstance(mlp.gelu, QuickGELU) and mlp.c_fc.weight.dtype.itemsize >= 4:
            for layer, name, factor in (
                (mlp.c_fc, "weight", _QUICK),
                (mlp.c_fc, "bias", _QUICK),
                (mlp.c_proj, "weight", 1 / _QUICK),
            ):
                scaled = getattr(layer, name) * factor
                setattr(layer, name, nn.Parameter(scaled, requires_grad=False))
            mlp.gelu = nn.SiLU()


def activate(activation: nn.Module, hidden: Tensor) -> Tensor:
    """Apply an MLP's activation function; ``hidden`` may be overwritten."""
    if isinstance(activation, nn.SiLU):
        return F.silu(hidden, inplace=True)
    output: Tensor = activation(hidden)
    return output


def activate_with_slope(activation: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return an MLP's activation function at ``hidden``, and its derivative.

    Args:
        activation: SiLU, QuickGELU or GELU.
        hidden: Any shape.
    """
    if isinstance(activation, nn.SiLU | QuickGELU):
        steepness = 1.0 if isinstance(activation, nn.SiLU) else _QUICK
        gate = torch.sigmoid(steepness * hidden)
        return hidden * gate, gate * (1 + steepness * hidden * (1 - gate))
    density = torch.exp(-0.5 * hidden * hidden) / math.sqrt(2 * math.pi)
    slope = 0.5 * (1 + torch.erf(hidden / math.sqrt(2))) + hidden * density
    return activation(hidden), slope
