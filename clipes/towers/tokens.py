"""Tokens of frozen towers by name, for whatever is trained on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from clipes.config import BOTH_TOWERS, CamParams
from clipes.errors import UsageError
from clipes.towers.side_by_side import CLIP, Towers
from clipes.towers.taps import Taps, finer_grid
from clipes.types import UInt8Array

JOINT, GLOBAL = "clip.joint", "clip.global"
"""Names of tokens in the space that images and words share: patches, and the image as a whole."""

ATTENTION = "clip.attention"
"""Name of what a patch attends to: a number for each patch, the mean over CLIP's last blocks."""


def closer_names(tower: str) -> tuple[str, str]:
    """Return the names of what a tower sees half way up, on the grid and on a finer one."""
    return f"{tower}.near", f"{tower}.closer"


class TokenSource(Protocol):
    """Frozen towers that see an image on one grid of h x w patches.

    Tokens have names such as ``clip.4`` (of CLIP, after block 4) and ``dino.12``. ``clip.joint``
    are CLIP's in the space that images and words share, ``clip.global`` is the whole image there,
    ``clip.attention`` are rows of as many numbers as there are patches.
    """

    @property
    def widths(self) -> Mapping[str, int]:
        """Channels of the tokens, by name."""

    @property
    def digests(self) -> Mapping[str, str]:
        """The sha256 of the towers' weights, by the name of the tower."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Digests of all that changes tokens, by their name: weights, how images are seen."""

    def tokens(
        self,
        image: UInt8Array,
        scale: float = 1.0,
        *,
        attention: bool = False,
        closer: float = 1.0,
    ) -> dict[str, Tensor]:
        """Return (h, w, D) float32 of RGB (H, W, 3) uint8, by name; large images are shrunk.

        What stands for the whole image is (1, 1, D).

        Args:
            image: The image.
            scale: Factor of its size at which it is looked at, once it is shrunk.
            attention: Whether ``clip.attention`` is wanted, too.
            closer: With more than 1, the towers beside CLIP look again, on a grid whose sides have
                so many times as many patches: ``closer_names`` of the tower, (h, w, D) and
                (h', w', D) after the block ``BOTH_TOWERS.finer_block``.
        """


