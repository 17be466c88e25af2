"""Synonym fusion below the prompt: several vectors, or several maps, of one class become one.

The paper (section 3.2) names sentence, feature and map level and uses the first, which is only a
matter of words (``clipes.words.vocabulary``). Fused maps are here, fused vectors in
``clipes.words.features``. Shapes as in ``clipes.maps.gradcam``; S synonyms of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from clipes.maps.gradcam import min_max
from clipes.types import Float32Array

MakeMaps: TypeAlias = Callable[[Tensor, Tensor], Float32Array]
"""``make(text (K, E), background (B, E)) -> (K, h, w)``, each map in [0, 1]."""


def fused_maps(
    maps: Float32Array,
    make: MakeMaps,
    text: Tensor,
    background: Tensor,
    synonyms: Sequence[Tensor],
    *,
    largest: bool = False,
) -> Float32Array:
    """Activation map of every class present, fused from one map per synonym.

    Each synonym has a softmax of its own, in which it takes the place of its class: against the
    background words and the other classes present, but not against the other synonyms of its class,
    because what they share would then count against them all. A class enters the softmax of the
    others with its one vector in ``text``, so that it weighs no more for having many synonyms. The
    maps are fused before the affinity, so that boxes are drawn and sources spread once for each
    class.

    Args:
        maps: (K, h, w), what ``make`` makes of ``text`` and ``background``.
        make: Makes the maps of some vectors in the image.
        text: (K, E) unit vectors, one for each class present.
        background: (B, E) unit vectors of the background words.
        synonyms: K tensors (S, E) of unit vectors; a class with one synonym keeps its map. Empty:
            all do.
        largest: Take the largest of the maps at each patch instead of their mean.

    Returns:
        (K, h, w) float32 in [0, 1].
    """
    result = maps.copy()
    for row, vectors in enumerate(synonyms):
        if len(vectors) == 1:
            continue
        rivals = torch.cat([text[:row], text[row + 1 :], background])
        each = np.concatenate([make(vector[None], rivals) for vector in vectors])
        fused = each.max(0, keepdims=True) if largest else each.mean(0, keepdims=True)
        result[row] = min_max(fused)[0]
    return result
