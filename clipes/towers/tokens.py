"""Tokens of frozen towers by name, for whatever is trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

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
