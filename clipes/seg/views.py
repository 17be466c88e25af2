"""What square views are cut into: the patches of a ViT-B/16, whose grid decoders count on."""

from __future__ import annotations

from clipes.errors import UsageError

PATCH = 16
"""Pixels of the image along each side of one of CLIP's patches."""

LONGEST = 4
"""Times its shorter side that an image is long at most: longer ones are shrunk for training, and
squeezed in prediction."""


def require_whole_patches(side: int) -> None:
    """Refuse views of a side, in pixels, that is no multiple of ``PATCH``; 0 is no view.

    Raises:
        UsageError: It is none.
    """
    if side % PATCH:
        raise UsageError(
            f"views of {side} pixels are not of whole patches",
            f"choose a --crop that {PATCH} divides",
        )


def require_patches(patch: int, preset: str) -> None:
    """Refuse a CLIP of other patches, whose side is ``patch`` pixels, for a preset of views.

    Raises:
        UsageError: It is one.
    """
    if patch != PATCH:
        raise UsageError(
            f"preset {preset} learns from views in patches of {PATCH} pixels, this CLIP has "
            f"patches of {patch}",
            "give the weights of a ViT-B/16 (--weights), or take preset frozen",
        )
