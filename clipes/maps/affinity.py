"""Class-aware attention-based affinity, CAA (paper section 3.3).

The attention A of a frozen ViT says which patches belong together. Made doubly stochastic and
symmetric it is a random walk T that spreads an activation map over its object, from sources inside
the boxes around the map's strong parts: refined = T^t (box * map). Neither T nor its powers are
built: Sinkhorn normalisation is kept as a scaling of A's rows and columns, and all that is left are
products of A with the K maps. Shapes: N = h*w patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from clipes.config import CamParams
from clipes.kernels.choose import products
from clipes.maps.gradcam import min_max
from clipes.masks.mosaic import Tiles, Window
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

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.attention.device

    def step(self, maps: Tensor) -> Tensor:
        """Return T applied to the columns of ``maps`` (N, K)."""
        rows, columns = self.rows[:, None], self.columns[:, None]
        forward = rows * (self.attention @ (columns * maps))
        return (forward + columns * (self.attention.T @ (rows * maps))) / 2


@dataclass(frozen=True)
class TiledWalk:
    """A walk over a picture whose patches know of those of their tiles alone.

    Each step is a step in every tile, averaged where tiles overlap.

    Attributes:
        tiles: The tiles, in patches.
        of_tile: Makes the walk of a tile, by its number and its place; all at once would take
            memory.
        device: Where it is.
    """

    tiles: Tiles
    of_tile: Callable[[int, Window], Walk]
    device: torch.device

    def step(self, maps: Tensor) -> Tensor:
        """Return T applied to the columns of ``maps`` (N, K)."""
        height, width = self.tiles.rows[-1].stop, self.tiles.columns[-1].stop
        before = maps.view(height, width, -1)
        after = torch.zeros_like(before)
        for number, (tile, weight) in enumerate(zip(self.tiles, self.tiles.weights(), strict=True)):
            part = before[tile]
            walked = self.of_tile(number, tile).step(part.flatten(0, 1)).view_as(part)
            after[tile] += walked * torch.from_numpy(weight).to(self.device)[..., None]
        return after.view_as(maps)


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


def likeness(tokens: Tensor, temperature: float) -> Tensor:
    """Return how alike the patches are that a tower without a map of its own shows: (N, N).

    It is exp((cos - 1) / temperature) of (N, D) tokens, 1 for the same.
    """
    unit = F.normalize(tokens, dim=-1)
    return ((products(unit, unit) - 1) / temperature).exp_()


def blend(affinities: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return one affinity of several: the weighted geometric mean of their rows' shares.

    Two patches belong together as far as all towers say so; a walk that takes turns between the
    towers, an arithmetic mean, would go wherever one of them leads.

    Args:
        affinities: (N, N), none negative, each with its weight; the weights sum to 1.
    """
    (first, weight), *others = (pair for pair in affinities if pair[1])
    if not others:
        return first
    logs = weight * (first / first.sum(1, keepdim=True)).log()
    for affinity, weight in others:
        logs += weight * (affinity / affinity.sum(1, keepdim=True)).log()
    return logs.exp_()


def joint_walk(
    attention: Tensor, alike: Tensor | None, weight: float, temperature: float, iterations: int
) -> Walk:
    """Return the walk over what CLIP attends to and what another tower holds for the same.

    Args:
        attention: (N, N), positive.
        alike: (N, D) tokens of the other tower; None for CLIP's attention alone.
        weight: Of their likeness; the rest is CLIP's attention.
        temperature: As for ``likeness``.
        iterations: As for ``sinkhorn``.
    """
    affinities = [(attention, 1.0)]
    if alike is not None:
        affinities = [(attention, 1 - weight), (likeness(alike, temperature), weight)]
    return sinkhorn(blend(affinities), iterations)


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


def propagate(
    walk: Walk | TiledWalk, sources: Float32Array, params: CamParams, power: int
) -> Float32Array:
    """Spread activation maps over their objects and scale them to [0, 1]; see ``spread``."""
    return min_max(spread(walk, sources, params, power))


def spread(
    walk: Walk | TiledWalk, sources: Float32Array, params: CamParams, power: int
) -> Float32Array:
    """Spread activation maps over their objects: T^power (box * source).

    Args:
        walk: The affinity.
        sources: (K, h, w) float32 in [0, 1].
        params: Settings of the boxes.
        power: t.

    Returns:
        (K, h, w) float32, none negative.
    """
    return walked(walk, boxed(sources, params), power)


def boxed(sources: Float32Array, params: CamParams) -> Float32Array:
    """Return (K, h, w) maps within the boxes of their strong parts, 0 elsewhere."""
    boxes = [
        box_mask(source, params.box_threshold, last_row_in_box=params.last_row_in_box)
        for source in sources
    ]
    return sources * np.stack(boxes)


def walked(walk: Walk | TiledWalk, sources: Float32Array, power: int) -> Float32Array:
    """Return T^power applied to (K, h, w) maps, whatever is strong in them."""
    reached = torch.from_numpy(sources.reshape(len(sources), -1).T.copy()).to(walk.device)
    for _ in range(power):
        reached = walk.step(reached)
    found: Float32Array = reached.T.cpu().numpy().reshape(sources.shape)
    return found
