"""Tokens of frozen towers by name, for whatever is trained on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from clipes.errors import UsageError
from clipes.towers.side_by_side import CLIP, Towers
from clipes.towers.taps import Taps
from clipes.types import UInt8Array


class TokenSource(Protocol):
    """Frozen towers that see an image on one grid of h x w patches.

    Tokens have names such as ``clip.4`` (of CLIP, after block 4) and ``dino.12``.
    """

    @property
    def widths(self) -> Mapping[str, int]:
        """Channels of the tokens, by name."""

    @property
    def digests(self) -> Mapping[str, str]:
        """The sha256 of the towers' weights, by the name of the tower."""

    @property
    def fingerprint(self) -> str:
        """Digest of all that changes tokens: weights, names, how images are brought to size."""

    def tokens(self, image: UInt8Array) -> dict[str, Tensor]:
        """Return (h, w, D) float32 of RGB (H, W, 3) uint8, by name; large images are shrunk."""


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
    ) -> None:
        self._towers = towers
        self._names = tuple(names)
        self._max_patches = max_patches
        self.digests = digests
        blocks = {name: int(name.split(".")[1]) for name in names if name.split(".")[0] == CLIP}
        last = towers.clip.depth - 1
        if wrong := [name for name, block in blocks.items() if not 1 <= block <= last]:
            raise UsageError(
                f"a CLIP of {last + 1} blocks has no tokens {wrong[0]}",
                "give the weights of a ViT-B",
            )
        self._after = {name: block for name, block in blocks.items() if raw or block < last}
        self._taps = Taps(
            tokens=tuple(sorted(set(self._after.values()))),
            last="inputs" if last in blocks.values() and not raw else "",
        )

    @property
    def widths(self) -> Mapping[str, int]:
        """Channels of the tokens, by name."""
        clip, others = self._towers.clip, self._towers.others
        width = len(clip.visual.class_embedding)
        towers = {name: name.split(".")[0] for name in self._names}
        return {
            name: width if tower == CLIP else others[tower].width for name, tower in towers.items()
        }

    @property
    def fingerprint(self) -> str:
        """Digest of all that changes tokens."""
        changing = [sorted(self.digests.items()), self._names, self._max_patches]
        return hashlib.sha256(json.dumps(changing).encode()).hexdigest()

    @torch.inference_mode()
    def tokens(self, image: UInt8Array) -> dict[str, Tensor]:
        """Return (h, w, D) float32 of RGB (H, W, 3) uint8, by name; large images are shrunk."""
        pixels = {
            name: one[None] for name, one in self._towers.prepare(image, self._max_patches).items()
        }
        found: dict[str, Tensor] = {}
        encoded = self._towers.clip.encode(pixels[CLIP], self._taps)
        for name in self._names:
            tower = name.split(".")[0]
            if tower != CLIP:
                found[name] = self._towers.others[tower].encode(pixels[tower])[0]
            elif name in self._after:
                found[name] = encoded.tokens[self._after[name]][0, 1:]
            else:
                found[name] = encoded.last.activations[0]
        return {name: one.float().unflatten(0, encoded.grid) for name, one in found.items()}
