"""From a state dict to towers: CLIP's two as open_clip's public modules, DINOv2 as timm's."""

from __future__ import annotations

from collections.abc import Mapping

import timm.models.vision_transformer as timm_vit
import torch
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from torch import Tensor, nn

from clipes.errors import WeightsError

_HEAD_WIDTH = 64  # channels per head of OpenAI's towers, and of most of open_clip's


def load_visual(
    state: Mapping[str, Tensor], *, quick_gelu: bool = True, head_width: int = _HEAD_WIDTH
) -> VisionTransformer:
    """Build the image tower.

    Args:
        state: Tensors by name, ``visual.*`` among them.
        quick_gelu: OpenAI's activation function; most towers trained by others use GELU.
        head_width: Channels of an attention head; the weights' shapes do not say it.

    Raises:
        WeightsError: The tensors are not those of a CLIP ViT.
    """
    tower = {key[len("visual.") :]: value for key, value in state.items() if key[:7] == "visual."}
    try:
        width, _, patch, _ = tower["conv1.weight"].shape
        side = round((len(tower["positional_embedding"]) - 1) ** 0.5)
        output_dim = tower["proj"].shape[1]
        hidden = len(tower["transformer.resblocks.0.mlp.c_fc.weight"])
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(
            f"the weights hold no CLIP ViT image tower ({type(error).__name__}: {error})",
            "give OpenAI's ViT-B/16 or another open_clip ViT",
        ) from error
    if width % head_width:
        raise WeightsError(f"an image tower of width {width} has no heads of width {head_width}")
    with torch.device("meta"):
        visual = VisionTransformer(
            image_size=side * patch,
            patch_size=patch,
            width=width,
            layers=_depth(tower),
            heads=width // head_width,
            mlp_ratio=hidden / width,
            output_dim=output_dim,
            act_layer=QuickGELU if quick_gelu else nn.GELU,
        )
    _assign(visual, tower, "image")
    return visual.eval()


def load_text(state: Mapping[str, Tensor], *, quick_gelu: bool = True) -> TextTransformer:
    """Build the text tower; arguments and errors as for ``load_visual``."""
    tower = {
        key: value
        for key, value in state.items()
        if not key.startswith("visual.") and key.split(".")[0] not in ("logit_scale", "logit_bias")
    }
    try:
        context, width = tower["positional_embedding"].shape
        words = len(tower["token_embedding.weight"])
        output_dim = tower["text_projection"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(
            f"the weights hold no CLIP text tower ({type(error).__name__}: {error})",
            "give --text-features, or weights with a text tower",
        ) from error
    text = TextTransformer(
        context_length=context,
        vocab_size=words,
        width=width,
        heads=width // _HEAD_WIDTH,
        layers=_depth(tower),
        output_dim=output_dim,
        act_layer=QuickGELU if quick_gelu else nn.GELU,
    )
    _assign(text, tower, "text")
    return text.eval()


def load_dinov2(state: Mapping[str, Tensor]) -> timm_vit.VisionTransformer:
    """Build DINOv2; its sizes follow from the tensors.

    Args:
        state: Tensors by timm's names. Heads are 64 wide, or one where the width is no multiple.

    Raises:
        WeightsError: The tensors are not those of a DINOv2 with a plain ViT.
    """
    try:
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        hidden = len(state["blocks.0.mlp.fc1.weight"])
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(
            f"the weights hold no DINOv2 ({type(error).__name__}: {error})",
            "give Meta's or timm's DINOv2 ViT-S/14",
        ) from error
    with torch.device("meta"):
        module = timm_vit.VisionTransformer(
            img_size=side * patch,
            patch_size=patch,
            num_classes=0,
            embed_dim=width,
            depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
            num_heads=1 if width % _HEAD_WIDTH else width // _HEAD_WIDTH,
            mlp_ratio=hidden / width,
            init_values=1.0,  # asks for layer scale; its values are in the state
        )
    _assign(module, state, "DINOv2")
    return module.eval()


def has_text(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict holds a text tower."""
    return "token_embedding.weight" in state


def _depth(tower: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[2] for key in tower if key.startswith("transformer.resblocks.")})


def _assign(module: nn.Module, tower: Mapping[str, Tensor], name: str) -> None:
    try:
        module.load_state_dict(dict(tower), assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1] if "\n" in str(error) else str(error)
        raise WeightsError(f"the {name} tower does not fit a CLIP ViT: {first.strip()}") from error
