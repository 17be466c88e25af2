"""Frozen towers on one grid: each sees an image in its own pixels, and all give h x w patches.

So it is unless they are asked for grids of their own. CLIP says what the grid is. What is trained
or learnt later knows towers by name; who loads them is ``clipes.stages.setup``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from clipes.towers.clip import Backbone
from clipes.towers.taps import Grid
from clipes.types import UInt8Array

CLIP, DINO = "clip", "dino"
"""Names of towers."""


class TokenTower(Protocol):
    """A tower that is asked for tokens alone, its final ones or those on the way there."""

    @property
    def digest(self) -> str:
        """sha256 of its weights."""
        ...

    @property
    def patch(self) -> int:
        """Side of a patch, in pixels."""
        ...

    @property
    def width(self) -> int:
        """D, channels of a token."""
        ...

    @property
    def depth(self) -> int:
        """How many blocks it has."""
        ...

    def prepare(self, image: UInt8Array, grid: Grid) -> Tensor:
        """Resize an RGB image (H0, W0, 3) to ``grid`` patches and normalise it: (3, H, W)."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Return the final tokens (B, N, D) float32 of (B, 3, H, W)."""
        ...

    def after(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Return the tokens after some blocks, counted from 1, and stop after the last of them.

        Args:
            images: (B, 3, H, W).
            blocks: In ascending order; after the last of all, and for numbers beyond it, they are
                the final tokens.

        Returns:
            (B, N, D) float32 for each.
        """
        ...

    def closer(self, images: Tensor, block: int, parts: int) -> Tensor:
        """Return the tokens after a block, each part of the images seen on its own.

        Args:
            images: (B, 3, H, W).
            block: As for ``after``.
            parts: How many, along each side.

        Returns:
            (B, h, w, D) float32.
        """
        ...


@dataclass(frozen=True)
class Towers:
    """The towers that look at an image.

    Attributes:
        clip: CLIP.
        others: Further ones, by their names.
    """

    clip: Backbone
    others: Mapping[str, TokenTower] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where they run."""
        return self.clip.device

    def prepare(
        self,
        image: UInt8Array,
        max_patches: int,
        grid: Grid | None = None,
        *,
        own_grids: bool = False,
    ) -> dict[str, Tensor]:
        """Bring an image (H0, W0, 3) to what each tower looks at, by its name: (3, H, W).

        Args:
            image: The image.
            max_patches: As for ``Backbone.grid``.
            grid: The (h, w) patches, if not those that suit its size.
            own_grids: Whether towers beside CLIP see it at the size that CLIP does, in as many
                patches of theirs as fit, rather than in CLIP's patches.
        """
        height, width = grid or self.clip.grid((image.shape[0], image.shape[1]), max_patches)
        others = {}
        for name, tower in self.others.items():
            side = tower.patch if own_grids else self.clip.patch
            there = (height * self.clip.patch // side, width * self.clip.patch // side)
            others[name] = tower.prepare(image, there)
        return {CLIP: self.clip.prepare(image, max_patches, (height, width)), **others}

    def width(self, name: str) -> int:
        """Return D, the channels of a tower's tokens."""
        return len(self.clip.visual.proj) if name == CLIP else self.others[name].width
