"""Class-aware attention-based affinity, CAA (paper section 3.3).

The attention A of a frozen ViT says which patches belong together. Made doubly stochastic and
symmetric it is a random walk T that spreads an activation map over its object, from sources inside
the boxes around the map's strong parts: refined = T^t (box * map). Neither T nor its powers are
built: Sinkhorn normalisation is kept as a scaling of A's rows and columns, and all that is left are
products of A with the K maps. Shapes: N = h*w patches.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from clipes.config import CamParams
from clipes.maps.gradcam import min_max
from clipes.types import Float32Array, UInt8Array


@dataclass(frozen=True)
class Walk:
    """The walk matrix T = (D + D^T) / 2 with D = diag(rows) A diag(columns), never built.

    Attributes:
        attention: (N, N) A.
        rows: (N,) row scaling.
        columns: (N,) column scaling.
    """

    attention: Tensor
    rows: Tensor
    columns: Tensor

    def step(self, maps: Tensor) -> Tensor:
        """Return T applied to the columns of ``maps`` (N, K)."""
        rows, columns = self.rows[:, None], self.columns[:, None]
        forward = rows * (self.attention @ (columns * maps))
        return (forward + columns * (self.attention.T @ (rows * maps))) / 2


def sinkhorn(attention: Tensor, iterations: int) -> Walk:
    """Scale A towards doubly stochastic: columns first, then rows, ``iterations`` times.

    Args:
        attention: (N, N), positive.
        iterations: How many rounds; the rows sum to 1 after the last.
    """
    rows = torch.ones_like(attention[:, 0])
    columns = rows
    for _ in range(iterations):
        columns = 1 / (attention.T @ rows)
        rows = 1 / (attention @ columns)
    return Walk(attention, rows, columns)


def box_mask(cam: Float32Array, threshold: float, *, last_row_in_box: bool = True) -> UInt8Array:
    """Union of the bounding boxes of a map's strong parts.

    Args:
        cam: (h, w) in [0, 1].
        threshold: lambda, the share of the maximum above which a patch is strong.
        last_row_in_box: False repeats the reference: its boxes end before the last row, column.

    Returns:
        (h, w) uint8, 1 inside.
    """
    height, width = cam.shape
    levels = (cam * 255).astype(np.uint8)
    strong = (levels > int(threshold * levels.max())).astype(np.uint8)
    contours, _ = cv2.findContours(strong, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    mask: UInt8Array = np.zeros_like(levels)
    bottom, right = (height, width) if last_row_in_box else (height - 1, width - 1)
    for contour in contours:
        x, y, box_width, box_height = cv2.boundingRect(contour)
        mask[y : min(y + box_height, bottom), x : min(x + box_width, right)] = 1
    return mask


@torch.inference_mode()
def refine(attention: Tensor, cams: Float32Array, params: CamParams) -> Float32Array:
    """Spread activation maps over their objects.

    Args:
        attention: (N, N) mean attention of the last blocks.
        cams: (K, h, w) float32 in [0, 1].
        params: Settings.

    Returns:
        (K, h, w) float32 in [0, 1].
    """
    walk = sinkhorn(attention.float(), params.sinkhorn_iterations)
    return min_max(propagate(walk, cams, params, params.walk_power))


def propagate(walk: Walk, cams: Float32Array, params: CamParams, power: int) -> Float32Array:
    """Return T^power (box * cam) for each of (K, h, w) maps, before scaling."""
    boxes = np.stack(
        [
            box_mask(cam, params.box_threshold, last_row_in_box=params.last_row_in_box)
            for cam in cams
        ]
    )
    sources = torch.from_numpy((cams * boxes).reshape(len(cams), -1).T.copy())
    spread = sources.to(walk.attention.device)
    for _ in range(power):
        spread = walk.step(spread)
    refined: Float32Array = spread.T.cpu().numpy().reshape(cams.shape)
    return refined
