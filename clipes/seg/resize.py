"""Maps at another size: scores between their neighbours, labels as they are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, C, h, w) maps to ``size``, bilinear, corners not aligned."""
    if (maps.shape[2], maps.shape[3]) == size:
        return maps
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def shrink(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, H, W) labels or weights to ``size`` by the pixel nearest to each cell's centre.

    Any other nearest pixel would shift the labels against the logits.
    """
    small = functional.interpolate(maps[:, None].float(), size=size, mode="nearest-exact")
    return small[:, 0].to(maps.dtype)
