"""Which classes an image shows, from CLIP alone: zero-shot tags for images without labels.

The image feature of CLIP-ES is a mean over all patches, and loses what is small. Here each patch is
scored: the last block's values, mixed by how alike the keys of two patches are instead of by its
own attention (as in SCLIP, arXiv:2312.01597), without the residual path and the MLP (as in
ClearCLIP, arXiv:2407.12442), which blur what a patch shows. On voc_sample this beat the tower's own
output, values without attention, query-query and value-value attention; ``benchmarks/tagging.py``
measures it.
Shapes as in ``clipes.towers.taps``; C classes, B background words, E the width of the features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clipes.config import TagParams
from clipes.maps.patches import in_joint_space
from clipes.towers.clip import Backbone
from clipes.towers.taps import LastInput
from clipes.types import Float32Array


@torch.inference_mode()
def key_key_features(backbone: Backbone, last: LastInput) -> Tensor:
    """Return what each patch shows, in the space of the text features: (N, E) unit rows."""
    key, value = last.key[:, 1:], last.value[:, 1:]
    return in_joint_space(backbone, backbone.mix_patches(key, key, value))


@torch.inference_mode()
def class_scores(
    backbone: Backbone, last: LastInput, text: Tensor, background: Tensor, params: TagParams
) -> Float32Array:
    """Score every class of a vocabulary in one image.

    Args:
        backbone: The tower ``last`` came from.
        last: One image.
        text: (C, E) unit text features of the classes.
        background: (B, E) unit text features of the background words.
        params: Settings.

    Returns:
        (C,) float32 in [0, 1]: the mean probability, among all classes and background words, over
        the patches that show the class best.
    """
    cosines = key_key_features(backbone, last) @ torch.cat([text, background]).T
    probabilities = (backbone.logit_scale * cosines).softmax(-1)[:, : len(text)]
    best = max(1, int(params.patch_share * len(probabilities)))
    scores: Float32Array = probabilities.topk(best, dim=0).values.mean(0).float().cpu().numpy()
    return scores


def choose_tags(scores: Float32Array, threshold: float) -> tuple[int, ...]:
    """Return the classes whose score reaches ``threshold``, the best first.

    >>> choose_tags(np.array([0.2, 0.5, 0.9], np.float32), 0.4)
    (2, 1)
    """
    order = np.argsort(-scores, kind="stable")
    return tuple(int(k) for k in order if scores[k] >= threshold)
