"""What one pass of a frozen tower may leave behind, and what it left.

A tower is walked block by block, so that whatever a method reads, tokens half way up or how patches
attend to one another, is an output that is asked for, and not a hook. Shapes: B images of one grid,
N = h*w patches, T = 1 + N tokens (CLS first), D channels, H heads of width d.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from torch import Tensor

Grid: TypeAlias = tuple[int, int]
"""(h, w): patches per column and row."""


def finer_grid(grid: Grid, factor: float) -> Grid:
    """Return the grid whose sides have ``factor`` times as many patches.

    >>> finer_grid((23, 31), 1.5)
    (34, 46)
    """
    height, width = grid
    return round(factor * height), round(factor * width)


@dataclass(frozen=True)
class Taps:
    """What is asked of a pass; blocks count from 1, and what nothing asks for is not computed.

    Attributes:
        tokens: Blocks whose output is kept.
        attention: Blocks whose patch-to-patch attention is kept, heads averaged.
        each: Keep the attention of each block; otherwise the mean over them.
        last: What the last block attends with (``inputs``), or everything of it that the gradient
            of a class score needs (``gradient``).
    """

    tokens: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    each: bool = False
    last: Literal["", "inputs", "gradient"] = ""


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
    """What the last block attends with; of a batch every tensor has B in front.

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
class Encoded:
    """What a pass over B images left behind; see ``Taps`` for what can be asked for.

    Attributes:
        grid: (h, w).
        tokens: (B, T, D) output of each block that was asked for, by its number.
        gradients: Of each image, for ``Taps.last == "gradient"``; else empty.
    """

    grid: Grid
    tokens: Mapping[int, Tensor]
    gradients: tuple[LastBlock, ...] = ()
    _attention: Tensor | None = None
    _last: LastInput | None = None

    @property
    def attention(self) -> Tensor:
        """(B, N, N) mean of the maps asked for, or (B, M, N, N) each, in the order of blocks."""
        return _asked_for(self._attention, "attention")

    @property
    def last(self) -> LastInput:
        """What the last block attends with, of the whole batch."""
        return _asked_for(self._last, "last")


_Part = TypeVar("_Part")


def _asked_for(part: _Part | None, name: str) -> _Part:
    if part is None:
        raise ValueError(f"the taps did not ask for '{name}'")
    return part
