"""A decoder on frozen tokens, asked about whole images: at several scales, mirrored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from clipes.config import CamParams, PatchParams
from clipes.errors import ArtifactError
from clipes.maps.affinity import Walk, blend, likeness, sinkhorn
from clipes.maps.finer import finer
from clipes.seg.frozen import FrozenDecoder, flat_tokens
from clipes.seg.recipes import ModelPredictor, Spec, TestSettings
from clipes.seg.resize import resize
from clipes.seg.weakclip import WeakClip
from clipes.towers.side_by_side import CLIP
from clipes.towers.tokens import ATTENTION, TokenSource, closer_name
from clipes.types import Float32Array, UInt8Array

_LIKENESS = 0.5  # weight of the other towers' likeness beside CLIP's attention


class TokenPredictor(ModelPredictor[FrozenDecoder | WeakClip]):
    """Turns images into probabilities of labels; see ``LabelPredictor``.

    The towers shrink large images, so there is no window.

    Args:
        model: The decoder; put into evaluation mode.
        settings: Scales, mirroring.
        source: The towers.

    Raises:
        ArtifactError: The decoder was trained on other towers.
    """

    def __init__(
        self, model: FrozenDecoder | WeakClip, settings: TestSettings, source: TokenSource
    ) -> None:
        check_towers(model.spec, source)
        super().__init__(model, settings)
        self._source = source
        self._spreads, self._finer = False, 1.0
        if isinstance(model, FrozenDecoder):
            self._spreads, self._finer = model.spec.spread, model.spec.finer

    @torch.inference_mode()
    def __call__(self, image: UInt8Array) -> Float32Array:
        """Return (1 + C, H, W) float32 that sum to 1, background first.

        Args:
            image: (H, W, 3) RGB uint8.
        """
        size = (image.shape[0], image.shape[1])
        total = torch.zeros(1, self.labels, *size, device=self._device)
        count = 0
        for scale in self._settings.scales:
            total += self._probs(image, scale)
            count += 1
            if self._settings.flip:
                total += self._probs(np.ascontiguousarray(image[:, ::-1]), scale).flip(3)
                count += 1
        probs: Float32Array = total.div_(count)[0].cpu().numpy()
        return probs

    def _probs(self, image: UInt8Array, scale: float) -> torch.Tensor:
        """Return the probabilities (1, 1 + C, H, W) of an image seen at a scale."""
        found = self._source.tokens(image, scale, attention=self._spreads, closer=self._finer)
        grid, tokens = flat_tokens(found, self._model.spec)
        # As in training, where they come from files.
        rounded = [one.half().to(self._device) for one in tokens]
        logits = self._model(torch.tensor([grid], device=self._device), *rounded)[0].float()
        size = (image.shape[0], image.shape[1])
        if not self._spreads:
            return resize(logits, size).softmax(1)
        probs = logits.softmax(1)[0].flatten(1).T
        reached = _walk(found).step(probs.to(found[ATTENTION].device)).to(self._device)
        reached /= reached.sum(1, keepdim=True)  # a walk that is symmetric does so only nearly
        return resize(_brought_closer(reached, grid, found)[None], size)


def _brought_closer(
    probs: torch.Tensor, grid: tuple[int, int], found: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return (L, h', w') of (N, L) on the grid of a closer look, or on ``grid`` without one."""
    for name, tokens in _others(found).items():
        if (fine := found.get(closer_name(name.split(".")[0]))) is not None:
            seen, close = (one.to(probs.device) for one in (tokens.flatten(0, 1), fine))
            return finer(probs, grid, seen, close, PatchParams.likeness_temperature)
    coarse: torch.Tensor = probs.T.unflatten(1, grid)
    return coarse


def _others(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the final tokens (h, w, D) of the towers beside CLIP, by name."""
    towers = {name: name.split(".")[0] for name in found}
    return {
        name: found[name]
        for name, tower in towers.items()
        if tower != CLIP and name != closer_name(tower)
    }


def _walk(found: Mapping[str, torch.Tensor]) -> Walk:
    """Return how answers spread over an image: as its maps do in the last round of preset default.

    What the towers hold for one thing gets one answer, and a label that a few patches alone are
    taken for is outvoted.

    Args:
        found: Tokens (h, w, D) by name, CLIP's attention among them.
    """
    alike = _others(found)
    affinities = [(found[ATTENTION].flatten(0, 1), 1 - _LIKENESS if alike else 1.0)]
    for one in alike.values():
        likely = likeness(one.flatten(0, 1), PatchParams.likeness_temperature)
        affinities.append((likely, _LIKENESS / len(alike)))
    return sinkhorn(blend(affinities), CamParams.sinkhorn_iterations)


def check_towers(spec: Spec, source: TokenSource) -> None:
    """Refuse towers other than those that a model was trained on.

    Raises:
        ArtifactError: One has other weights.
    """
    for name, sha256 in spec.towers().items():
        found = source.digests.get(name, "")
        if found != sha256:
            raise ArtifactError(
                f"the segmenter was trained on a tower {name} of sha256 {sha256[:12]}, not "
                f"{found[:12] or 'none'}",
                "give the weights that it was trained on",
            )
