"""A second opinion on maps: what the same looks like in other images (not in the paper).

The mean of a class is drawn by every image, also by one whose words went astray: if they call the
water around a boat a boat, then so does what boats look like, and the map stays wrong and sure of
it. The nearest regions of other images are asked one by one instead, and most of them are right. As
evidence everywhere they are no better than the means; but where they say that a class is elsewhere
than its map, the map is hardly ever right, and their own takes its place.

Shapes as in ``clipes.towers.taps``; C classes of the vocabulary, K of them in an image; R regions
of all images together, D channels of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from clipes.config import NeighbourParams
from clipes.kernels.choose import products
from clipes.masks.values import value_count, value_of
from clipes.types import BoolArray, Float32Array

_ROUNDS_OF_MEANS = 6  # of k-means, which has long settled then
_CONTRAST = 3  # power of maps and background, which brings a share near 0 or 1
_LEAST = 1e-4  # of a vote: no neighbour must not mean impossible
_FLOOR = 0.02  # of the mean vote, likewise
_TOP = 5  # patches that say how sure neighbours are of a class anywhere


@dataclass(frozen=True)
class Regions:
    """Parts of images, each of patches that look alike.

    Attributes:
        centres: (R, D) float16 unit rows.
        shares: (R, 1 + C) float16, how much of each is background and of each class.
        owners: (R,) of the images' ids, as text.
    """

    centres: Tensor
    shares: Tensor
    owners: tuple[str, ...]

    @classmethod
    def joined(cls, parts: Sequence[Regions]) -> Regions:
        """Return the regions of some images together, at least one."""
        owners = tuple(owner for part in parts for owner in part.owners)
        centres = torch.cat([part.centres for part in parts])
        return cls(centres, torch.cat([part.shares for part in parts]), owners)


def regions_of(
    owner: str,
    tokens: Tensor,
    maps: Float32Array,
    labels: Sequence[int],
    classes: int,
    params: NeighbourParams,
) -> Regions:
    """Divide an image into regions, of which its maps say what they show.

    Args:
        owner: Its id.
        tokens: (N, D) float32 of its patches.
        maps: (K, h, w) of its classes in [0, 1].
        labels: (K,) 0-based, in the order of the maps.
        classes: C.
        params: Says how many regions.
    """
    parts = _shares(torch.from_numpy(maps).to(tokens.device).flatten(1))
    rows = (0, *map(value_of, labels))
    return regions_showing(owner, tokens, dict(zip(rows, parts, strict=True)), classes, params)


@torch.inference_mode()
def regions_showing(
    owner: str,
    tokens: Tensor,
    shown: Mapping[int, Tensor],
    classes: int,
    params: NeighbourParams,
) -> Regions:
    """Divide an image into regions by k-means on its tokens.

    Args:
        owner: Its id.
        tokens: (N, D) float32 of its patches.
        shown: (N,) float32 in [0, 1] by mask value, how much of each patch shows it.
        classes: C.
        params: Says how many regions.
    """
    rows = F.normalize(tokens, dim=-1)
    starts = torch.linspace(0, len(rows) - 1, min(params.regions, len(rows)), device=rows.device)
    centres = rows[starts.long()]
    for _ in range(_ROUNDS_OF_MEANS):
        nearest = (rows @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        centres = F.normalize(sums, dim=-1)
    nearest = (rows @ centres.T).argmax(1)
    found = torch.stack([*shown.values()], 1)
    sums = rows.new_zeros(len(centres), found.shape[1]).index_add_(0, nearest, found)
    counts = torch.bincount(nearest, minlength=len(centres))
    shares = rows.new_zeros(len(centres), value_count(classes))
    shares[:, [*shown]] = sums / counts.clamp(min=1)[:, None]
    there = counts > 0
    half = centres[there].half().cpu(), shares[there].half().cpu()
    return Regions(*half, (owner,) * int(there.sum()))


def _shares(maps: Tensor) -> Tensor:
    """Return (1 + K, N) shares of background and classes for (K, N) maps."""
    parts = torch.cat([1 - maps.amax(0, keepdim=True), maps]) ** _CONTRAST
    return parts / parts.sum(0, keepdim=True)


class Neighbours:
    """The regions of a run's images, to be asked by one of them.

    Args:
        regions: Of all images, also of those that ask.
        device: Where the tokens of those that ask are.
        params: Settings.
    """

    def __init__(self, regions: Regions, device: torch.device, params: NeighbourParams) -> None:
        self._params = params
        self._centres = regions.centres.to(device).float()
        self._shares = regions.shares.to(device).float()
        names = {owner: number for number, owner in enumerate(dict.fromkeys(regions.owners))}
        self._numbers = names
        numbers = [names[owner] for owner in regions.owners]
        self._owners = torch.tensor(numbers, dtype=torch.long, device=device)
        images = self._shares.new_zeros(len(names), self._shares.shape[1])
        # How many images show a class: its share is exactly 0 in all regions of the others.
        self._shows = images.index_add_(0, self._owners, self._shares) > 0

    @torch.inference_mode()
    def votes(self, owner: str, tokens: Tensor, labels: Sequence[int]) -> Tensor:
        """Return what the nearest regions of other images show, patch by patch.

        Only regions that show, by more than half, the background or a class of the image are asked;
        what is rarer among them counts more.

        Args:
            owner: The image that asks.
            tokens: (N, D) float32 of its patches.
            labels: (K,) 0-based.

        Returns:
            (1 + K, N) probabilities of the background and of each class.
        """
        params, rows = self._params, [0, *map(value_of, labels)]
        asked = self._shares[:, rows].sum(1) > 0.5
        asked &= self._owners != self._numbers.get(owner, -1)
        centres, shares = self._centres[asked], self._shares[asked][:, rows]
        if not len(centres):
            return tokens.new_full((len(rows), len(tokens)), 1 / len(rows))
        alike, which = products(F.normalize(tokens, dim=-1), centres).topk(
            min(params.neighbours, len(centres)), dim=1
        )
        weights = ((alike - 1) / params.temperature).softmax(1)
        found = torch.einsum("nr,nrk->nk", weights, shares[which])
        common = (shares.sum(0) / shares.sum()).clamp(min=1e-3)
        found = found / common**params.balance
        found = found + _FLOOR * found.mean() + _LEAST
        return (found / found.sum(1, keepdim=True)).T

    def contradict(
        self, owner: str, strong: Sequence[BoolArray], votes: Tensor, labels: Sequence[int]
    ) -> list[int]:
        """Return which classes neighbours see little of where their maps are strong, but see.

        Args:
            owner: The image.
            strong: (N,) for each of its K classes.
            votes: (1 + K, N), see ``votes``.
            labels: (K,) 0-based.

        Returns:
            Indices into the labels; never of a class that too few other images show.
        """
        params, found = self._params, []
        for k, (label, here) in enumerate(zip(labels, strong, strict=True)):
            vote = votes[value_of(k)].cpu().numpy()
            peak = float(np.sort(vote)[-_TOP:].mean())
            sees = peak > params.sure and self._others(owner, label) >= params.least_images
            if sees and here.any() and float(vote[here].mean()) < params.doubted * peak:
                found.append(k)
        return found

    def _others(self, owner: str, label: int) -> int:
        """Return how many other images show a class."""
        shows = self._shows[:, value_of(label)]
        own = self._numbers.get(owner)
        return int(shows.sum()) - (own is not None and bool(shows[own]))
