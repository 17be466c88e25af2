"""Self-attention that leaves its map behind, from pixels' neighbours to sums over heads in one go.

The method wants the attention maps of the last blocks averaged over heads. Built the plain way, the
(H, T, T) scores of one block do not fit into any cache and cross the memory bus half a dozen times.
On processors they are made here a few rows at a time, and while those are at hand they are
normalised, multiplied by the values and added to the sum over heads. Shapes as in
``clipes.clip.backbone``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from clipes.clip.attention_gradient import SumGradients, sum_by_products, sum_by_tiles
from clipes.clip.tiles import flat, in_parts, shape_of_tiles
from clipes.clip.timing import best_times
from clipes.simd import (
    Width,
    exp,
    fill,
    jit,
    load,
    maximum,
    multiply_tile,
    store,
    store_strided,
    width,
)
from clipes.types import Float32Array

Attention: TypeAlias = Callable[[Tensor, int, Tensor | None, Tensor | None], Tensor]
"""``attend(projected, heads, total, probabilities) -> (B, T, D)``, heads side by side.

``projected`` (B, T, 3D) holds query, key and value side by side. The patch-to-patch attention,
summed over heads, is added to ``total`` (B, N, N), and the attention of the patches to all tokens
is written to ``probabilities`` (B, H, N, T), where they are given.
"""

_TOKENS, _HEADS, _HEAD_WIDTH = 400, 2, 64  # enough to see which way is faster
_SLACK = 8.0  # the order of sums may differ; half precision would be off by thousands
_SCORE_VECTORS = width(2)


def split_heads(projected: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split (..., T, 3D) into query, key and value, each (..., H, T, d); nothing is copied."""
    split = projected.unflatten(-1, (3, heads, -1)).movedim(-3, 0).transpose(-3, -2)
    query, key, value = split.unbind(0)
    return query, key, value


def attend_by_products(
    projected: Tensor, heads: int, total: Tensor | None, probabilities: Tensor | None
) -> Tensor:
    """Attend with torch's own operations, on any device; arguments as ``Attention``."""
    query, key, value = split_heads(projected, heads)
    if total is None and probabilities is None:
        mixed = F.scaled_dot_product_attention(query, key, value)
    else:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        attention = scores.softmax(-1)
        if total is not None:
            total += attention[:, :, 1:, 1:].sum(1)
        if probabilities is not None:
            probabilities.copy_(attention[:, :, 1:])
        mixed = attention @ value
    return mixed.transpose(1, 2).flatten(2)


