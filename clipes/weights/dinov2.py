"""DINOv2's tensors: timm's key names, which are Meta's, with every shape checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial

import torch

from clipes.errors import WeightsError
from clipes.weights.shapes import Refusal, checked, dims, linear_shapes, norm_shapes

_TABLE = "onnx::Reshape_"  # the exporter's name for the patches' position embedding
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def normalise_dinov2(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Return a DINOv2's tensors under timm's names.

    Args:
        tensors: The tensors of a file by name: timm's, Meta's, or those of an ONNX export.
        where: What to call the file in messages.

    Returns:
        ``cls_token`` (1, 1, D), ``pos_embed`` (1, 1 + S*S, D), the class token's first,
        ``patch_embed.proj.weight`` (D, 3, P, P), ``blocks.*`` and ``norm.*``, in the types they
        have.

    Raises:
        WeightsError: It is not a DINOv2 with a plain ViT (registers and SwiGLU are not supported),
            or tensors are missing or of the wrong shape.
    """
    refuse = partial(_refusal, where)
    state = {
        key.removeprefix("module.").removeprefix("model."): value for key, value in tensors.items()
    }
    if "pos_embed" not in state:
        state |= _exported_positions(state)
    shapes = _shapes(state, refuse)
    # Meta's mask_token is of use in training only; anything inside would change the result.
    inside = ("blocks.", "norm.", "patch_embed.", "reg")
    extra = [key for key in state if key.startswith(inside) and key not in shapes]
    if extra:
        raise refuse(f"{extra[0]} is not part of a plain DINOv2")
    return checked(state, shapes, refuse)


def _refusal(where: str, reason: str) -> WeightsError:
    return WeightsError(
        f"{where} is not a supported DINOv2: {reason}",
        "give Meta's or timm's file of a DINOv2 ViT without registers, or its ONNX export",
    )


def _exported_positions(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the position embedding of an ONNX export, if that is what ``state`` is of.

    The exporter keeps the patches' part under a name of its own. It merged the class token's with
    the class token, because they are equal: they are only ever added, and trained alike.
    """
    cls = state.get("cls_token")
    tables = [value for key, value in state.items() if key.startswith(_TABLE) and value.ndim == 3]
    if cls is None or len(tables) != 1 or cls.shape != (1, 1, tables[0].shape[2]):
        return {}
    return {"pos_embed": torch.cat([cls, tables[0]], 1)}


def _shapes(state: Mapping[str, torch.Tensor], refuse: Refusal) -> dict[str, tuple[int, ...]]:
    """Return the shape every tensor must have, by the tower's free dimensions."""
    width, _, patch, _ = dims(state, "patch_embed.proj.weight", 4, refuse)
    tokens = dims(state, "pos_embed", 3, refuse)[1]
    side = math.isqrt(max(tokens - 1, 0))
    if side == 0 or side * side + 1 != tokens:
        raise refuse(f"pos_embed is of {tokens} tokens, not of a class and a square of patches")
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **norm_shapes("norm", width),
    }
    depth = len({match.group(1) for key in state if (match := _BLOCK.match(key))})
    for i in range(max(depth, 1)):
        block = f"blocks.{i}."
        hidden = dims(state, f"{block}mlp.fc1.weight", 2, refuse)[0]
        shapes |= {
            **norm_shapes(f"{block}norm1", width),
            **linear_shapes(f"{block}attn.qkv", width, 3 * width),
            **linear_shapes(f"{block}attn.proj", width, width),
            f"{block}ls1.gamma": (width,),
            **norm_shapes(f"{block}norm2", width),
            **linear_shapes(f"{block}mlp.fc1", width, hidden),
            **linear_shapes(f"{block}mlp.fc2", hidden, width),
            f"{block}ls2.gamma": (width,),
        }
    return shapes
