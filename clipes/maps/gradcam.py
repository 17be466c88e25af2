"""Softmax-GradCAM of all classes of an image from one forward pass (paper section 3.1).

The score of class k is its softmax probability among the classes present and the background words.
Its gradient at the output of ``ln_1`` of the last block, averaged over the patches, weighs that
layer's channels. The gradient has a closed form through the block, and because only its *sum over
patches* is asked for, no per-token gradient of query, key or value is ever built; see
``clipes.maps.attention_gradient``. Shapes as in ``clipes.towers.taps``; K classes, B background
words, E the width of the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from clipes.maps.attention_gradient import sum_gradients
from clipes.towers.clip import Backbone
from clipes.towers.taps import Grid, LastBlock
from clipes.types import Float32Array

_CLASSES_AT_ONCE = 16  # more would only take memory: 2.4 MB each at 768 patches

EPSILON = 1e-7
"""Added to the maximum of a map before dividing by it, as in the reference."""


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


def best_described(text: Tensor, feature: Tensor) -> Tensor:
    """Return the one of S vectors of each class that an image scores highest: (K, E).

    The gradient of a maximum is that of what is largest, so that the others need none.

    Args:
        text: (K, S, E); (K, E) stays as it is.
        feature: (E,) image feature, any length.
    """
    if text.ndim == 2:
        return text
    best = (text @ feature).argmax(1)
    return text.take_along_dim(best[:, None, None], 1)[:, 0]


@torch.inference_mode()
def softmax_gradcam(
    backbone: Backbone, last: LastBlock, grid: Grid, text: Tensor, background: Tensor
) -> Float32Array:
    """Activation map of every class present.

    Args:
        backbone: The tower ``last`` came from.
        last: Of one image.
        grid: (h, w) of its patches.
        text: (K, E) unit text features of the classes present; or (K, S, E), where the largest of
            S scores of the image is a class's.
        background: (B, E) unit text features of the background words.

    Returns:
        (K, h, w) float32 in [0, 1].
    """
    text = best_described(text, last.feature)
    weights = channel_weights(backbone, last, text, background)
    raw = (weights @ last.activations.T).unflatten(-1, grid)
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
    some = pooled.split(_CLASSES_AT_ONCE)
    return torch.cat([_through_last_block(backbone, last, part) for part in some])


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


@dataclass(frozen=True)
class _Folded:
    """Products of the last block's weights that every gradient needs.

    With W1, W2 the MLP's matrices, g and b the weight and bias of ``ln_2``, and O the attention's
    output matrix, y = W x throughout:

    Attributes:
        to_mixed: (D, 4D), the way from the MLP's hidden units to the attention: (W1 g O)^T.
        to_hidden: (4D, D), W2^T.
        past: (D, D), O^T.
        mean: (4D,), the mean over channels of W1 g.
        offset: (4D,), W1 b + bias: what the hidden units hold when ``ln_2``'s unit output is zero.
        ones: (D,), channel sums of O.
    """

    to_mixed: nn.Parameter
    to_hidden: nn.Parameter
    past: nn.Parameter
    mean: Tensor
    offset: Tensor
    ones: Tensor


@lru_cache(maxsize=2)
@torch.inference_mode()
def _folded(block: ResidualAttentionBlock) -> _Folded:
    def kept(weight: Tensor) -> nn.Parameter:
        # Linear layers pack parameters once, and other tensors each time.
        return nn.Parameter(weight.contiguous(), requires_grad=False)

    hidden, norm, out = block.mlp.c_fc, block.ln_2, block.attn.out_proj.weight
    scaled = hidden.weight * norm.weight
    return _Folded(
        to_mixed=kept((scaled @ out).T),
        to_hidden=kept(block.mlp.c_proj.weight.T),
        past=kept(out.T),
        mean=scaled.mean(1),
        offset=hidden.weight @ norm.bias + hidden.bias,
        ones=out.sum(0),
    )


def _through_last_block(backbone: Backbone, last: LastBlock, pooled: Tensor) -> Tensor:
    """Carry (K, D) gradients at the pooled tokens back to channel weights (K, D).

    The gradient at a LayerNorm's input is r (v - mean(v) - x mean(v x)), with x its unit output, r
    the reciprocal deviation and v the gradient at x. What comes from the pooled tokens is, but for
    a factor per token and class, the same for all tokens; so of the matrix products on the way to
    the attention, one per class is left and one for all.
    """
    block, linear = backbone.blocks[-1], backbone.linear
    folded = _folded(block)
    patches, width = last.activations.shape
    out, second = block.attn.out_proj.weight, block.mlp.c_proj.weight

    # At the block's output: r_post (centred_k - unit_post along_k).
    at_norm = pooled / patches * backbone.visual.ln_post.weight
    centred = at_norm - at_norm.mean(-1, keepdim=True)
    along = last.ln_post.unit @ at_norm.T / width  # (N, K)

    # What the classes share. Reciprocal deviations of both norms go with the slope.
    direct, common = centred @ second, linear(last.ln_post.unit, folded.to_hidden, None)
    slope = last.slope * (last.ln_post.inverse_std * last.ln_2.inverse_std)
    from_unit = last.hidden - folded.offset  # W1 g applied to ln_2's unit output
    unit_out = linear(last.ln_2.unit, folded.past, None) / width
    past, common_past = (
        centred @ out,
        linear(last.ln_post.unit * last.ln_post.inverse_std, folded.past, None),
    )

    at_mixed = last.activations.new_empty(len(pooled), patches, width)
    for k in range(len(pooled)):
        at_hidden = torch.addcmul(direct[k], along[:, k, None], common, value=-1).mul_(slope)
        along_unit, along_mean = torch.linalg.vecdot(at_hidden, from_unit), at_hidden @ folded.mean
        # Through ln_2 and carried on to the attention's output at once, then past the MLP.
        product = linear(at_hidden, folded.to_mixed, None)
        torch.addcmul(product, along_unit[:, None], unit_out, value=-1, out=at_mixed[k])
        at_mixed[k].addcmul_(along[:, k, None], common_past, value=-1)
        at_mixed[k].addr_(along_mean, folded.ones, alpha=-1)
        at_mixed[k].addr_(last.ln_post.inverse_std[:, 0], past[k])
    parts = (last.attention, last.query, last.key, last.value, last.mixed)
    sums = sum_gradients(*parts, at_mixed, backbone.exact)
    weights: Tensor = sums @ block.attn.in_proj_weight / patches
    return weights
