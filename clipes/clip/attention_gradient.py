"""The gradient of self-attention at its queries, keys and values, summed over the patches.

With P the attention, G the gradient at its output (N, H, d) and c_i = G_i . mixed_i, the gradient
at the scores is S_ij = P_ij (G_i . V_j - c_i). Where only sums over patches are wanted, most of it
need not be built:

- value: each patch gives away all its attention but CLS's share: sum_i (1 - P_i,CLS) G_i;
- query: sum_i sum_j S_ij K_j needs the column sums of S, which are (P^T G)_j . V_j - (P^T c)_j;
- key: the rows of S sum to zero, so over the patch columns they sum to -S_i,CLS.

Shapes as in ``clipes.clip.backbone``; K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from clipes.clip.tiles import flat, in_parts, shape_of_tiles
from clipes.simd import (
    Width,
    add_lanes,
    fill,
    fma,
    jit,
    load,
    multiply_tile,
    store,
    transpose_tile,
    width,
)
from clipes.types import Float32Array

SumGradients: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``sum_gradients(attention, query, key, value, mixed, given) -> (K, 3D)``.

The sums at query, key and value, side by side. ``attention`` is (H, N, T), ``query`` and ``mixed``
(H, N, d), ``key`` and ``value`` (H, T, d), and ``given`` (K, N, D) are the gradients at ``mixed``,
heads side by side.
"""

_VECTORS = width(2)


def sum_by_products(
    attention: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, given: Tensor
) -> Tensor:
    """Sum with torch's own operations, on any device; arguments as ``SumGradients``."""
    heads, _, head_width = value.shape
    scale = head_width**-0.5
    to_cls, transposed = attention[:, :, :1], attention.transpose(-1, -2)
    sums = []
    for one in given:
        by_head = one.unflatten(-1, (heads, head_width)).transpose(0, 1)  # (H, N, d)
        along = (by_head * mixed).sum(-1, keepdim=True)  # c, (H, N, 1)
        at_cls = to_cls * (by_head @ value[:, 0, :, None] - along)
        columns = (transposed @ by_head * value).sum(-1, keepdim=True) - transposed @ along
        at_query, at_key = scale * (columns * key).sum(1), -scale * (at_cls * query).sum(1)
        sums.append(torch.cat([at_query, at_key, ((1 - to_cls) * by_head).sum(1)]).flatten())
    return torch.stack(sums)


def sum_by_tiles(
    attention: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, given: Tensor
) -> Tensor:
    """Sum a few tokens at a time on a processor, in float32; arguments as ``SumGradients``."""
    heads, tokens, head_width = value.shape
    lanes, most = shape_of_tiles()
    if tokens <= len(_VECTORS) * lanes:
        return sum_by_products(attention, query, key, value, mixed, given)
    tiles = -(-(head_width + 1) // most)  # one row more than channels, for c
    rows = -(-(head_width + 1) // tiles)
    sums = given.new_empty(len(given), 3, heads, head_width)
    arguments = (
        *(flat(part.contiguous()) for part in (attention, query, key, value, mixed, given)),
        flat(sums), len(given), heads, tokens, tiles,
        width(lanes), width(rows), _VECTORS, width(head_width // lanes),
    )  # fmt: skip
    in_parts(_sum, heads, 1, arguments)
    return sums.flatten(1)


@jit
def _sum(
    first: int,
    end: int,
    attention: Float32Array,
    query: Float32Array,
    key: Float32Array,
    value: Float32Array,
    mixed: Float32Array,
    given: Float32Array,
    sums: Float32Array,
    classes: int,
    heads: int,
    tokens: int,
    tiles: int,
    lanes: Width,
    rows: Width,
    vectors: Width,
    head_vectors: Width,
) -> None:
    """Sum in heads ``first`` to ``end``; all arrays flat."""
    n, patches = len(lanes), tokens - 1
    depth, panel, extended = n * len(head_vectors), n * len(vectors), len(rows) * tiles
    scale = np.float32(1 / np.sqrt(depth))
    here = np.zeros(patches * extended, np.float32)  # G and c of one head
    values = np.zeros(extended * patches, np.float32)  # of all patches, by channel; then -1 for c
    values[depth * patches : (depth + 1) * patches] = -1
    tile = np.empty(extended * panel, np.float32)
    columns = np.empty(tokens, np.float32)
    for head in range(first, end):
        start = head * tokens * depth
        for place in range(0, patches, n):
            patch = min(place, patches - n)  # here and below the last overlaps the one before
            for k in range(0, depth, n):
                from_ = start + (patch + 1) * depth + k
                transpose_tile(value, from_, depth, values, k * patches + patch, patches, lanes)
        for number in range(classes):
            at = (number * 3 * heads + head) * depth
            at_key, at_value = at + heads * depth, at + 2 * heads * depth
            for k in range(depth):
                sums[at + k] = sums[at_key + k] = sums[at_value + k] = 0
            columns[0] = 0
            for patch in range(patches):
                from_ = ((number * patches + patch) * heads + head) * depth
                row = (head * patches + patch) * depth
                along = fill(np.float32(0), lanes)
                to_cls = along
                for k in range(0, depth, n):
                    part = load(given, from_ + k, lanes)
                    store(here, patch * extended + k, part)
                    along = fma(part, load(mixed, row + k, lanes), along)
                    to_cls = fma(part, load(value, start + k, lanes), to_cls)
                c = add_lanes(along)
                here[patch * extended + depth] = c
                probability = attention[(head * patches + patch) * tokens]
                at_cls = probability * (add_lanes(to_cls) - c)
                columns[0] += at_cls
                key_factor, left = fill(-scale * at_cls, lanes), fill(1 - probability, lanes)
                for k in range(0, depth, n):
                    part = load(sums, at_key + k, lanes)
                    store(sums, at_key + k, fma(key_factor, load(query, row + k, lanes), part))
                    part = load(sums, at_value + k, lanes)
                    kept = fma(left, load(here, patch * extended + k, lanes), part)
                    store(sums, at_value + k, kept)
            for place in range(0, patches, panel):
                patch = min(place, patches - panel)
                for row in range(0, extended, len(rows)):
                    multiply_tile(
                        here, row, 1, extended, attention, head * patches * tokens + 1 + patch,
                        tokens, patches, tile, row * panel, panel, rows, vectors, lanes,
                    )  # fmt: skip
                for k in range(0, panel, n):
                    part = fill(np.float32(0), lanes)
                    for row in range(depth + 1):
                        other = load(values, row * patches + patch + k, lanes)
                        part = fma(load(tile, row * panel + k, lanes), other, part)
                    store(columns, 1 + patch + k, part)
            for token in range(tokens):
                factor = fill(scale * columns[token], lanes)
                for k in range(0, depth, n):
                    part = load(key, start + token * depth + k, lanes)
                    store(sums, at + k, fma(factor, part, load(sums, at + k, lanes)))
