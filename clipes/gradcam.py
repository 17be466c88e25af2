"""Softmax-GradCAM of all classes of an image from one forward pass (paper section 3.1).

The score of class k is its softmax probability among the classes present and the background words.
Its gradient at the output of ``ln_1`` of the last block, averaged over the patches, weighs that
layer's channels. The gradient has a closed form through the block, and because only its *sum over
patches* is asked for, no per-token gradient of query, key or value is ever built; see
``_attention_sums``. Shapes as in ``clipes.clip.backbone``; K classes, B background words, E the
width of the features.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from clipes.clip.backbone import Backbone, Encoding, LastBlock, Normalised
from clipes.types import Float32Array

EPSILON = 1e-7
"""Added to the maximum of a map before dividing by it, as in the reference."""

_CLASSES_AT_ONCE = 8  # bounds memory: each class holds a few (N, 4D) arrays


def class_probabilities(
    feature: Tensor, text: Tensor, background: Tensor, logit_scale: float
) -> Tensor:
    """Softmax over the classes present and the background words.

    Args:
        feature: (E,) image feature, any length.
        text: (K, E) unit text features of the classes present.
        background: (B, E) unit text features of the background words.
        logit_scale: Factor on the cosines.

    Returns:
        (K + B,) probabilities, classes first.
    """
    unit = feature / feature.norm()
    logits: Tensor = logit_scale * (torch.cat([text, background]) @ unit)
    return logits.softmax(0)


@torch.inference_mode()
def softmax_gradcam(
    backbone: Backbone, encoding: Encoding, text: Tensor, background: Tensor
) -> Float32Array:
    """Activation map of every class present.

    Args:
        backbone: The tower ``encoding`` came from.
        encoding: One image.
        text: (K, E) unit text features of the classes present.
        background: (B, E) unit text features of the background words.

    Returns:
        (K, h, w) float32 in [0, 1].
    """
    weights = channel_weights(backbone, encoding.last, text, background)
    raw = (weights @ encoding.last.activations.T).unflatten(-1, encoding.grid)
    maps: Float32Array = raw.float().cpu().numpy()
    # The reference scales twice; the second pass moves values by about EPSILON.
    return min_max(min_max(np.maximum(maps, 0)))


def min_max(maps: Float32Array) -> Float32Array:
    """Scale each of (K, h, w) maps to [0, 1]: subtract its minimum, divide by its maximum.

    A constant map becomes 0.
    """
    shifted = maps - maps.min((1, 2), keepdims=True)
    scaled: Float32Array = shifted / (np.float32(EPSILON) + shifted.max((1, 2), keepdims=True))
    return scaled


@torch.inference_mode()
def channel_weights(
    backbone: Backbone, last: LastBlock, text: Tensor, background: Tensor
) -> Tensor:
    """Gradient of each class probability at ``ln_1``'s output, mean over patches: (K, D)."""
    pooled = _head_gradients(backbone, last, text, background)
    chunks = pooled.split(_CLASSES_AT_ONCE)
    return torch.cat([_through_last_block(backbone, last, chunk) for chunk in chunks])


def _head_gradients(
    backbone: Backbone, last: LastBlock, text: Tensor, background: Tensor
) -> Tensor:
    """Gradient of each class probability at the pooled tokens: (K, D)."""
    probs = class_probabilities(last.feature, text, background, backbone.logit_scale)
    average = probs @ torch.cat([text, background])
    at_unit = backbone.logit_scale * probs[: len(text), None] * (text - average)
    norm = last.feature.norm()
    unit = last.feature / norm
    at_feature = (at_unit - (at_unit @ unit)[:, None] * unit) / norm
    at_pooled: Tensor = at_feature @ backbone.visual.proj.T
    return at_pooled


def _through_last_block(backbone: Backbone, last: LastBlock, pooled: Tensor) -> Tensor:
    """Carry (K, D) gradients at the pooled tokens back to channel weights (K, D)."""
    block = backbone.blocks[-1]
    patches = len(last.activations)
    at_norm = (pooled / patches * backbone.visual.ln_post.weight)[:, None]
    at_output = _layer_norm_gradient(last.ln_post, at_norm)
    linear = backbone.linear
    at_act = linear(at_output, block.mlp.c_proj.weight.T, None)
    at_hidden = at_act * _slope(block.mlp.gelu, last.hidden)
    at_ln_2 = linear(at_hidden, block.mlp.c_fc.weight.T, None) * block.ln_2.weight
    at_residual = at_output + _layer_norm_gradient(last.ln_2, at_ln_2)
    at_out = linear(at_residual, block.attn.out_proj.weight.T, None)
    at_mixed = at_out.unflatten(-1, (len(last.key), -1))
    sums = _attention_sums(last, at_mixed.transpose(1, 2))
    weights: Tensor = sums @ block.attn.in_proj_weight / patches
    return weights


def _layer_norm_gradient(norm: Normalised, gradient: Tensor) -> Tensor:
    """Gradient at a LayerNorm's input from the one at its unit output: (K, N or 1, D)."""
    along = (gradient * norm.unit).mean(-1, keepdim=True)
    return norm.inverse_std * (gradient - gradient.mean(-1, keepdim=True) - norm.unit * along)


def _attention_sums(last: LastBlock, at_mixed: Tensor) -> Tensor:
    """Sum over patches of the gradients at query, key and value: (K, 3D).

    With P the attention, G the gradient at its output (K, H, N, d) and c_i = G_i . mixed_i, the
    gradient at the scores is S_ij = P_ij (G_i . V_j - c_i). Wanted are only sums over patches:

    - value: each patch gives away all its attention but CLS's share: sum_i (1 - P_i,CLS) G_i;
    - query: sum_i sum_j S_ij K_j needs the column sums of S, which are (P^T G)_j . V_j - (P^T c)_j;
    - key: the rows of S sum to zero, so over the patch columns they sum to -S_i,CLS.
    """
    scale = last.query.shape[-1] ** -0.5
    to_cls = last.attention[:, :, 0]  # (H, N)
    along = (at_mixed * last.mixed).sum(-1)  # c: (K, H, N)
    attention_t = last.attention.transpose(-1, -2)
    columns = ((attention_t @ at_mixed) * last.value).sum(-1)
    columns = columns - (attention_t @ along[..., None]).squeeze(-1)  # (K, H, T)
    at_cls = to_cls * ((at_mixed @ last.value[:, 0, :, None]).squeeze(-1) - along)
    query = scale * (columns[:, :, None] @ last.key).squeeze(2)
    key = -scale * (at_cls[:, :, None] @ last.query).squeeze(2)
    value = ((1 - to_cls)[None, :, None] @ at_mixed).squeeze(2)
    return torch.cat([query.flatten(1), key.flatten(1), value.flatten(1)], -1)


def _slope(activation: nn.Module, x: Tensor) -> Tensor:
    """Derivative of the MLP's activation function at ``x``."""
    if isinstance(activation, QuickGELU):
        gate = torch.sigmoid(1.702 * x)
        return gate * (1 + 1.702 * x * (1 - gate))
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
