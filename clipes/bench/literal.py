"""The method the slow, obvious way: the baseline of ``clipes bench`` and the oracle of the tests.

One autograd pass per class through the last block, Sinkhorn and the square of the walk matrix per
class, attention of every block, one image at a time. Blocks run through open_clip's own modules,
and nothing here calls the code it is compared with.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from open_clip.transformer import VisionTransformer
from torch import Tensor

from clipes.config import CamParams
from clipes.types import Float32Array, UInt8Array


def embed(visual: VisionTransformer, image: Tensor) -> Tensor:
    """(3, H, W) to the (T, D) input of the first block."""
    patches = visual.conv1(image[None])
    table = visual.positional_embedding
    side = visual.grid_size
    grid = table[1:].T.reshape(1, -1, *side)
    grid = F.interpolate(grid, patches.shape[-2:], mode="bilinear", align_corners=False)
    position = torch.cat([table[:1], grid[0].flatten(1).T])
    tokens = torch.cat([visual.class_embedding[None], patches.flatten(2)[0].T])
    embedded: Tensor = visual.ln_pre(tokens + position)
    return embedded


def run_blocks(visual: VisionTransformer, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(T, D) through the blocks: the last one's input, and the attention (T, T) of every block."""
    maps = []
    blocks = visual.transformer.resblocks
    for block in blocks:
        normed = block.ln_1(tokens)[None]
        attended, attention = block.attn(normed, normed, normed, need_weights=True)
        maps.append(attention[0])
        if block is not blocks[-1]:
            tokens = tokens + attended[0]
            tokens = tokens + block.mlp(block.ln_2(tokens))
    return tokens, maps


def channel_weights(
    visual: VisionTransformer, tokens: Tensor, text: Tensor, background: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(K, D) mean gradients and (N, D) activations, from the (T, D) input of the last block."""
    block = visual.transformer.resblocks[-1]
    rows = []
    with torch.enable_grad():
        for k in range(len(text)):
            normed = block.ln_1(tokens).detach().requires_grad_(True)
            query = normed[None]
            hidden = tokens + block.attn(query, query, query, need_weights=False)[0][0]
            hidden = hidden + block.mlp(block.ln_2(hidden))
            feature = visual.ln_post(hidden)[1:].mean(0) @ visual.proj
            logits = scale * F.normalize(feature, dim=0) @ torch.cat([text, background]).T
            (gradient,) = torch.autograd.grad(logits.softmax(0)[k], normed)
            rows.append(gradient[1:].mean(0))
    return torch.stack(rows), block.ln_1(tokens)[1:]


def walk_matrix(attention: Tensor, iterations: int) -> Tensor:
    """T, built: (N, N)."""
    matrix = attention.clone()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    return (matrix + matrix.T) / 2


def boxes(cam: Float32Array, params: CamParams) -> UInt8Array:
    """Union of the bounding boxes of all contours: (h, w), 1 inside."""
    levels = (cam * 255).astype(np.uint8)
    strong = (levels > int(params.box_threshold * levels.max())).astype(np.uint8)
    contours, _ = cv2.findContours(strong, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    mask = np.zeros_like(levels)
    end = (slice(None), slice(None)) if params.last_row_in_box else (slice(-1), slice(-1))
    for contour in contours:
        x, y, width, height = cv2.boundingRect(contour)
        mask[end][y : y + height, x : x + width] = 1
    return mask


def scaled(map_: Float32Array) -> Float32Array:
    """Min-max one map."""
    shifted = map_ - map_.min()
    result: Float32Array = shifted / (np.float32(1e-7) + shifted.max())
    return result


@torch.no_grad()
def refined_maps(
    visual: VisionTransformer,
    image: Tensor,
    text: Tensor,
    background: Tensor,
    scale: float,
    params: CamParams,
) -> Float32Array:
    """Everything from a prepared image (3, H, W) to refined maps (K, h, w)."""
    grid = image.shape[-2] // visual.patch_size[0], image.shape[-1] // visual.patch_size[1]
    tokens, maps = run_blocks(visual, embed(visual, image))
    weights, activations = channel_weights(visual, tokens, text, background, scale)
    refined = []
    for row in weights:
        raw = (activations @ row).reshape(grid).numpy()
        cam = scaled(scaled(np.maximum(raw, 0)))
        attention = torch.stack(maps[-params.affinity_blocks :]).mean(0)[1:, 1:]
        walk = walk_matrix(attention, params.sinkhorn_iterations)
        spread = torch.linalg.matrix_power(walk, params.walk_power)
        masked = spread * torch.from_numpy(boxes(cam, params).reshape(1, -1))
        refined.append(scaled((masked @ torch.from_numpy(cam.reshape(-1))).reshape(grid).numpy()))
    return np.stack(refined)
