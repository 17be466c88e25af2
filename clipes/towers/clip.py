"""The frozen ViT image tower, walked block by block so that its attention is an output.

Only public modules of open_clip's ``VisionTransformer`` are used; nothing is patched or hooked.
Shapes as in ``clipes.towers.taps``.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from open_clip.transformer import (
    LayerNorm,
    QuickGELU,
    ResidualAttentionBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from clipes.choices import Precision
from clipes.errors import WeightsError
from clipes.kernels.activation import activate, activate_with_slope, fold_quick_gelu
from clipes.kernels.attention import make_attention, split_heads
from clipes.kernels.choose import Kernels, choose_kernels, processor_features
from clipes.kernels.linear import make_linear
from clipes.towers.pixels import Pixels
from clipes.towers.taps import Encoded, Grid, LastBlock, LastInput, Normalised, Taps
from clipes.types import UInt8Array, shrunk_size

_POSITIONS_KEPT = 64  # resampled position embeddings, up to 5 MB each


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
        colours: Means and deviations of the training images' channels.
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
        self.colours = (mean, std)
        self._pixels = Pixels(self.patch, mean, std)
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

    def prepare(self, image: UInt8Array, max_patches: int, grid: Grid | None = None) -> Tensor:
        """Resize an RGB image (H0, W0, 3) to whole patches and normalise it: (3, H, W) float32.

        Args:
            image: The image.
            max_patches: As for ``grid``.
            grid: The (h, w) patches, if not those that suit its size.
        """
        return self._pixels.prepare(image, grid or self.grid(image.shape[:2], max_patches))

    @property
    def depth(self) -> int:
        """How many blocks it has."""
        return len(self.visual.transformer.resblocks)

    def last_blocks(self, count: int) -> tuple[int, ...]:
        """Return the numbers of the last ``count`` blocks, or of all if there are fewer."""
        return tuple(range(max(1, self.depth + 1 - count), self.depth + 1))

    @torch.inference_mode()
    def encode(self, images: Tensor, taps: Taps) -> Encoded:
        """Run the tower once over images of one size, no further than what is asked for.

        Args:
            images: (B, 3, H, W) as ``prepare`` makes them.
            taps: What it leaves behind.

        Raises:
            ValueError: A block is asked for that the tower does not have.
        """
        grid = self._pixels.grid(images)
        asked = (*taps.tokens, *taps.attention, *([self.depth] if taps.last else []))
        furthest = max(asked, default=0)
        if not set(asked) <= set(range(1, self.depth + 1)):
            raise ValueError(f"blocks are 1 to {self.depth}, not {sorted(set(asked))}")
        tokens = self._embed(images.to(self.device), grid)
        room = _Room(taps, len(tokens), grid[0] * grid[1], self.device)
        kept: dict[int, Tensor] = {}
        inputs: LastInput | None = None
        gradients: tuple[LastBlock, ...] = ()
        for number, block in enumerate(self.blocks[:furthest], start=1):
            total = room.of(number)
            if taps.last == "gradient" and number == self.depth:
                gradients, total = self._gradients(block, tokens, total), None
            elif number == furthest and (taps.last or number not in taps.tokens):
                inputs, total = self._inputs(block, tokens, total), None
            if number < furthest or number in taps.tokens:
                tokens = self._forward(block, tokens, total)
            if number in taps.tokens:
                kept[number] = tokens
        last = inputs if taps.last == "inputs" else None
        return Encoded(grid, kept, gradients, room.attention(self._heads), last)

    def _inputs(
        self, block: ResidualAttentionBlock, tokens: Tensor, total: Tensor | None
    ) -> LastInput:
        """Go as far as the attention of a block, which alone is added to ``total``."""
        attn = block.attn
        normed = block.ln_1(tokens)
        projected = self.linear(normed, attn.in_proj_weight, attn.in_proj_bias)
        if total is not None:
            self.attend(projected, self._heads, total, None)
        query, key, value = split_heads(projected, self._heads)
        return LastInput(normed[:, 1:], query[:, :, 1:], key, value)

    def _gradients(
        self, block: ResidualAttentionBlock, tokens: Tensor, total: Tensor | None
    ) -> tuple[LastBlock, ...]:
        totals = [None] * len(tokens) if total is None else list(total)
        return tuple(
            self._forward_last(block, image, part)
            for image, part in zip(tokens, totals, strict=True)
        )

    @torch.inference_mode()
    def mix_patches(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend among patches alone: (..., H, N, d) each to (..., N, D), heads side by side."""
        parts = torch.cat([part.transpose(-3, -2).flatten(-2) for part in (query, key, value)], -1)
        mixed = self.attend(parts.view(-1, *parts.shape[-2:]), self._heads, None, None)
        return mixed.view(*parts.shape[:-1], -1)

    def _embed(self, images: Tensor, grid: Grid) -> Tensor:
        """Return the (B, T, D) input of the first block."""
        visual, kernel = self.visual, self.visual.conv1.weight
        cut = self._pixels.cut(images).to(kernel.dtype)
        patches = self.exact(cut, kernel.flatten(1), None)
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
        self, block: ResidualAttentionBlock, tokens: Tensor, total: Tensor | None
    ) -> LastBlock:
        """Run the last block and the head on one image (T, D), keeping what a gradient needs.

        Its attention, summed over heads, is added to ``total`` (N, N).
        """
        attn, patches = block.attn, len(tokens) - 1
        normed = block.ln_1(tokens)
        projected = self.linear(normed, attn.in_proj_weight, attn.in_proj_bias)
        attention = projected.new_empty(attn.num_heads, patches, patches + 1)
        sums = None if total is None else total[None]
        mixed = self.attend(projected[None], attn.num_heads, sums, attention[None])[0, 1:]
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


class _Room:
    """Where the attention that is asked for is added up.

    Args:
        taps: What is asked for.
        images: B.
        patches: N.
        device: Where it is.
    """

    def __init__(self, taps: Taps, images: int, patches: int, device: torch.device) -> None:
        self._blocks, self._each = tuple(sorted(set(taps.attention))), taps.each
        shape = (len(self._blocks) if taps.each else 1, images, patches, patches)
        self._sums = torch.zeros(shape, device=device) if self._blocks else None

    def of(self, block: int) -> Tensor | None:
        """Return where (B, N, N) of a block are added, None for nowhere."""
        if self._sums is None or block not in self._blocks:
            return None
        return self._sums[self._blocks.index(block) if self._each else 0]

    def attention(self, heads: int) -> Tensor | None:
        """Turn sums over ``heads`` into means: (B, N, N), or (B, M, N, N) of each block."""
        if self._sums is None:
            return None
        if self._each:
            return self._sums.div_(heads).movedim(0, 1)
        return self._sums[0].div_(heads * len(self._blocks))


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
