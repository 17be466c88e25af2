"""The frozen ViT image tower, walked block by block so that its attention is an output.

Only public modules of open_clip's ``VisionTransformer`` are used; nothing is patched or hooked.
Shapes: B images of one grid, N = h*w patches, T = 1 + N tokens (CLS first), D channels, H heads of
width d.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from open_clip.transformer import (
    LayerNorm,
    QuickGELU,
    ResidualAttentionBlock,
    VisionTransformer,
)
from PIL import Image
from torch import Tensor, nn

from clipes.choices import Precision
from clipes.errors import WeightsError
from clipes.kernels.activation import activate, activate_with_slope, fold_quick_gelu
from clipes.kernels.attention import make_attention, split_heads
from clipes.kernels.choose import Kernels, choose_kernels, processor_features
from clipes.kernels.linear import make_linear
from clipes.types import UInt8Array, shrunk_size

Grid: TypeAlias = tuple[int, int]
"""(h, w): patches per column and row."""


_POSITIONS_KEPT = 64  # resampled position embeddings, up to 5 MB each


@dataclass(frozen=True)
class Normalised:
    """The inside of a LayerNorm, kept for its gradient.

    Attributes:
        unit: (..., D) input with mean 0 and variance 1 over the channels.
        inverse_std: (..., 1) reciprocal standard deviation of the input.
    """

    unit: Tensor
    inverse_std: Tensor


@dataclass(frozen=True)
class LastInput:
    """What the last block attends with.

    Queries are the N patches (the CLS output is never read); keys and values are all T tokens.

    Attributes:
        activations: (N, D) output of ``ln_1`` at the patches: the layer the maps are taken from.
        query: (H, N, d).
        key: (H, T, d).
        value: (H, T, d).
    """

    activations: Tensor
    query: Tensor
    key: Tensor
    value: Tensor

    def of(self, image: int) -> LastInput:
        """Return that of one image of a batch."""
        parts = (self.activations, self.query, self.key, self.value)
        return LastInput(*(part[image] for part in parts))


@dataclass(frozen=True)
class LastBlock(LastInput):
    """Everything of the last block and the head that the gradient of a class score needs.

    Attributes:
        attention: (H, N, T), rows sum to 1.
        mixed: (H, N, d) attention times value.
        ln_2: LayerNorm before the MLP, at the patches.
        hidden: (N, 4D) MLP before its activation function.
        slope: (N, 4D) derivative of the activation function there.
        ln_post: LayerNorm after the block, at the patches.
        pooled: (D,) mean of ``ln_post`` over the patches.
        feature: (E,) image feature: ``pooled`` projected, not normalised.
    """

    attention: Tensor
    mixed: Tensor
    ln_2: Normalised
    hidden: Tensor
    slope: Tensor
    ln_post: Normalised
    pooled: Tensor
    feature: Tensor


@dataclass(frozen=True)
class Encoding:
    """What one pass over one image leaves behind.

    Attributes:
        grid: (h, w).
        attention: (N, N) mean over heads and over the last blocks of patch-to-patch attention.
        last: The last block, for the gradient.
    """

    grid: Grid
    attention: Tensor
    last: LastBlock


@dataclass(frozen=True)
class PatchEncoding:
    """What one pass over B images leaves behind that goes no further than the last attention.

    Attributes:
        grid: (h, w).
        attention: (B, N, N), each as in ``Encoding``.
        last: What the last block attends with, every tensor with B in front.
    """

    grid: Grid
    attention: Tensor
    last: LastInput


class Backbone:
    """A frozen CLIP image tower.

    Args:
        visual: open_clip's tower, in the dtype and on the device it shall run with. Its QuickGELU
            is replaced, see ``fold_quick_gelu``.
        logit_scale: Factor on cosine similarities before the softmax (100 for OpenAI's models).
        mean: Channel means of the training images, RGB in [0, 1].
        std: Channel standard deviations, likewise.
        fp16_positions: Round the resampled position embedding to fp16, as the reference does.
        precision: Of the linear layers' factors.
        kernels: What to compute with, None for what ``choose_kernels`` says.

    Attributes:
        kernels: What it computes with.
        linear: Linear layers at the precision asked for.
        exact: Linear layers in the tower's own type.
        attend: Attention.

    Raises:
        WeightsError: The tower has parts the gradient is not derived for.
    """

    def __init__(
        self,
        visual: VisionTransformer,
        logit_scale: float,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        fp16_positions: bool = False,
        precision: Precision = Precision.fp32,
        kernels: Kernels | None = None,
    ) -> None:
        _check_supported(visual)
        self.visual = visual.eval().requires_grad_(False)
        fold_quick_gelu(visual)
        self.logit_scale = logit_scale
        self.patch = int(visual.patch_size[0])
        self.fp16_positions = fp16_positions
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._std = torch.tensor(std).view(3, 1, 1)
        self._position = lru_cache(_POSITIONS_KEPT)(self._resample_position)
        self._heads = self.blocks[0].attn.num_heads
        choose = partial(
            choose_kernels,
            self.device,
            visual.proj.dtype,
            len(visual.proj) // self._heads,
            features=processor_features(),
        )
        self.kernels = kernels or choose(precision)
        exact = kernels or choose(Precision.fp32)
        self.exact = make_linear(exact.linear)
        same = self.kernels.linear == exact.linear
        self.linear = self.exact if same else make_linear(self.kernels.linear)
        self.attend = make_attention(self.kernels.attention)

    @property
    def device(self) -> torch.device:
        """Where the tower runs."""
        device: torch.device = self.visual.class_embedding.device
        return device

    @property
    def blocks(self) -> list[ResidualAttentionBlock]:
        """The transformer blocks, first to last."""
        return list(self.visual.transformer.resblocks)

    def grid(self, size: tuple[int, int], max_patches: int) -> Grid:
        """Return the (h, w) patches that cover an image of ``size`` (H0, W0), or a smaller copy."""
        h, w = -(-size[0] // self.patch), -(-size[1] // self.patch)
        return shrunk_size((h, w), max_patches)

    def prepare(self, image: UInt8Array, max_patches: int) -> Tensor:
        """Resize an RGB image (H0, W0, 3) to whole patches and normalise it: (3, H, W) float32."""
        h, w = self.grid(image.shape[:2], max_patches)
        resized = Image.fromarray(image).resize(
            (w * self.patch, h * self.patch), Image.Resampling.BICUBIC
        )
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        return (pixels - self._mean) / self._std

    @torch.inference_mode()
    def encode(self, images: Tensor, affinity_blocks: int) -> list[Encoding]:
        """Run the tower once over images of one size.

        Args:
            images: (B, 3, H, W) as ``prepare`` makes them.
            affinity_blocks: How many of the last blocks' attention maps are averaged.

        Returns:
            One Encoding for each image.
        """
        grid, tokens, total = self._run_first(images, affinity_blocks)
        tapes = [
            self._forward_last(self.blocks[-1], image, part)
            for image, part in zip(tokens, total, strict=True)
        ]
        total /= affinity_blocks * self._heads
        return [
            Encoding(grid, attention, tape) for attention, tape in zip(total, tapes, strict=True)
        ]

    @torch.inference_mode()
    def encode_patches(self, images: Tensor, affinity_blocks: int) -> PatchEncoding:
        """Run the tower up to the last attention; arguments as ``encode``.

        Leaves out the last block's MLP and the head, which only an image feature needs.
        """
        grid, tokens, total = self._run_first(images, affinity_blocks)
        attn = self.blocks[-1].attn
        normed = self.blocks[-1].ln_1(tokens)
        projected = self.linear(normed, attn.in_proj_weight, attn.in_proj_bias)
        self.attend(projected, self._heads, total, None)
        total /= affinity_blocks * self._heads
        query, key, value = split_heads(projected, self._heads)
        return PatchEncoding(grid, total, LastInput(normed[:, 1:], query[:, :, 1:], key, value))

    @torch.inference_mode()
    def mix_patches(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend among patches alone: (..., H, N, d) each to (..., N, D), heads side by side."""
        parts = torch.cat([part.transpose(-3, -2).flatten(-2) for part in (query, key, value)], -1)
        mixed = self.attend(parts.view(-1, *parts.shape[-2:]), self._heads, None, None)
        return mixed.view(*parts.shape[:-1], -1)

    def _run_first(self, images: Tensor, affinity_blocks: int) -> tuple[Grid, Tensor, Tensor]:
        """Run all blocks but the last.

        Returns:
            Grid, (B, T, D) tokens, and their attention (B, N, N) so far, summed over heads.
        """
        grid = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        tokens = self._embed(images.to(self.device), grid)
        patches = grid[0] * grid[1]
        total = torch.zeros(len(tokens), patches, patches, device=self.device)
        *first, _ = self.blocks
        keep_from = len(first) + 1 - affinity_blocks
        for index, block in enumerate(first):
            tokens = self._forward(block, tokens, total if index >= keep_from else None)
        return grid, tokens, total

    def _embed(self, images: Tensor, grid: Grid) -> Tensor:
        """Return the (B, T, D) input of the first block."""
        visual, (h, w), side = self.visual, grid, self.patch
        kernel = visual.conv1.weight
        pixels = images.unflatten(3, (w, side)).unflatten(2, (h, side)).permute(0, 2, 4, 1, 3, 5)
        # As a product, because PyTorch lets convolutions on GPUs round to TF32.
        patches = self.exact(
            pixels.reshape(len(images), h * w, -1).to(kernel.dtype), kernel.flatten(1), None
        )
        cls = visual.class_embedding.expand(len(patches), 1, -1)
        tokens: Tensor = visual.ln_pre(torch.cat([cls, patches], 1) + self._position(grid))
        return tokens

    def _resample_position(self, grid: Grid) -> Tensor:
        """Return the (T, D) position embedding resampled to ``grid``."""
        table = self.visual.positional_embedding
        cls, patches = table[:1], table[1:]
        if grid != tuple(self.visual.grid_size):
            side = self.visual.grid_size
            image = patches.float().T.reshape(1, -1, *side)
            image = F.interpolate(image, grid, mode="bilinear", align_corners=False)
            patches = image[0].flatten(1).T
        position = torch.cat([cls.float(), patches.float()])
        if self.fp16_positions:
            position = position.half()
        return position.to(table.dtype)

    def _forward(
        self, block: ResidualAttentionBlock, tokens: Tensor, total: Tensor | None
    ) -> Tensor:
        """Run one block on (B, T, D); add its attention, summed over heads, to (B, N, N)."""
        attn, mlp = block.attn, block.mlp
        projected = self.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias)
        mixed = self.attend(projected, attn.num_heads, total, None)
        tokens = tokens + self.linear(mixed, attn.out_proj.weight, attn.out_proj.bias)
        hidden = self.linear(block.ln_2(tokens), mlp.c_fc.weight, mlp.c_fc.bias)
        activated = activate(mlp.gelu, hidden)
        return tokens + self.linear(activated, mlp.c_proj.weight, mlp.c_proj.bias)

    def _forward_last(
        self, block: ResidualAttentionBlock, tokens: Tensor, total: Tensor
    ) -> LastBlock:
        """Run the last block and the head on one image (T, D), keeping what a gradient needs.

        Its attention, summed over heads, is added to ``total`` (N, N).
        """
        attn, patches = block.attn, len(tokens) - 1
        normed = block.ln_1(tokens)
        projected = self.linear(normed, attn.in_proj_weight, attn.in_proj_bias)
        attention = projected.new_empty(attn.num_heads, patches, patches + 1)
        mixed = self.attend(projected[None], attn.num_heads, total[None], attention[None])[0, 1:]
        query, key, value = split_heads(projected, attn.num_heads)
        out, mlp = attn.out_proj, block.mlp
        residual = tokens[1:] + self.linear(mixed, out.weight, out.bias)
        ln_2 = _normalise(block.ln_2, residual)
        normed_2 = ln_2.unit * block.ln_2.weight + block.ln_2.bias
        hidden = self.linear(normed_2, mlp.c_fc.weight, mlp.c_fc.bias)
        activated, slope = activate_with_slope(mlp.gelu, hidden)
        output = residual + self.linear(activated, mlp.c_proj.weight, mlp.c_proj.bias)
        ln_post = _normalise(self.visual.ln_post, output)
        pooled = ln_post.unit.mean(0) * self.visual.ln_post.weight + self.visual.ln_post.bias
        return LastBlock(
            activations=normed[1:],
            query=query[:, 1:],
            key=key,
            value=value,
            attention=attention,
            mixed=mixed.unflatten(-1, (attn.num_heads, -1)).transpose(0, 1),
            ln_2=ln_2,
            hidden=hidden,
            slope=slope,
            ln_post=ln_post,
            pooled=pooled,
            feature=pooled @ self.visual.proj,
        )


