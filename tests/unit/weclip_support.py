"""What tests of WeCLIP and WeCLIP+ share: a small CLIP with words, images without masks, views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipes.maps.vectors import WordVectors
from clipes.seg.data import TrainingPair
from clipes.towers.clip import Backbone
from clipes.words.features import TextFeatures, unit_rows
from tests.unit.clip_support import small_backbone


def clip_and_words(classes: tuple[str, str, str]) -> tuple[Backbone, WordVectors]:
    """Return a tower of four blocks, and vectors of three classes and two background words."""
    rng = np.random.default_rng(0)
    vectors = (unit_rows(rng.normal(size=(count, 32)).astype(np.float32)) for count in (3, 2))
    text = TextFeatures(classes, ("sky", "grass"), *vectors, model="small")
    clip = small_backbone(4)
    return clip, WordVectors(text, clip.device, clip.visual.proj.dtype)


def unmasked_pairs(folder: Path) -> list[TrainingPair]:
    """Write images of three classes, without masks."""
    rng = np.random.default_rng(1)
    found = []
    for index, labels in enumerate([(0,), (2, 1), (1,)]):
        small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        path = folder / f"p{index}.png"
        Image.fromarray(small).resize((72, 60)).save(path)
        found.append(TrainingPair(f"p{index}", path, None, None, labels))
    return found


def views() -> torch.Tensor:
    """Return two views, (2, 3, 64, 64)."""
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
