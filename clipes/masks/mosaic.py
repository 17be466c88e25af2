"""A picture as tiles that overlap: where they lie, and one answer of what each of them says.

In an overlap the tiles are averaged, each the less the nearer to its edge: beyond it a tile knows
nothing. No torch in here: the workers of ``clipes refine`` import this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from clipes.disk.images import MAX_PIXELS, ORIGIN, voc_palette
from clipes.disk.png import write_rows
from clipes.disk.scratch import ScratchArray
from clipes.masks.pseudo import label_pixels
from clipes.types import Float32Array, Int64Array

Window: TypeAlias = tuple[slice, slice]
"""Rows and columns of a part of a picture."""

TILED = "are so large that they were worked on in tiles of {} pixels that overlap"
"""Said of pictures beyond ``MAX_PIXELS``, or beyond the tile that was asked for."""

_OVERLAP = 4  # neighbouring windows share 1/4 of their side
_PIXELS_AT_ONCE = 1 << 22  # on their way to a file


def windows(length: int, side: int) -> Iterator[slice]:
    """Yield slices of at most ``side`` that cover ``length`` and overlap by a quarter at least.

    >>> [(part.start, part.stop) for part in windows(20, 12)]
    [(0, 12), (8, 20)]
    """
    side = min(side, length)
    step = side - side // _OVERLAP
    count = 1 + math.ceil((length - side) / step)
    for index in range(count):
        start = index * (length - side) // max(count - 1, 1)
        yield slice(start, start + side)


def ramp(length: int) -> Float32Array:
    """Return weights (length,) that rise from the edges to the middle."""
    position = np.arange(length, dtype=np.float32)
    return np.minimum(position + 1, length - position).astype(np.float32)


def shares(parts: Sequence[slice]) -> list[Float32Array]:
    """Return how much each of some slices counts at each of its places; everywhere that adds to 1.

    Args:
        parts: Slices that cover a length, as ``windows`` yields them.
    """
    total = np.zeros(parts[-1].stop, np.float32)
    for part in parts:
        total[part] += ramp(part.stop - part.start)
    return [
        np.divide(ramp(part.stop - part.start), total[part], dtype=np.float32) for part in parts
    ]


@dataclass(frozen=True)
class Tiles:
    """The tiles of a picture, row by row.

    Attributes:
        rows: Of the tiles.
        columns: Of the tiles.
        side: How long they are at most.
    """

    rows: tuple[slice, ...]
    columns: tuple[slice, ...]
    side: int

    @classmethod
    def of(cls, size: tuple[int, int], side: int) -> Tiles:
        """Return the tiles, ``side`` long at most, of a picture of ``size`` (H, W)."""
        return cls(tuple(windows(size[0], side)), tuple(windows(size[1], side)), side)

    def __len__(self) -> int:
        """Return how many tiles there are."""
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[Window]:
        """Yield the tiles."""
        return ((rows, columns) for rows in self.rows for columns in self.columns)

    def weights(self) -> Iterator[Float32Array]:
        """Yield how much each tile counts at each of its pixels: (h, w)."""
        across = shares(self.columns)
        return (down[:, None] * one for down in shares(self.rows) for one in across)


def tile_side(size: tuple[int, int], asked: int | None, usual: int, most: int = 1 << 20) -> int:
    """Return the side of the tiles that a picture is worked on in; 0 for none.

    Args:
        size: (H, W) of the picture.
        asked: The side that was asked for; None for tiles only where there is no other way.
        usual: The side then.
        most: The side that fits into memory.
    """
    if asked is None:
        return min(usual, most) if size[0] * size[1] > MAX_PIXELS else 0
    return min(asked, most) if max(size) > asked else 0


def averaged(
    tiles: Tiles, found: Iterable[Float32Array], labels: int, folder: Path
) -> Iterator[tuple[Window, Float32Array]]:
    """Yield the mean of what the tiles say, part by part: each pixel once, when it is complete.

    Only the overlap with the next row of tiles waits, on disk; the rest is as large as a tile.

    Args:
        tiles: The tiles.
        found: What each tile says, (L, h, w), in their order.
        labels: L.
        folder: Where there is disk.

    Yields:
        Where a part lies, and (L, h, w) of it. That of a single tile is as it was found.

    Raises:
        WriteError: There is no room for the overlap.
    """
    answers = iter(found)
    down, across = shares(tiles.rows), shares(tiles.columns)
    ends = _starts_of_next(tiles.rows)
    height = max(rows.stop - end for rows, end in zip(tiles.rows, ends, strict=True))
    below = ScratchArray(folder, (labels, max(height, 1), tiles.columns[-1].stop), np.float32)
    waiting = 0  # rows of ``below`` that the row of tiles before has left
    for rows, end, weight in zip(tiles.rows, ends, down, strict=True):
        for columns, part in _along(tiles.columns, across, answers):
            strip = part if len(tiles.rows) == 1 else part * weight[:, None]
            strip[:, :waiting] += below.values[:, :waiting, columns]
            below.values[:, : rows.stop - end, columns] = strip[:, end - rows.start :]
            yield (slice(rows.start, end), columns), strip[:, : end - rows.start]
        waiting = rows.stop - end
        below.release()
    next(answers, None)  # so that who finds them comes to an end


def _along(
    parts: Sequence[slice], weights: Sequence[Float32Array], found: Iterator[Float32Array]
) -> Iterator[tuple[slice, Float32Array]]:
    """Yield (L, h, w) means of a row of tiles from left to right, each column once."""
    left: Float32Array | None = None
    for part, end, weight in zip(parts, _starts_of_next(parts), weights, strict=True):
        one = next(found)
        one = one if len(parts) == 1 else one * weight
        if left is not None:
            one[:, :, : left.shape[2]] += left
        left = one[:, :, end - part.start :]
        yield slice(part.start, end), one[:, :, : end - part.start]


def _starts_of_next(parts: Sequence[slice]) -> list[int]:
    return [*(part.start for part in parts[1:]), parts[-1].stop]


class LargeLabel:
    """A mask and its confidence that memory is not to hold.

    Args:
        size: (H, W).
        folder: Where there is disk: 3 bytes a pixel.

    Raises:
        WriteError: There is no room.
    """

    def __init__(self, size: tuple[int, int], folder: Path) -> None:
        self._size = size
        self._mask = ScratchArray(folder, size, np.uint8)
        self._steps = ScratchArray(folder, size, np.uint16)

    def fill(self, parts: Iterable[tuple[Window, Float32Array]], labels: Int64Array) -> None:
        """Take in the probabilities of all parts.

        Args:
            parts: Where each lies, and (1 + K, h, w), as ``averaged`` yields them.
            labels: (K,) 0-based classes.
        """
        for window, probs in parts:
            self._mask.values[window] = label_pixels(probs, labels)
            best = np.minimum(probs.max(0), 1)  # a mean of ones may be more by rounding
            self._steps.values[window] = np.rint(best * np.float64(65535))
            self._mask.release()
            self._steps.release()

    def write_mask(self, path: Path, *, origin: str = "") -> None:
        """Write the mask; errors and arguments as for ``clipes.disk.images.write_mask``."""
        palette = voc_palette().tobytes()
        write_rows(path, self._size, self._rows(self._mask), palette=palette, text=_text(origin))

    def write_confidence(self, path: Path, *, origin: str = "") -> None:
        """Write the confidence, likewise."""
        write_rows(path, self._size, self._rows(self._steps), bits=16, text=_text(origin))

    def _rows(self, kept: ScratchArray) -> Iterator[npt.NDArray[Any]]:
        at_once = max(1, _PIXELS_AT_ONCE // self._size[1])
        for top in range(0, self._size[0], at_once):
            yield kept.values[top : top + at_once]
            kept.release()


def _text(origin: str) -> tuple[str, str] | None:
    return (ORIGIN, origin) if origin else None
