"""A decoder on frozen tokens, asked about whole images: at several scales, mirrored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from clipes.config import CamParams, PatchParams
from clipes.errors import ArtifactError
from clipes.maps.affinity import joint_walk
from clipes.maps.finer import finer
from clipes.seg.frozen import FrozenDecoder, flat_tokens
from clipes.seg.recipes import ModelPredictor, Spec, TestSettings
from clipes.seg.resize import resize
from clipes.seg.weakclip import WeakClip
from clipes.towers.tokens import ATTENTION, TokenSource, closer_names
from clipes.types import Float32Array, UInt8Array

_LIKENESS = 0.5  # weight of the second tower's likeness beside CLIP's attention


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
        return resize(self._spread(probs, grid, found)[None].to(self._device), size)

    def _spread(
        self, probs: torch.Tensor, grid: tuple[int, int], found: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Spread answers over an image as preset default does its maps in the last round.

        What the towers hold for one thing gets one answer, and a label that a few patches alone are
        taken for is outvoted.

        Args:
            probs: (N, L).
            grid: (h, w).
            found: What the towers say, (h, w, D) by name, CLIP's attention among it.

        Returns:
            (L, h', w'), on the grid of a closer look, or on ``grid`` without one.
        """
        other, temperature = self._second(found), PatchParams.likeness_temperature
        attention, iterations = found[ATTENTION].flatten(0, 1), CamParams.sinkhorn_iterations
        walk = joint_walk(attention, other, _LIKENESS, temperature, iterations)
        reached = walk.step(probs.to(walk.device))
        reached /= reached.sum(1, keepdim=True)  # a walk that is symmetric does so only nearly
        near, closer = closer_names(PatchParams.likeness_of)
        if closer in found:
            seen = found[near].flatten(0, 1), found[closer]
            return finer(reached, grid, *seen, PatchParams.finer_temperature)
        coarse: torch.Tensor = reached.T.unflatten(1, grid)
        return coarse

    def _second(self, found: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Return the (N, D) tokens that say which patches are alike; None without such a tower."""
        names = [one.name for one in self._model.spec.inputs]
        mine = [name for name in names if name.split(".")[0] == PatchParams.likeness_of]
        return found[mine[-1]].flatten(0, 1) if mine else None


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
