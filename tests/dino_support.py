"""A DINOv2 so small that no test has to download one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from clipes.towers.dinov2 import DinoTower
from clipes.weights import DINOV2, Weights, cache
from clipes.weights.sources import get_model


def tiny_module(
    seed: int = 0, *, side: int = 4, depth: int = 2, width: int = 32
) -> VisionTransformer:
    """timm's own tower with random weights, a head of ``width`` channels and patches of 14."""
    torch.manual_seed(seed)
    module = VisionTransformer(
        img_size=14 * side,
        patch_size=14,
        embed_dim=width,
        depth=depth,
        num_heads=1,
        num_classes=0,
        init_values=1.0,
    )
    with torch.no_grad():
        for name, value in module.named_parameters():
            # Positions, norms and scales that are all alike would hide that they are mixed up.
            value.add_(torch.randn_like(value) * (0.5 if value.ndim == 1 else 0.1))
            if name == "cls_token":
                value.copy_(torch.randn_like(value))
    return module.eval().requires_grad_(False)


def tiny_dino(seed: int = 0, **sizes: int) -> DinoTower:
    """The tower of ``tiny_module``; its digest is told by the seed."""
    return DinoTower(tiny_module(seed, **sizes), digest=f"{seed:064x}")


def write_dino(path: Path, seed: int = 0, **sizes: int) -> Path:
    """Write the weights of ``tiny_module`` as a ``.safetensors`` file, as ``--dino`` takes it."""
    save_file(dict(tiny_module(seed, **sizes).state_dict()), path)
    return path


def cache_dino(seed: int = 0, folder: Path | None = None, **sizes: int) -> Weights:
    """Put the weights of ``tiny_module`` into the cache, where ``auto`` looks for Meta's.

    Args:
        seed: See ``tiny_dino``.
        folder: The cache; None for that of this process.
        sizes: See ``tiny_module``.
    """
    with pytest.MonkeyPatch.context() as patch:
        if folder is not None:
            patch.setenv("CLIPES_CACHE", str(folder))
        path = cache.path_of(DINOV2, "official", None)
        digest = f"{seed:064x}"
        weights = Weights("official", DINOV2, path, digest, False, get_model(DINOV2).recipe)
        with cache.workspace(None) as work:
            cache.save(tiny_module(seed, **sizes).state_dict(), weights, work)
    return weights
