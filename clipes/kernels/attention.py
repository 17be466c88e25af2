"""Self-attention that leaves its map behind, from pixels' neighbours to sums over heads in one go.

The method wants the attention maps of the last blocks averaged over heads. Built the plain way, the
(H, T, T) scores of one block do not fit into any cache and cross the memory bus half a dozen times.
On processors they are made here a few rows at a time, and while those are at hand they are
normalised, multiplied by the values and added to the sum over heads. Shapes as in
``clipes.towers.taps``.

What it is worth (``clipes bench --without attention``): the preset ``default`` takes 1.24 times as
long with torch's own operations on an AMD EPYC (Zen 5) with AVX-512; held to AVX2, the tower alone
takes 1.07 times as long. Compiled code that is worth less than 1.05 goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from clipes.kernels.simd import (
    Width,
    add_lanes,
    exp,
    fill,
    fma,
    highest_lane,
    jit,
    load,
    maximum,
    multiply_tile,
    store,
    transpose_tile,
    width,
)
from clipes.kernels.tiles import flat, in_parts, shape_of_tiles
from clipes.types import Float32Array

Attention: TypeAlias = Callable[[Tensor, int, Tensor | None, Tensor | None], Tensor]
"""``attend(projected, heads, total, probabilities) -> (B, T, D)``, heads side by side.

``projected`` (B, T, 3D) holds query, key and value side by side. The patch-to-patch attention,
summed over heads, is added to ``total`` (B, N, N), and the attention of the patches to all tokens
is written to ``probabilities`` (B, H, N, T), where they are given.
"""

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
    lanes, rows = shape_of_tiles()
    mix_vectors = math.gcd(len(_SCORE_VECTORS), head_width // lanes)
    nothing = np.empty(0, np.float32)
    for image in range(batch):
        one = projected[image].contiguous()
        arguments = (
            flat(one), heads, tokens, flat(mixed[image]),
            nothing if total is None else flat(total[image]),
            nothing if probabilities is None else flat(probabilities[image]),
            width(lanes), width(rows), _SCORE_VECTORS, width(mix_vectors),
        )  # fmt: skip
        in_parts(_attend, tokens, rows, arguments)
    return mixed


def make_attention(name: str) -> Attention:
    """Return the attention that ``Kernels.attention`` names."""
    return {"torch": attend_by_products, "tiles": attend_by_tiles}[name]


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
    tile_rows: Width,
    score_vectors: Width,
    mix_vectors: Width,
) -> None:
    """Attend from tokens ``first`` to ``end``; all arrays flat."""
    n, rows, patches = len(lanes), len(tile_rows), tokens - 1
    full = mixed.size // tokens
    depth = full // heads
    panel, part = len(score_vectors) * n, len(mix_vectors) * n
    padded = -(-tokens // panel) * panel
    key = np.zeros(padded * depth, np.float32)  # panels of as many tokens as are scored at once
    scale, one = np.float32(1 / np.sqrt(depth)), np.float32(1)
    query = np.zeros(rows * depth, np.float32)
    scores = np.empty(rows * padded, np.float32)
    result = np.empty(rows * depth, np.float32)
    value = np.empty(tokens * depth, np.float32)
    factors = np.empty(rows, np.float32)
    beyond = np.zeros(n, np.float32)
    beyond[(tokens - 1) % n + 1 :] = -np.inf
    for head in range(heads):
        start = head * depth
        for token in range(tokens):
            _scale(
                value, token * depth, projected, start + (token * 3 + 2) * full, depth, one, lanes
            )
        whole = tokens - tokens % n
        for token in range(0, whole, n):
            at = token // panel * panel * depth + token % panel
            for k in range(0, depth, n):
                from_ = start + (token * 3 + 1) * full + k
                transpose_tile(projected, from_, 3 * full, key, at + k * panel, panel, lanes)
        for token in range(whole, tokens):
            at = token // panel * panel * depth + token % panel
            for k in range(depth):
                key[at + k * panel] = projected[start + (token * 3 + 1) * full + k]
        for top in range(first, end, rows):
            count = min(rows, end - top)
            for row in range(count):
                at = start + (top + row) * 3 * full
                _scale(query, row * depth, projected, at, depth, scale, lanes)
            for column in range(0, padded, panel):
                multiply_tile(
                    query, 0, depth, key, column * depth, panel, depth,
                    scores, column, padded, tile_rows, score_vectors, lanes,
                )  # fmt: skip
            for row in range(count):
                factors[row] = _softmax(scores, row * padded, tokens, beyond, lanes)
                factor, patch = factors[row], top + row - 1
                if patch >= 0 and total.size > 0:
                    _add(total, patch * patches, scores, row * padded + 1, patches, factor, lanes)
                if patch >= 0 and probabilities.size > 0:
                    at = (head * patches + patch) * tokens
                    _scale(probabilities, at, scores, row * padded, tokens, factor, lanes)
            for column in range(0, depth, part):
                multiply_tile(
                    scores, 0, padded, value, column, depth, tokens,
                    result, column, depth, tile_rows, mix_vectors, lanes,
                )  # fmt: skip
            for row in range(count):
                at = (top + row) * full + head * depth
                _scale(mixed, at, result, row * depth, depth, factors[row], lanes)


@jit
def _softmax(
    scores: Float32Array, start: int, count: int, beyond: Float32Array, lanes: Width
) -> float:
    """Turn ``count`` scores into multiples of probabilities, in place.

    Args:
        scores: Flat, with room for whole vectors.
        start: Where the scores begin.
        count: How many they are.
        beyond: 0 for the lanes of the last vector that are scores, -inf for those beyond.
        lanes: Of a vector.

    Returns:
        The factor that makes them probabilities.
    """
    n = len(lanes)
    last = start + (count - 1) // n * n
    store(scores, last, load(scores, last, lanes) + load(beyond, 0, lanes))
    highest = load(scores, start, lanes)
    for k in range(start + n, last + 1, n):
        highest = maximum(highest, load(scores, k, lanes))
    shift = fill(highest_lane(highest), lanes)
    sums = fill(np.float32(0), lanes)
    for k in range(start, last + 1, n):
        part = exp(load(scores, k, lanes) - shift)
        sums = sums + part
        store(scores, k, part)
    return float(1 / add_lanes(sums))


@jit
def _add(
    to: Float32Array,
    at: int,
    values: Float32Array,
    start: int,
    count: int,
    factor: float | np.float32,
    lanes: Width,
) -> None:
    """Add ``factor`` times ``count`` values."""
    whole, factors = count - count % len(lanes), fill(factor, lanes)
    for k in range(0, whole, len(lanes)):
        store(to, at + k, fma(load(values, start + k, lanes), factors, load(to, at + k, lanes)))
    for k in range(whole, count):
        to[at + k] += values[start + k] * factor


@jit
def _scale(
    to: Float32Array,
    at: int,
    values: Float32Array,
    start: int,
    count: int,
    factor: float | np.float32,
    lanes: Width,
) -> None:
    """Write ``factor`` times ``count`` values."""
    whole, factors = count - count % len(lanes), fill(factor, lanes)
    for k in range(0, whole, len(lanes)):
        store(to, at + k, load(values, start + k, lanes) * factors)
    for k in range(whole, count):
        to[at + k] = values[start + k] * factor
