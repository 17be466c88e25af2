"""The gradient of self-attention at its queries, keys and values, summed over the patches.

With P the attention, G the gradient at its output (N, H, d) and c_i = G_i . mixed_i, the gradient
at the scores is S_ij = P_ij (G_i . V_j - c_i). Where only sums over patches are wanted, most of it
need not be built:

- value: each patch gives away all its attention but CLS's share: sum_i (1 - P_i,CLS) G_i;
- query: sum_i sum_j S_ij K_j needs the column sums of S, which are (P^T G)_j . V_j - (P^T c)_j;
- key: the rows of S sum to zero, so over the patch columns they sum to -S_i,CLS.

Shapes as in ``clipes.towers.taps``; K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipes.kernels.linear import Linear


def sum_gradients(
    attention: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    given: Tensor,
    linear: Linear,
) -> Tensor:
    """Return the sums at query, key and value, side by side: (K, 3D).

    Args:
        attention: (H, N, T), P.
        query: (H, N, d).
        key: (H, T, d), K.
        value: (H, T, d), V.
        mixed: (H, N, d), the attention times ``value``.
        given: (K, N, D) gradients at ``mixed``, G, heads side by side.
        linear: What multiplies matrices.
    """
    scale = value.shape[-1] ** -0.5
    by_head = given.unflatten(-1, (len(value), -1)).permute(2, 1, 0, 3)  # (H, N, K, d)
    along = (by_head * mixed[:, :, None]).sum(-1, keepdim=True)  # c, (H, N, K, 1)
    # One product with the attention for all classes, and for c beside G.
    both = torch.cat([by_head, along], -1).flatten(2)
    products = [linear(p.T, one.T, None) for p, one in zip(attention, both, strict=True)]
    received = torch.stack(products).unflatten(-1, (len(given), -1))
    g, c = received[..., :-1], received[..., -1]  # P^T G (H, T, K, d), P^T c (H, T, K)
    columns = (g * value[:, :, None]).sum(-1) - c
    at_cls = attention[:, :, :1] * (by_head @ value[:, None, 0, :, None] - along)[..., 0]
    at_query = scale * (columns.transpose(-1, -2) @ key)  # (H, K, d)
    at_key = -scale * (at_cls.transpose(-1, -2) @ query)
    at_value = by_head.sum(1) - g[:, 0]
    return torch.stack([at_query, at_key, at_value]).permute(2, 0, 1, 3).flatten(1)