class TowerTokens:
    """Tokens by name of towers side by side; see ``TokenSource``.

    ``clip.N`` are CLIP's after block N, but of the last block but one they are what the last block
    attends with (after its ``ln_1``), unless they are wanted raw. Those of other towers are their
    final ones.

    Args:
        towers: The towers.
        names: The tokens that are wanted.
        digests: sha256 of the towers' weights, by the name of the tower.
        max_patches: Larger images are shrunk to at most this many patches.
        raw: Take the tokens of the last block but one as it leaves them, too.
        own_grids: Whether towers beside CLIP have a grid of their own; see ``Towers.prepare``.
        attention: How many of the last blocks' attention is meant by ``clip.attention``.

    Raises:
        UsageError: A tower has no such tokens.
    """

    def __init__(
        self,
        towers: Towers,
        names: Sequence[str],
        digests: Mapping[str, str],
        max_patches: int,
        *,
        raw: bool = False,
        own_grids: bool = False,
        attention: int = CamParams.affinity_blocks,
    ) -> None:
        self._towers = towers
        self._names = tuple(names)
        self._max_patches = max_patches
        self._raw = raw
        self._own_grids = own_grids
        self.digests = digests
        depth = towers.clip.depth
        blocks = {
            name: depth if name in (JOINT, GLOBAL) else int(name.split(".")[1])
            for name in names
            if name.split(".")[0] == CLIP
        }
        if wrong := [name for name, block in blocks.items() if not 1 <= block <= depth]:
            raise UsageError(
                f"a CLIP of {depth} blocks has no tokens {wrong[0]}",
                "give the weights of a ViT-B",
            )
        inputs = depth - 1
        self._after = {name: block for name, block in blocks.items() if raw or block != inputs}
        self._taps = Taps(
            tokens=tuple(sorted(set(self._after.values()))),
            last="inputs" if inputs in blocks.values() and not raw else "",
        )
        self._attending = tuple(range(max(1, depth - attention + 1), depth + 1))

    @property
    def patch(self) -> int:
        """Side of CLIP's patches, in pixels."""
        return self._towers.clip.patch

    @property
    def widths(self) -> Mapping[str, int]:
        """Channels of the tokens, by name."""
        return {name: self._width(name) for name in self._names}

    def _width(self, name: str) -> int:
        visual, tower = self._towers.clip.visual, name.split(".")[0]
        if tower != CLIP:
            return self._towers.others[tower].width
        return int(visual.proj.shape[1]) if name in (JOINT, GLOBAL) else len(visual.class_embedding)

    @cached_property  # asked of every image
    def fingerprints(self) -> Mapping[str, str]:
        """Digests of all that changes tokens, by their name, whatever others are asked for."""
        return {name: self._fingerprint(name) for name in self._names}

    def _fingerprint(self, name: str) -> str:
        tower, clip = name.split(".")[0], self._towers.clip
        grid = [self._max_patches, clip.patch]  # CLIP's, also of other towers
        seen: list[object] = [clip.colours, self._raw] if tower == CLIP else [self._own_grids]
        changing = [name, self.digests[tower], *grid, *seen]
        return hashlib.sha256(json.dumps(changing).encode()).hexdigest()

    @torch.inference_mode()
    def tokens(
        self,
        image: UInt8Array,
        scale: float = 1.0,
        *,
        attention: bool = False,
        closer: float = 1.0,
    ) -> dict[str, Tensor]:
        """Return (h, w, D) float32 of RGB (H, W, 3) uint8, by name; see ``TokenSource``."""
        pixels = self._towers.prepare(
            image, self._max_patches, self._grid(image, scale), own_grids=self._own_grids
        )
        prepared = {name: one[None] for name, one in pixels.items()}
        encoded = self.encode(prepared, attention=attention, near=closer > 1)
        found = {name: one[0] for name, one in encoded.items()}
        if closer > 1:
            height, width = (side // self._towers.clip.patch for side in pixels[CLIP].shape[1:])
            fine = finer_grid((height, width), closer)
            for name, tower in self._towers.others.items():
                far = tower.prepare(image, fine)[None]
                (seen,) = tower.closer(far, BOTH_TOWERS.finer_block, BOTH_TOWERS.finer_parts)
                found[closer_names(name)[1]] = seen
        return found

    def _grid(self, image: UInt8Array, scale: float) -> tuple[int, int] | None:
        """Return the grid at a scale; None for the one that an image has."""
        if scale == 1:
            return None
        size = (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
        return self._towers.clip.grid(size, max(1, round(self._max_patches * scale**2)))

    @torch.inference_mode()
    def encode(
        self, pixels: Mapping[str, Tensor], *, attention: bool = False, near: bool = False
    ) -> dict[str, Tensor]:
        """Return (B, h, w, D) float32 of images that are prepared, by name.

        Args:
            pixels: (B, 3, H, W) for each tower, as ``Towers.prepare`` makes them of an image.
            attention: Whether ``clip.attention`` is wanted, too.
            near: Whether that of other towers is, which a closer look is compared with: the first
                of ``closer_names``.
        """
        found: dict[str, Tensor] = {}
        taps = replace(self._taps, attention=self._attending) if attention else self._taps
        encoded = self._towers.clip.encode(pixels[CLIP], taps)
        if attention:
            found[ATTENTION] = encoded.attention
        for name in self._names:
            tower = name.split(".")[0]
            if tower != CLIP:
                found |= self._beside(tower, name, pixels[tower], near=near)
            elif name not in self._after:
                found[name] = encoded.last.activations
            elif name in (JOINT, GLOBAL):
                found[name] = self._projected(encoded.tokens[self._after[name]], name)
            else:
                found[name] = encoded.tokens[self._after[name]][:, 1:]
        grids: dict[str, tuple[int, ...]] = {GLOBAL: (1, 1)}
        for name in self._names:
            if (tower := name.split(".")[0]) != CLIP:
                side = self._towers.others[tower].patch
                own = tuple(length // side for length in pixels[tower].shape[2:])
                grids |= dict.fromkeys((name, closer_names(tower)[0]), own)
        return {
            name: one.float().unflatten(1, grids.get(name, encoded.grid))
            for name, one in found.items()
        }

    def _beside(self, tower: str, name: str, pixels: Tensor, *, near: bool) -> dict[str, Tensor]:
        """Return the final tokens (B, N, D) of a tower beside CLIP, and those half way up."""
        other = self._towers.others[tower]
        if not near:
            return {name: other.encode(pixels)}
        way, final = other.after(pixels, (BOTH_TOWERS.finer_block, other.depth))
        return {name: final, closer_names(tower)[0]: way}

    def _projected(self, tokens: Tensor, name: str) -> Tensor:
        """Return (B, N, E), or (B, 1, E) of CLS, of what the last block leaves: (B, T, D)."""
        visual = self._towers.clip.visual
        chosen = tokens[:, :1] if name == GLOBAL else tokens[:, 1:]
        projected: Tensor = visual.ln_post(chosen) @ visual.proj
        return projected
