"""Pictures of a training: what was seen, what was learnt of it and what was answered, in rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from clipes.disk.images import voc_palette
from clipes.types import UInt8Array

SHOWN = 2
"""Images of a batch in a picture."""


def row(labels: Sequence[Tensor], *pictures: UInt8Array) -> UInt8Array:
    """Return pictures (H, W, 3) and labels (H, W), in VOC's colours, side by side."""
    coloured: list[UInt8Array] = [voc_palette()[one.cpu().numpy()] for one in labels]
    return np.concatenate([*pictures, *coloured], axis=1)


def below_each_other(rows: Sequence[UInt8Array]) -> UInt8Array:
    """Return pictures (h, w, 3) as one, padded with black."""
    widest = max(one.shape[1] for one in rows)
    padded = [np.pad(one, ((0, 0), (0, widest - one.shape[1]), (0, 0))) for one in rows]
    return np.concatenate(padded)
