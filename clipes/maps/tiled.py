"""A picture too large to be seen at once: towers look at tiles, and the rest is as ever.

Each tile is to the towers what a photo is. What they see is put together on one grid of patches,
averaged where tiles overlap, and only then compared with words: so a map is scaled by the picture's
extremes, not a tile's, and a class that a tile does not show is not forced into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from clipes.config import CamParams
from clipes.errors import ImageError
from clipes.maps.evidence import PatchEvidence, compared, look
from clipes.maps.vectors import WordVectors
from clipes.masks.mosaic import Tiles, Window
from clipes.towers.side_by_side import Towers
from clipes.towers.taps import Grid
from clipes.types import Progress, UInt8Array, size_text

MOST_PATCHES = 100_000
"""Of a picture. With two towers they take 1.3 GB beside the attention of the tiles, 0.6 GB."""

_STEP = 64  # pixels, of the sides of tiles that are tried

_FEATURES = ("features.own", "features.mixed")  # beside the names of towers

Read: TypeAlias = Callable[[slice, slice], UInt8Array]
"""Returns (h, w, 3) RGB of some rows and columns."""


@dataclass(frozen=True)
class Layout:
    """The tiles of a picture.

    Attributes:
        size: (H, W) of the picture.
        grid: (h, w) of its patches.
        tiles: In patches.
    """

    size: tuple[int, int]
    grid: Grid
    tiles: Tiles

    @classmethod
    def of(cls, size: tuple[int, int], side: int, patch: int, max_patches: int) -> Layout:
        """Return the layout in tiles of ``side`` pixels, each of ``max_patches`` at most.

        Args:
            size: (H, W) of the picture.
            side: Of the tiles.
            patch: Pixels along each side of a patch of a small tile.
            max_patches: As in ``CamParams``.

        Raises:
            ImageError: The picture would have more than ``MOST_PATCHES``.
        """
        along = min(math.ceil(side / patch), math.isqrt(max_patches))
        height, width = _grid(size, side, along)
        if height * width > MOST_PATCHES:
            least = _fitting(size, math.ceil(side / _STEP) * _STEP, max_patches)
            raise ImageError(
                f"a picture of {size_text(size)} has {height * width} patches in tiles of {side} "
                f"pixels, more than {MOST_PATCHES}",
                f"give --tile {least} or more",
            )
        return cls(size, (height, width), Tiles.of((height, width), along))

    def pixels(self, tile: Window) -> Window:
        """Return where a tile lies in the picture."""
        rows, columns = (
            slice(round(part.start * whole / count), round(part.stop * whole / count))
            for part, whole, count in zip(tile, self.size, self.grid, strict=True)
        )
        return rows, columns


def usual_side(size: tuple[int, int], least: int, max_patches: int) -> int:
    """Return the side of tiles, at least ``least``, with which a picture has few enough patches."""
    fitting = math.isqrt(max_patches) * math.sqrt(size[0] * size[1] / MOST_PATCHES)
    return _fitting(size, max(least, math.ceil(1.01 * fitting)), max_patches)


def _grid(size: tuple[int, int], side: int, along: int) -> Grid:
    """Return the patches of a picture whose tiles of ``side`` pixels have ``along`` on a side."""
    height, width = (max(1, round(length * along / side)) for length in size)
    return height, width


def _fitting(size: tuple[int, int], side: int, max_patches: int) -> int:
    """Return the least of ``side`` and steps beyond with which a picture has few enough patches.

    By trial, as a picture has one row of patches at least, however narrow it is.
    """
    while math.prod(_grid(size, side, math.isqrt(max_patches))) > MOST_PATCHES:
        side += _STEP
    return side


@torch.inference_mode()
def evidence_of_tiles(
    towers: Towers,
    vectors: WordVectors,
    params: CamParams,
    read: Read,
    layout: Layout,
    labels: Sequence[int],
    progress: Progress,
) -> PatchEvidence:
    """Return what a picture says, its patches compared with words.

    Args:
        towers: The towers.
        vectors: The words.
        params: Settings, of a preset that compares patches.
        read: Reads a part of the picture.
        layout: Of its tiles.
        labels: Its classes, 0-based, in the order of the names.
        progress: Called after each tile.
    """
    assert params.patches is not None
    tiles, sums = layout.tiles, dict[str, Tensor]()
    attention = torch.empty(0)
    for number, (tile, weight) in enumerate(zip(tiles, tiles.weights(), strict=True)):
        progress(number, len(tiles))
        shape = (weight.shape[0], weight.shape[1])
        prepared = towers.prepare(read(*layout.pixels(tile)), params.max_patches, shape)
        (seen,) = look(towers, params, {name: one[None] for name, one in prepared.items()})
        if not number:
            attention = seen.attention.new_empty(len(tiles), *seen.attention.shape)
        attention[number] = seen.attention
        share = torch.from_numpy(weight).to(towers.device)[..., None]
        for name, part in (*zip(_FEATURES, seen.features, strict=True), *seen.tokens.items()):
            if name not in sums:
                sums[name] = part.new_zeros(*layout.grid, part.shape[1], dtype=torch.float32)
            sums[name][tile] += share * part.float().unflatten(0, shape)
    progress(len(tiles), len(tiles))
    first, second = (sums.pop(name).flatten(0, 1) for name in _FEATURES)
    for part in (first, second):
        F.normalize(part, dim=-1, out=part)
    sources, log_words = compared(
        (first, second), vectors, labels, layout.grid, params.patches.temperature
    )
    tokens = {name: sums.pop(name).flatten(0, 1).half() for name in seen.tokens}
    return PatchEvidence(sources, attention, tokens, log_words, tiles)
