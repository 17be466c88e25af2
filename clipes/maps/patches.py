"""Activation maps from patches themselves: no gradient, one pass (not in the paper).

The last block of CLIP mixes patches so that one vector describes the image. Leaving out that mixing
(MaskCLIP, arXiv:2112.01071), or mixing only patches that are alike (SCLIP, arXiv:2312.01597), and
leaving out residual path and MLP (ClearCLIP, arXiv:2407.12442), each patch can be compared with the
words. Shapes as in ``clipes.towers.taps``; K classes present, B background words, E the width of
the joint space.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from clipes.config import PatchParams
from clipes.maps.gradcam import min_max
from clipes.towers.clip import Backbone
from clipes.towers.taps import Grid, LastInput
from clipes.types import Float32Array

_LEAST = 1e-6  # probability: a word that fits nowhere must not veto what a patch looks like


@torch.inference_mode()
def patch_features(backbone: Backbone, last: LastInput) -> tuple[Tensor, Tensor]:
    """Return what each patch shows, in the space of the text features, two ways.

    Args:
        backbone: The tower ``last`` came from.
        last: Of one image, or of a batch.

    Returns:
        (..., N, E) unit rows of each patch's own value, and of values mixed among patches whose
        queries, or keys, are alike. The first is sharper, the second covers objects better.
    """
    key, value = last.key[..., 1:, :], last.value[..., 1:, :]
    alike = [backbone.mix_patches(part, part, value) for part in (last.query, key)]
    own = value.transpose(-3, -2).flatten(-2)
    mixed = (alike[0] + alike[1]) / 2
    return in_joint_space(backbone, own), in_joint_space(backbone, mixed)


def in_joint_space(backbone: Backbone, mixed: Tensor) -> Tensor:
    """Bring (..., D) values of the last block to the space of the text features: unit rows."""
    out = backbone.blocks[-1].attn.out_proj
    output = backbone.linear(mixed, out.weight, out.bias)
    return F.normalize((backbone.visual.ln_post(output) @ backbone.visual.proj).float(), dim=-1)


@torch.inference_mode()
def compare(
    features: tuple[Tensor, Tensor],
    text: Tensor,
    background: Tensor,
    grid: Grid,
    temperature: float,
) -> tuple[Float32Array, Tensor]:
    """Compare every patch with the classes present and the background words.

    Args:
        features: What each patch shows, two ways: (N, E) each.
        text: (K, E) unit text features of the classes present; or (K, S, E), where the largest of
            S scores of a patch is a class's.
        background: (B, E) unit text features of the background words.
        grid: (h, w) of the patches.
        temperature: Factor on the cosines.

    Returns:
        ``sources`` (K, h, w) and ``log_words`` (1 + K, N) of ``PatchEvidence``.
    """
    words = torch.cat([text.flatten(0, -2), background]).float()
    first, second = (
        _of_classes(temperature * (words @ part.T), text).softmax(0) for part in features
    )
    maps = torch.stack([first[: len(text)], second[: len(text)]]).unflatten(2, grid).cpu().numpy()
    mean = (first + second) / 2
    nothing = mean[len(text) :].sum(0, keepdim=True)
    log_words = (torch.cat([nothing, mean[: len(text)]]) + _LEAST).log()
    return min_max(min_max(maps[0]) + min_max(maps[1])), log_words


def _of_classes(scores: Tensor, text: Tensor) -> Tensor:
    """Return the scores (K + B, N) of classes and background words.

    Args:
        scores: (K + B, N), or (K * S + B, N), of which the largest of S is a class's.
        text: (K, E), or (K, S, E).
    """
    if text.ndim == 2:
        return scores
    several = scores[: len(text) * text.shape[1]]
    largest = several.unflatten(0, text.shape[:2]).amax(1)
    return torch.cat([largest, scores[len(several) :]])


def strong_patches(maps: Float32Array, patches: PatchParams) -> list[np.ndarray]:
    """Return which patches show the background and each class beyond doubt.

    Args:
        maps: (K, h, w) first maps.
        patches: Settings.

    Returns:
        1 + K masks (N,), background first; none overlap.
    """
    flat = maps.reshape(len(maps), -1)
    best, winner = flat.max(0), flat.argmax(0)
    classes = [(winner == k) & (best > patches.strong) for k in range(len(flat))]
    return [best < patches.weak, *classes]
