"""Towers that are small, and callbacks for tests of what reports its progress."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image

from clipes.towers.clip import Backbone

HALF = (0.5, 0.5, 0.5)


def small_backbone(layers: int = 2) -> Backbone:
    """Return a CLIP of width 64 that has learnt nothing."""
    torch.manual_seed(0)
    visual = VisionTransformer(64, 16, 64, layers, 4, 4.0, output_dim=32, act_layer=QuickGELU)
    return Backbone(visual, 100.0, HALF, HALF)


class PixelTower:
    """A second tower whose tokens are the pixels of each patch, two by two."""

    digest, patch, width, depth = "pixels", 2, 12, 12

    def prepare(self, image: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
        """Make it (3, 2h, 2w)."""
        small = Image.fromarray(image).resize((2 * grid[1], 2 * grid[0]))
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 64 - 2

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Take it apart again: (B, h*w, 12)."""
        return F.unfold(images, 2, stride=2).mT

    def after(self, images: torch.Tensor, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Count the blocks: the tokens of block b of 12 are b / 12 of the final ones, less 1."""
        final = self.encode(images)
        return [final if b == self.depth else final * b / self.depth - 1 for b in blocks]

    def closer(self, images: torch.Tensor, block: int, parts: int) -> torch.Tensor:
        """Look at all parts at once: tokens know of no other."""
        (seen,) = self.after(images, (block,))
        return seen.unflatten(1, (images.shape[-2] // 2, images.shape[-1] // 2))


def quiet(_: object) -> None:
    """Hear a remark and say nothing."""