def attend_by_tiles(
    projected: Tensor, heads: int, total: Tensor | None, probabilities: Tensor | None
) -> Tensor:
    """Attend a few rows at a time on a processor, in float32; arguments as ``Attention``."""
    batch, tokens, triple = projected.shape
    mixed = projected.new_empty(batch, tokens, triple // 3)
    head_width = triple // 3 // heads
    lanes, query_rows, mix_rows = _shape_of_tiles(head_width)
    nothing = np.empty(0, np.float32)
    for image in range(batch):
        one = projected[image].contiguous()
        arguments = (
            flat(one), heads, tokens, flat(mixed[image]),
            nothing if total is None else flat(total[image]),
            nothing if probabilities is None else flat(probabilities[image]),
            lanes, query_rows, mix_rows, width(head_width // len(lanes)),
        )  # fmt: skip
        in_parts(_attend, tokens, len(query_rows), arguments)
    return mixed


def choose_attention(
    device: torch.device, dtype: torch.dtype, head_width: int
) -> tuple[Attention, SumGradients]:
    """Return the fastest attention, and its gradient, for a device, type and width of heads."""
    by_tiles = device.type == "cpu" and dtype == torch.float32 and head_width in (16, 32, 48, 64)
    if by_tiles and _tiles_are_better(torch.get_num_threads()):
        return attend_by_tiles, sum_by_tiles
    return attend_by_products, sum_by_products


@lru_cache(maxsize=8)
@torch.inference_mode()
def _tiles_are_better(_threads: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(1, _TOKENS, 3 * _HEADS * _HEAD_WIDTH, generator=generator)
    exact = attend_by_products(projected.double(), _HEADS, None, None)
    ways = (attend_by_products, attend_by_tiles)
    # The first call may compile.
    errors = [float((way(projected, _HEADS, None, None) - exact).abs().max()) for way in ways]
    total = torch.zeros(1, _TOKENS - 1, _TOKENS - 1)
    products, tiles = best_times([partial(way, projected, _HEADS, total, None) for way in ways])
    return errors[1] <= _SLACK * errors[0] and tiles < products


@lru_cache(maxsize=8)
def _shape_of_tiles(head_width: int) -> tuple[Width, Width, Width]:
    """Return lanes, rows of scores and rows of the mix, such that sums fill the registers."""
    lanes, rows = shape_of_tiles()
    sums = rows * len(_SCORE_VECTORS) * lanes
    fitting = (
        part for part in range(1, rows + 1) if rows % part == 0 and part * head_width <= sums
    )
    return width(lanes), width(rows), width(max(fitting))


@jit
def _attend(
    first: int,
    end: int,
    projected: Float32Array,
    heads: int,
    tokens: int,
    mixed: Float32Array,
    total: Float32Array,
    probabilities: Float32Array,
    lanes: Width,
    query_rows: Width,
    mix_rows: Width,
    mix_vectors: Width,
) -> None:
    """Attend from tokens ``first`` to ``end``; all arrays flat."""
    n, rows, patches = len(lanes), len(query_rows), tokens - 1
    full = mixed.size // tokens
    depth = full // heads
    panel = len(_SCORE_VECTORS) * n
    padded = -(-tokens // panel) * panel
    key = np.zeros(padded * depth, np.float32)  # panels of as many tokens as are scored at once
    scale = fill(np.float32(1 / np.sqrt(depth)), lanes)
    query = np.zeros(rows * depth, np.float32)
    scores = np.empty(rows * padded, np.float32)
    result = np.empty(rows * depth, np.float32)
    value = np.empty(tokens * depth, np.float32)
    spill = np.empty(n, np.float32)
    for head in range(heads):
        for token in range(tokens):
            start = (token * 3 + 1) * full + head * depth
            place = token // panel * panel * depth + token % panel
            for k in range(0, depth, n):
                store_strided(key, place + k * panel, panel, load(projected, start + k, lanes))
            _copy(value, token * depth, projected, start + full, depth, lanes)
        for top in range(first, end, rows):
            count = min(rows, end - top)
            for row in range(count):
                start = (top + row) * 3 * full + head * depth
                for k in range(0, depth, n):
                    store(query, row * depth + k, load(projected, start + k, lanes) * scale)
            for column in range(0, padded, panel):
                multiply_tile(
                    query, 0, depth, 1, key, column * depth, panel, depth,
                    scores, column, padded, query_rows, _SCORE_VECTORS, lanes,
                )  # fmt: skip
            for row in range(count):
                _softmax(scores, row * padded, tokens, padded, spill, lanes)
                patch = top + row - 1
                if patch >= 0 and total.size > 0:
                    _add(total, patch * patches, scores, row * padded + 1, patches, lanes)
                if patch >= 0 and probabilities.size > 0:
                    start = (head * patches + patch) * tokens
                    _copy(probabilities, start, scores, row * padded, tokens, lanes)
            for row in range(0, rows, len(mix_rows)):
                multiply_tile(
                    scores, row * padded, padded, 1, value, 0, depth, tokens,
                    result, row * depth, depth, mix_rows, mix_vectors, lanes,
                )  # fmt: skip
            for row in range(count):
                _copy(mixed, (top + row) * full + head * depth, result, row * depth, depth, lanes)


@jit
def _softmax(
    scores: Float32Array, start: int, count: int, padded: int, spill: Float32Array, lanes: Width
) -> None:
    """Turn ``count`` scores into probabilities, in place, and the ``padded`` into zeros."""
    n = len(lanes)
    for k in range(count, padded):
        scores[start + k] = -np.inf
    highest = load(scores, start, lanes)
    for k in range(n, padded, n):
        highest = maximum(highest, load(scores, start + k, lanes))
    store(spill, 0, highest)
    shift = fill(spill.max(), lanes)
    sums = fill(np.float32(0), lanes)
    for k in range(0, padded, n):
        part = exp(load(scores, start + k, lanes) - shift)
        sums = sums + part
        store(scores, start + k, part)
    store(spill, 0, sums)
    factor = fill(np.float32(1) / spill.sum(), lanes)
    for k in range(0, padded, n):
        store(scores, start + k, load(scores, start + k, lanes) * factor)


@jit
def _add(
    to: Float32Array, at: int, values: Float32Array, start: int, count: int, lanes: Width
) -> None:
    whole = count - count % len(lanes)
    for k in range(0, whole, len(lanes)):
        store(to, at + k, load(to, at + k, lanes) + load(values, start + k, lanes))
    for k in range(whole, count):
        to[at + k] += values[start + k]


@jit
def _copy(
    to: Float32Array, at: int, values: Float32Array, start: int, count: int, lanes: Width
) -> None:
    whole = count - count % len(lanes)
    for k in range(0, whole, len(lanes)):
        store(to, at + k, load(values, start + k, lanes))
    for k in range(whole, count):
        to[at + k] = values[start + k]
