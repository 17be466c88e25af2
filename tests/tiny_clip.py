"""A CLIP of ViT-B/16's architecture that is small and has learnt nothing, with a text tower."""

from __future__ import annotations

import torch
from open_clip.model import CLIP


def tiny_clip() -> dict[str, torch.Tensor]:
    """Return its state dict: both towers of width 128 and 12 blocks, patches of 16 pixels.

    Norms and biases are not those of a fresh model either, so that leaving one out is seen.
    """
    torch.manual_seed(0)
    tower = {"width": 128, "layers": 12}
    model = CLIP(
        embed_dim=64,
        vision_cfg={**tower, "image_size": 224, "patch_size": 16, "head_width": 64},
        text_cfg={**tower, "context_length": 77, "vocab_size": 49408, "heads": 2},
        quick_gelu=True,
    )
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    for key, value in state.items():
        if key.endswith("bias"):
            value.normal_(0, 0.05)
        elif ".ln_" in key or key.startswith("ln_"):
            value.normal_(1, 0.2)
        elif key.startswith("visual.") and key.endswith("in_proj_weight"):
            value.mul_(2)  # attention that prefers some patches, as a trained one does
        elif key == "visual.positional_embedding":
            value.mul_(0.2)  # what a patch shows counts for more than where it is
    rounded = {key: value.half().float() for key, value in state.items()}  # as published
    return {**rounded, "logit_scale": torch.tensor(25.0).log()}
