"""One layout for CLIP's tensors: OpenAI's key names, with every shape checked.

Understood are OpenAI's names (which open_clip shares), the same with the text tower under ``text.``
(open_clip's custom models), and Hugging Face's ``vision_model`` / ``text_model``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch

from clipes.errors import WeightsError
from clipes.weights.shapes import Refusal, checked, dims, linear_shapes, norm_shapes

LOGIT_SCALE = math.log(100.0)
"""Natural logarithm of the scale at which OpenAI clips it in training; ViT-B/16 ends there."""

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")

# Hugging Face's names, rewritten from top to bottom.
_HUGGING_FACE = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_projection.weight", "text_projection"),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)


def normalise(tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Return CLIP's tensors under OpenAI's names, whichever supported names they come with.

    Args:
        tensors: The tensors of a file by name.
        where: What to call the file in messages.

    Returns:
        The whole image tower (``visual.*``), ``logit_scale`` (), and, if there is one of OpenAI's
        kind, the whole text tower (``token_embedding.weight`` and so on); in the types they have.
        A file without ``logit_scale`` gets OpenAI's, ln 100.

    Raises:
        WeightsError: It is not a CLIP with a ViT as image tower, or tensors are missing, of the
            wrong shape, or belong to a variation of the ViT that is not supported.
    """
    refuse = partial(_refusal, where)
    state = {key.removeprefix("module."): value for key, value in tensors.items()}
    if any(key.startswith("vision_model.") for key in state):
        state = _from_hugging_face(state)
    state = {re.sub(r"^text\.", "", key): value for key, value in state.items()}
    shapes = _visual_shapes(state, refuse)
    if "token_embedding.weight" in state:
        shapes |= _text_shapes(state, refuse)
    # Tensors beside the towers (masks, sizes) are no matter; inside they would change the result.
    inside = ("visual.", *(("transformer.",) if "token_embedding.weight" in state else ()))
    extra = [key for key in state if key.startswith(inside) and key not in shapes]
    if extra:
        raise refuse(f"{extra[0]} is not part of OpenAI's architecture")
    result = checked(state, shapes, refuse)
    scale = state.get("logit_scale", torch.tensor(LOGIT_SCALE))
    if scale.numel() != 1:
        raise refuse(f"logit_scale has {scale.numel()} values")
    result["logit_scale"] = scale.reshape(())
    return result


def _refusal(where: str, reason: str) -> WeightsError:
    return WeightsError(
        f"{where} is not a supported CLIP ViT: {reason}",
        "give OpenAI's, open_clip's or Hugging Face's file of a CLIP with a plain ViT",
    )


def _from_hugging_face(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename Hugging Face's keys, transpose the projections and stack q, k and v."""
    renamed = {}
    for name, tensor in state.items():
        key = name
        for theirs, ours in _HUGGING_FACE:
            key = key.replace(theirs, ours)
        renamed[key] = tensor.T if key in ("visual.proj", "text_projection") else tensor
    for query in [key for key in renamed if ".self_attn.q_proj." in key]:
        parts = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in renamed for part in parts):
            stacked = query.replace(".self_attn.q_proj.", ".attn.in_proj_")
            renamed[stacked] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def _visual_shapes(
    state: Mapping[str, torch.Tensor], refuse: Refusal
) -> dict[str, tuple[int, ...]]:
    """Return the shape every tensor of the image tower must have, by its free dimensions."""
    (width,) = dims(state, "visual.class_embedding", 1, refuse)
    patch = dims(state, "visual.conv1.weight", 4, refuse)[-1]
    tokens = dims(state, "visual.positional_embedding", 2, refuse)[0]
    embed = dims(state, "visual.proj", 2, refuse)[1]
    return {
        "visual.class_embedding": (width,),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.positional_embedding": (tokens, width),
        "visual.proj": (width, embed),
        **norm_shapes("visual.ln_pre", width),
        **norm_shapes("visual.ln_post", width),
        **_block_shapes(state, "visual.", width, refuse),
    }


def _text_shapes(state: Mapping[str, torch.Tensor], refuse: Refusal) -> dict[str, tuple[int, ...]]:
    """Return the shape every tensor of the text tower must have, by its free dimensions."""
    words, width = dims(state, "token_embedding.weight", 2, refuse)
    context = dims(state, "positional_embedding", 2, refuse)[0]
    return {
        "token_embedding.weight": (words, width),
        "positional_embedding": (context, width),
        "text_projection": (width, state["visual.proj"].shape[1]),
        **norm_shapes("ln_final", width),
        **_block_shapes(state, "", width, refuse),
    }


def _block_shapes(
    state: Mapping[str, torch.Tensor], tower: str, width: int, refuse: Refusal
) -> dict[str, tuple[int, ...]]:
    count = _count_blocks(key.removeprefix(tower) for key in state if key.startswith(tower))
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(max(count, 1)):
        block = f"{tower}transformer.resblocks.{i}."
        hidden = dims(state, f"{block}mlp.c_fc.weight", 2, refuse)[0]
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
            **linear_shapes(f"{block}attn.out_proj", width, width),
            **linear_shapes(f"{block}mlp.c_fc", width, hidden),
            **linear_shapes(f"{block}mlp.c_proj", hidden, width),
            **norm_shapes(f"{block}ln_1", width),
            **norm_shapes(f"{block}ln_2", width),
        }
    return shapes


def _count_blocks(keys: Iterable[str]) -> int:
    """Return the number of distinct blocks; a gap in the numbers shows as a missing tensor."""
    return len({match.group(1) for key in keys if (match := _BLOCK.match(key))})
