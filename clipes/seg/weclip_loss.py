"""What WeCLIP and WeCLIP+ learn by: halves of pixels, or of pairs of patches, count the same."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clipes.seg.resize import resize
from clipes.types import IGNORE

AFFINITY_WEIGHT = 0.1
"""Of the affinity's loss beside that of the labels."""

MUTUAL_WEIGHT = 0.1
"""Of what each tower learns of the other in WeCLIP+."""

_DICE_EPSILON = 1e-7

RADIUS = 8
"""Patches, along either side, within which two belong together or not."""


def weclip_loss(logits: Tensor, affinity: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a batch, a mean over it: ().

    Args:
        logits: (B, 1 + C, h, w).
        affinity: (B, N, N) in [0, 1], N = h * w.
        labels: (B, H, W) int64, 0 background, 1..C classes.
    """
    enlarged = resize(logits.float(), (labels.shape[1], labels.shape[2]))
    target = affinity_target(labels, (logits.shape[2], logits.shape[3]))
    return balanced_cross_entropy(enlarged, labels) + AFFINITY_WEIGHT * affinity_loss(
        affinity, target
    )


def weclip_plus_loss(
    clip: Tensor, dino: Tensor, affinity: Tensor, cams: Tensor, labels: Tensor
) -> Tensor:
    """Return WeCLIP+'s loss of a batch, a mean over it: ().

    Both towers' answers learn the labels, together, and each learns the other's, by a tenth.

    Args:
        clip: (B, 1 + C, h, w) logits of CLIP's tokens.
        dino: Likewise of DINOv2's.
        affinity: As for ``weclip_loss``.
        cams: (B, H, W) int64, labels of CLIP's maps, which the affinity learns.
        labels: (B, H, W) int64, those that the answers learn.
    """
    size = (labels.shape[1], labels.shape[2])
    both = [resize(one.float(), size) for one in (clip, dino)]
    mean = (both[0] + both[1]) / 2
    mutual = sum(balanced_cross_entropy(one, other.argmax(1)) for one, other in (both, both[::-1]))
    target = affinity_target(cams, (clip.shape[2], clip.shape[3]))
    return (
        balanced_cross_entropy(mean, labels)
        + dice_loss(mean, labels)
        + AFFINITY_WEIGHT * affinity_loss(affinity, target)
        + MUTUAL_WEIGHT * mutual
    )


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 less the mean over labels of Dice's coefficient, of sums over the batch: ().

    A label that no pixel has counts, too: its coefficient is 0 however little is taken for it.

    Args:
        logits: (B, 1 + C, H, W) float32.
        labels: (B, H, W) int64.
    """
    probs = logits.softmax(1)
    flat, right = labels.flatten(), probs.gather(1, labels[:, None]).flatten()
    common = probs.new_zeros(logits.shape[1]).scatter_add(0, flat, right)
    total = probs.sum((0, 2, 3)) + flat.bincount(minlength=logits.shape[1])
    return 1 - (2 * common / (total + _DICE_EPSILON)).mean()


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return half the mean over the background's pixels and half that over all others: ().

    The published code divides 0 by 0 where a batch has none of either; here that half is 0.

    Args:
        logits: (B, 1 + C, H, W) float32.
        labels: (B, H, W) int64, 0 background, 1..C classes.
    """
    costs = functional.cross_entropy(logits, labels, reduction="none")
    background = labels == 0
    halves = [
        costs[chosen].sum() / chosen.sum().clamp(min=1) for chosen in (background, ~background)
    ]
    return 0.5 * torch.stack(halves).sum()


def affinity_target(labels: Tensor, grid: tuple[int, int], radius: int = RADIUS) -> Tensor:
    """Return which patches have the same label: (B, N, N) int64, N = h * w.

    1 for the same, a patch with itself included, 0 for another, ``IGNORE`` where the two are more
    than ``radius`` rows or columns apart.

    Args:
        labels: (B, H, W) int64; a patch has the label of its top left pixel.
        grid: (h, w).
        radius: In patches.
    """
    small = functional.interpolate(labels[:, None].float(), size=grid, mode="nearest").flatten(1)
    same = (small[:, :, None] == small[:, None, :]).long()
    height, width = grid
    rows = torch.arange(height, device=labels.device).repeat_interleave(width)
    columns = torch.arange(width, device=labels.device).repeat(height)
    distance = torch.maximum(_apart(rows), _apart(columns))
    return same.masked_fill(distance > radius, IGNORE)


def affinity_loss(affinity: Tensor, target: Tensor) -> Tensor:
    """Return half the mean of 1 - P over pairs that are alike, half that of P over the others: ().

    Args:
        affinity: (B, N, N) P, in [0, 1].
        target: As from ``affinity_target``.
    """
    alike, unlike = target == 1, target == 0
    affinity = affinity.float()
    missed = (1 - affinity[alike]).sum() / (alike.sum() + 1)
    mistaken = affinity[unlike].sum() / (unlike.sum() + 1)
    return 0.5 * (missed + mistaken)


def _apart(positions: Tensor) -> Tensor:
    return (positions[:, None] - positions[None, :]).abs()
