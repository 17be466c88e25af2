"""WeCLIP's refinement of the attention by a learnt affinity (RFM): blocks chosen, then weighed.

Shapes: M blocks, N patches; A their attention, P the affinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-5  # added to the number of blocks kept, as published


def refined_attention(attention: Tensor, affinity: Tensor, *, absolute: bool) -> Tensor:
    """Return the mean attention of the blocks that are kept, times P: (N, N).

    Args:
        attention: (M, N, N), none negative.
        affinity: (N, N) in [0, 1].
        absolute: See ``kept_blocks``.
    """
    kept = kept_blocks(attention, affinity, absolute=absolute)
    return attention[kept].sum(0) / (kept.sum() + _EPSILON) * affinity


def kept_blocks(attention: Tensor, affinity: Tensor, *, absolute: bool) -> Tensor:
    """Return which blocks differ from P by no more than the mean over blocks: (M,) bool.

    Args:
        attention: (M, N, N).
        affinity: (N, N).
        absolute: The difference is the sum of |P - A|, as the paper has it. The published code sums
            P - A: the sum of P is all blocks' own and decides nothing, so that those are kept whose
            patches look least at CLS, whatever has been learnt.
    """
    if absolute:
        difference = torch.stack([(affinity - one).abs().sum() for one in attention.double()])
    else:
        difference = -attention.double().sum((1, 2))
    # Rounding may put the mean of equal numbers below all of them.
    return difference <= torch.maximum(difference.mean(), difference.min())
