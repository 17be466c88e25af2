"""The method the slow, obvious way: the oracle beside the fast one.

One autograd pass per class, the walk matrix and its square built in full, boxes pixel by pixel.
Blocks run through open_clip's own ``forward``; nothing here calls the code under test.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from open_clip.transformer import VisionTransformer
from torch import Tensor


def run_blocks(visual: VisionTransformer, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """All blocks but the last on (T, D): the last one's input, attention (T, T) of each block."""
    maps = []
    for block in visual.transformer.resblocks:
        normed = block.ln_1(tokens)[None]
        maps.append(block.attn(normed, normed, normed, need_weights=True)[1][0])
        if block is not visual.transformer.resblocks[-1]:
            tokens = block(tokens[None])[0]
    return tokens, maps


def embed(visual: VisionTransformer, image: Tensor, position: Tensor) -> Tensor:
    """(3, H, W) to (T, D), with a (T, D) position embedding."""
    patches = visual.conv1(image[None]).flatten(2)[0].T
    tokens = torch.cat([visual.class_embedding[None], patches]) + position
    return visual.ln_pre(tokens)


def channel_weights(
    visual: VisionTransformer, tokens: Tensor, text: Tensor, background: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(K, D) mean gradients and (N, D) activations, from the (T, D) input of the last block."""
    block = visual.transformer.resblocks[-1]
    rows = []
    for k in range(len(text)):
        normed = block.ln_1(tokens.detach()).detach().requires_grad_(True)
        attended = block.attn(normed[None], normed[None], normed[None], need_weights=False)[0][0]
        hidden = tokens.detach() + attended
        hidden = hidden + block.mlp(block.ln_2(hidden))
        feature = visual.ln_post(hidden)[1:].mean(0) @ visual.proj
        logits = scale * F.normalize(feature, dim=0) @ torch.cat([text, background]).T
        (gradient,) = torch.autograd.grad(logits.softmax(0)[k], normed)
        rows.append(gradient[1:].mean(0))
    return torch.stack(rows), block.ln_1(tokens.detach())[1:].detach()


def walk_matrix(attention: Tensor, iterations: int) -> Tensor:
    """T, built."""
    matrix = attention.clone()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    return (matrix + matrix.T) / 2
