"""Maps on a finer grid than CLIP's, by what a second tower sees there (not in the paper).

A patch of CLIP is 16 pixels wide, which small objects and the borders of large ones do not heed. A
closer look of DINOv2 does: every patch of a finer grid takes the mean of the patches of the grid
around it, those most that look like it. This is joint bilateral upsampling (Kopf et al. 2007,
"Joint Bilateral Upsampling") with tokens in the place of colours. Its first few blocks are enough:
what a patch looks like they know, and they keep to their own place more than the last ones do.
Interpolated tokens, which know no more than the maps do, gain nothing, and colours harm the CRF,
which looks at them itself.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from clipes.kernels.choose import products
from clipes.maps.gradcam import min_max
from clipes.towers.taps import Grid
from clipes.types import Float32Array

_REACH = 1.5  # standard deviation of the distance that counts, in patches of the grid

# Patches of the grid over whose area a map is 1 on average. By a single finer patch, which may
# stand out, the rest of a small object would be left to the background.
_SUREST = 2


@torch.inference_mode()
def finer_maps(
    maps: Float32Array, tokens: Tensor, fine: Tensor, temperature: float
) -> Float32Array:
    """Bring maps (K, h, w) in [0, 1] to a finer grid; arguments as for ``finer``.

    Returns:
        (K, h', w') float32 in [0, 1].
    """
    grid = (maps.shape[1], maps.shape[2])
    flat = torch.from_numpy(maps).to(fine.device).flatten(1).T
    found: Float32Array = finer(flat, grid, tokens, fine, temperature).cpu().numpy()
    return _scaled(found, _SUREST * fine.shape[0] * fine.shape[1] // len(tokens))


def _scaled(maps: Float32Array, surest: int) -> Float32Array:
    """Scale each of (K, h, w) maps to [0, 1], the mean over its ``surest`` patches to 1."""
    scaled = min_max(maps)
    flat = np.sort(scaled.reshape(len(scaled), -1), axis=1)
    tops = flat[:, -surest:].mean(1, dtype=np.float32)
    scaled /= np.maximum(tops, np.finfo(np.float32).tiny)[:, None, None]
    return np.minimum(scaled, 1, out=scaled)


def finer(values: Tensor, grid: Grid, tokens: Tensor, fine: Tensor, temperature: float) -> Tensor:
    """Bring what is said of patches to a finer grid.

    Args:
        values: (N, K) float32, of the patches of ``grid``.
        grid: (h, w).
        tokens: (N, D) float32 of the patches.
        fine: (h', w', D) float32, of the patches of the finer grid, by the same tower and block.
        temperature: Divides the cosines of tokens.

    Returns:
        (K, h', w') float32, means of ``values``.
    """
    unit = F.normalize(tokens, dim=-1)
    down, across = (
        _nearness(count, length, fine.device)
        for count, length in zip(fine.shape[:2], grid, strict=True)
    )
    rows = []
    for row, near in zip(F.normalize(fine, dim=-1), down, strict=True):
        place = (near[None, :, None] + across[:, None, :]).flatten(1)
        weights = ((products(row, unit) - 1) / temperature + place).softmax(1)
        rows.append(weights @ values)
    return torch.stack(rows).permute(2, 0, 1)


def _nearness(count: int, length: int, device: torch.device) -> Tensor:
    """Return (count, length) log-weights of ``length`` places on a line for ``count`` on it."""
    there = (torch.arange(count, device=device) + 0.5) * (length / count) - 0.5
    here = torch.arange(length, device=device)
    return -((there[:, None] - here) ** 2) / (2 * _REACH**2)
