"""DINOv2, the second frozen tower: tokens of the same h x w patches as CLIP's, in other pixels.

With the linear layers and the attention of ``clipes.kernels`` a ViT-S/14 takes 0.48 of the time of
timm's own forward pass, and 0.32 of that of CLIP's ViT-B/16 up to its last attention (one thread of
an AMD EPYC with AVX-512, 26 x 36 patches: 0.27 s). Folding the layer scale into the layers before
would save less than a hundredth.

Only public modules of timm's ``VisionTransformer`` are used. Shapes: B images of one grid, N = h*w
patches, T = 1 + N tokens (class token first), D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from clipes.choices import Precision
from clipes.config import IMAGENET_MEAN, IMAGENET_STD
from clipes.kernels.attention import make_attention
from clipes.kernels.choose import Kernels, choose_kernels, processor_features, products
from clipes.kernels.linear import make_linear
from clipes.towers.pixels import Pixels
from clipes.towers.taps import Grid
from clipes.types import UInt8Array

_POSITIONS_KEPT = 64  # resampled position embeddings, up to 2.5 MB each
_OFFSET = 0.1  # Meta's: keeps the resampled side from being rounded down


class DinoTower:
    """A frozen DINOv2.

    Args:
        module: timm's tower, in the dtype and on the device it shall run with.
        digest: sha256 of the weights, by which a run names them.
        mean: Channel means of the training images, RGB in [0, 1].
        std: Channel standard deviations, likewise.
        precision: Of the linear layers' factors.
        kernels: What to compute with, None for what ``choose_kernels`` says.

    Attributes:
        name: Of the tokens that ``encode`` returns.
        digest: As above.
        kernels: What it computes with.
    """

    def __init__(
        self,
        module: VisionTransformer,
        digest: str,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        *,
        precision: Precision = Precision.fp32,
        kernels: Kernels | None = None,
    ) -> None:
        # Any: timm types its parts as whatever a module may have.
        self.module: Any = module.eval().requires_grad_(False)
        self.digest = digest
        self.name = f"dino.{len(self.blocks)}"
        self._pixels = Pixels(self.patch, mean, std)
        self._position = lru_cache(_POSITIONS_KEPT)(self._resample_position)
        attention = self.blocks[0].attn
        self.kernels = kernels or choose_kernels(
            self.device, self._dtype, attention.head_dim, precision, processor_features()
        )
        self._linear = make_linear(self.kernels.linear)
        self._attend = make_attention(self.kernels.attention)

    @property
    def device(self) -> torch.device:
        """Where the tower runs."""
        device: torch.device = self.module.cls_token.device
        return device

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.module.cls_token.dtype
        return dtype

    @property
    def patch(self) -> int:
        """Side of a patch, in pixels."""
        return int(self.module.patch_embed.patch_size[0])

    @property
    def width(self) -> int:
        """D, channels of a token."""
        return int(self.module.embed_dim)

    @property
    def depth(self) -> int:
        """How many blocks it has."""
        return len(self.blocks)

    @property
    def blocks(self) -> list[Any]:
        """The transformer blocks, first to last."""
        return list(self.module.blocks)

    def prepare(self, image: UInt8Array, grid: Grid) -> Tensor:
        """Resize an RGB image (H0, W0, 3) to ``grid`` (h, w) patches and normalise it.

        Returns:
            (3, 14h, 14w) float32; 14 is the side of a patch.
        """
        return self._pixels.prepare(image, grid)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Run the tower.

        Args:
            images: (B, 3, 14h, 14w) as ``prepare`` makes them.

        Returns:
            (B, h*w, D) float32, tokens of the patches after the last norm.
        """
        (final,) = self.after(images, (self.depth,))
        return final

    @torch.inference_mode()
    def after(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Run the tower up to the last of some blocks.

        Args:
            images: As for ``encode``.
            blocks: Counted from 1, in ascending order; of a smaller tower the last one will do.

        Returns:
            For each (B, h*w, D) float32, tokens of the patches after it, each with mean 0 and
            variance 1; after the last block of all, those of ``encode``.
        """
        wanted = [min(block, self.depth) for block in blocks]
        return self._walk(self._embed(images.to(self.device), self._pixels.grid(images)), wanted)

    @torch.inference_mode()
    def closer(self, images: Tensor, block: int, parts: int) -> Tensor:
        """Run the tower up to a block, each part of the images on its own.

        Attention grows with the square of the patches, and blocks at the beginning hardly need it
        to reach far. Parts keep the places that they have in the whole.

        Args:
            images: As for ``encode``.
            block: As for ``after``.
            parts: Along each side.

        Returns:
            (B, h, w, D) float32, as of ``after``.
        """
        grid, wanted = self._pixels.grid(images), min(block, self.depth)
        tokens = self._embed(images.to(self.device), grid)
        whole, patches = tokens[:, :1], tokens[:, 1:].unflatten(1, grid)

        def seen(part: Tensor) -> Tensor:
            (found,) = self._walk(torch.cat([whole, part.flatten(1, 2)], 1), [wanted])
            return found.view_as(part)

        down, across = (min(parts, side) for side in grid)
        strips = patches.tensor_split(down, 1)
        return torch.cat(
            [torch.cat(list(map(seen, strip.tensor_split(across, 2))), 2) for strip in strips], 1
        )

    def _walk(self, tokens: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """Run (B, T, D) through the blocks; see ``after``."""
        found = {}
        for number, block in enumerate(self.blocks[: wanted[-1]], start=1):
            tokens = self._forward(block, tokens)
            if number in wanted:
                found[number] = self._normed(tokens[:, 1:], number)
        return [found[number] for number in wanted]

    def _normed(self, tokens: Tensor, block: int) -> Tensor:
        if block < self.depth:
            return F.layer_norm(tokens.float(), tokens.shape[-1:])
        final: Tensor = self.module.norm(tokens)
        return final.float()

    def _embed(self, images: Tensor, grid: Grid) -> Tensor:
        """Return the (B, T, D) input of the first block."""
        layer = self.module.patch_embed.proj
        cut = self._pixels.cut(images).to(layer.weight.dtype)
        patches = products(cut, layer.weight.flatten(1)) + layer.bias
        cls = self.module.cls_token.expand(len(patches), 1, -1)
        return torch.cat([cls, patches], 1) + self._position(grid)

    def _resample_position(self, grid: Grid) -> Tensor:
        """Return the (1, T, D) position embedding resampled to ``grid``."""
        table: Tensor = self.module.pos_embed
        cls, patches = table[:, :1], table[:, 1:]
        side = self.module.patch_embed.grid_size[0]
        if grid == (side, side):
            return table
        image = patches.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        factors = [(length + _OFFSET) / side for length in grid]
        image = F.interpolate(image, scale_factor=factors, mode="bilinear")
        return torch.cat([cls, image.flatten(2).mT.to(table.dtype)], 1)

    def _forward(self, block: Any, tokens: Tensor) -> Tensor:  # noqa: ANN401
        """Run one block on (B, T, D)."""
        attn, mlp, linear = block.attn, block.mlp, self._linear
        projected = linear(block.norm1(tokens), attn.qkv.weight, attn.qkv.bias)
        mixed = self._attend(projected, attn.num_heads, None, None)
        tokens = tokens + block.ls1(linear(mixed, attn.proj.weight, attn.proj.bias))
        hidden = linear(block.norm2(tokens), mlp.fc1.weight, mlp.fc1.bias, gelu=True)
        output: Tensor = tokens + block.ls2(linear(hidden, mlp.fc2.weight, mlp.fc2.bias))
        return output