def _normalise(norm: LayerNorm, x: Tensor) -> Normalised:
    """Return ``norm``'s input at mean 0 and variance 1, before its weight and bias."""
    unit, _, inverse_std = torch.native_layer_norm(x, norm.normalized_shape, None, None, norm.eps)
    return Normalised(unit, inverse_std)


def _check_supported(visual: nn.Module) -> None:
    """Refuse towers with parts that the walk above or the gradient do not cover."""
    reason = ""
    if not isinstance(visual, VisionTransformer):
        reason = f"a {type(visual).__name__}, not a ViT"
    elif visual.attn_pool is not None:
        reason = "an attention pool"
    elif visual.patch_size[0] != visual.patch_size[1]:
        reason = "patches that are not square"
    elif visual.conv1.bias is not None:
        reason = "a bias on the patches"
    elif not isinstance(visual.ln_pre, nn.LayerNorm):
        reason = "no LayerNorm before the first block"
    else:
        for block in visual.transformer.resblocks:
            if type(block) is not ResidualAttentionBlock:
                reason = f"blocks of type {type(block).__name__}"
            elif not isinstance(block.ls_1, nn.Identity):
                reason = "layer scale"
            elif not isinstance(block.mlp.gelu, QuickGELU | nn.GELU | nn.SiLU):
                reason = f"the activation function {type(block.mlp.gelu).__name__}"
    if reason:
        raise WeightsError(
            f"this image tower is not supported: it has {reason}",
            "use a plain CLIP ViT such as ViT-B-16 or ViT-L-14",
        )
