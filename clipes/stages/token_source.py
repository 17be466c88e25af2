"""The frozen towers that a segmenter reads, loaded by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from clipes.choices import Normalise
from clipes.config import IMAGENET_MEAN, IMAGENET_STD
from clipes.listener import Listener
from clipes.seg.frozen import FrozenSpec
from clipes.seg.recipes import Spec
from clipes.seg.weakclip import WeakClipSpec
from clipes.seg.weclip import LARGEST_SCALE, WeClipSpec
from clipes.seg.weclip_plus import WeClipPlusSpec
from clipes.stages.setup import OpenedWeights, load_dino, open_weights
from clipes.towers.side_by_side import CLIP, DINO, Towers
from clipes.towers.tokens import TokenSource, TowerTokens
from clipes.weights import DEFAULT_MODEL


@dataclass(frozen=True)
class TowerRequest:
    """Where the weights of frozen towers come from.

    Attributes:
        weights: CLIP's: ``--weights``.
        dino: DINOv2's: ``--dino``.
    """

    weights: str = "auto"
    dino: str = "auto"


def open_clip(
    normalise: str, request: TowerRequest, device: str, listener: Listener
) -> OpenedWeights:
    """Read CLIP's weights, to be run on colours that are normalised as asked.

    Args:
        normalise: Of ``clipes.choices.Normalise``.
        request: Where the weights come from.
        device: ``auto`` or a torch device.
        listener: Told what is used.

    Raises:
        WeightsError: Weights cannot be had, or are of no such tower.
    """
    opened = open_weights(request.weights, DEFAULT_MODEL, device, listener)
    if normalise == Normalise.clip:
        return opened
    recipe = replace(opened.weights.recipe, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return replace(opened, weights=replace(opened.weights, recipe=recipe))


def open_tokens(
    names: Sequence[str],
    max_patches: int,
    request: TowerRequest,
    device: str,
    listener: Listener,
    *,
    otherwise: str = "",
) -> TokenSource:
    """Load the towers of some tokens.

    Args:
        names: Such as ``clip.4`` and ``dino.12``.
        max_patches: Larger images are shrunk to at most this many patches.
        request: Where the weights come from.
        device: ``auto`` or a torch device.
        listener: Told what is used.
        otherwise: As for ``load_dino``.

    Raises:
        WeightsError: Weights cannot be had, or are of no such tower.
    """
    opened = open_clip(Normalise.clip, request, device, listener)
    return tokens_with(opened, names, max_patches, request, device, listener, otherwise=otherwise)


def tokens_with(
    opened: OpenedWeights,
    names: Sequence[str],
    max_patches: int,
    request: TowerRequest,
    device: str,
    listener: Listener,
    *,
    otherwise: str = "",
) -> TowerTokens:
    """Load the towers of some tokens beside a CLIP that is read already; see ``open_tokens``.

    Args:
        opened: CLIP's weights.
        names: As for ``open_tokens``.
        max_patches: Likewise.
        request: Likewise.
        device: Likewise.
        listener: Likewise.
        otherwise: Likewise.

    Raises:
        WeightsError: The other tower's weights cannot be had.
    """
    digests = {CLIP: opened.weights.sha256}
    towers = Towers(opened.backbone(fp16_positions=False))
    if any(name.split(".")[0] == DINO for name in names):
        dino = load_dino(request.dino, device, listener, otherwise=otherwise)
        towers = Towers(towers.clip, {DINO: dino})
        digests[DINO] = dino.digest
    return TowerTokens(towers, names, digests, max_patches)


def tokens_of(
    spec: Spec, request: TowerRequest, device: str, listener: Listener
) -> TokenSource | None:
    """Return the towers that a trained segmenter reads; None if it reads none.

    Args:
        spec: What a checkpoint says of it.
        request: As for ``open_tokens``.
        device: Likewise.
        listener: Likewise.
    """
    if isinstance(spec, WeClipSpec):
        opened = open_clip(spec.normalise, request, device, listener)
        towers = Towers(opened.backbone(fp16_positions=True))
        digests = {CLIP: opened.weights.sha256}
        most = _largest_grid(spec.side, towers)
        return TowerTokens(towers, spec.inputs, digests, most, raw=True)
    if isinstance(spec, WeClipPlusSpec):
        opened = open_clip(spec.normalise, request, device, listener)
        dino = load_dino(request.dino, device, listener)
        towers = Towers(opened.backbone(fp16_positions=True), {DINO: dino})
        digests = {CLIP: opened.weights.sha256, DINO: dino.digest}
        most = _largest_grid(spec.side, towers)
        return TowerTokens(towers, spec.inputs, digests, most, raw=True, own_grids=True)
    if not isinstance(spec, FrozenSpec | WeakClipSpec):
        return None
    colours = spec.normalise if isinstance(spec, WeakClipSpec) else Normalise.clip
    opened = open_clip(colours, request, device, listener)
    names = [one.name for one in spec.inputs]
    return tokens_with(opened, names, spec.max_patches, request, device, listener)


def _largest_grid(side: int, towers: Towers) -> int:
    """Return the patches of a square image of ``side`` pixels at the largest scale of WeCLIP."""
    return int(LARGEST_SCALE * side / towers.clip.patch) ** 2
