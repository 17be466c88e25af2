"""A decoder on frozen tokens, asked about whole images: at several scales, mirrored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from clipes.config import BOTH_TOWERS, CamParams
from clipes.maps.affinity import Walk, joint_walk
from clipes.maps.finer import finer
from clipes.seg.frozen import FrozenDecoder, flat_tokens
from clipes.seg.recipes import ModelPredictor, Spec, TestSettings, other_tower
from clipes.seg.resize import resize
from clipes.seg.weakclip import WeakClip
from clipes.towers.tokens import ATTENTION, TokenSource, closer_names
from clipes.types import Float32Array, UInt8Array


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
        self._spreads, self._finer, self._power = False, 1.0, 1.0
        if isinstance(model, FrozenDecoder):
            self._spreads, self._finer = model.spec.spread, model.spec.finer
            self._power = model.spec.attention_power

    @torch.inference_mode()
    def __call__(self, image: UInt8Array, present: Sequence[int] | None = None) -> Float32Array:
        """Return (1 + C, H, W) float32 of RGB (H, W, 3) uint8; see ``LabelPredictor``."""
        size = (image.shape[0], image.shape[1])
        total = torch.zeros(1, self.labels, *size, device=self._device)
        count = 0
        for scale in self._settings.scales:
            total += self._probs(image, scale, present)
            count += 1
            if self._settings.flip:
                mirrored = np.ascontiguousarray(image[:, ::-1])
                total += self._probs(mirrored, scale, present).flip(3)
                count += 1
        probs: Float32Array = total.div_(count)[0].cpu().numpy()
        return probs

    def _probs(
        self, image: UInt8Array, scale: float, present: Sequence[int] | None
    ) -> torch.Tensor:
        """Return the probabilities (1, 1 + C, H, W) of an image seen at a scale."""
        found = self._source.tokens(image, scale, attention=self._spreads, closer=self._finer)
        grid, tokens = flat_tokens(found, self._model.spec)
        # As in training, where they come from files.
        rounded = [one.half().to(self._device) for one in tokens]
        logits = self._model(torch.tensor([grid], device=self._device), *rounded)[0]
        logits = self._allowed(logits.float(), present)
        size = (image.shape[0], image.shape[1])
        walk = self._walk(found) if self._spreads else None
        if isinstance(self._model, FrozenDecoder) and self._model.spec.adapts:
            # What the discriminant takes patches for, not the decoder: each corrects the other.
            assert self._model.discriminant is not None
            read, discriminant = self._model.read_linearly(rounded), self._model.discriminant
            alone = self._allowed(discriminant(read), present)
            taken = self._spread(alone.softmax(1), walk).to(self._device)
            logits = logits + discriminant.change(read, taken).T.unflatten(1, grid)
        if walk is None:
            return resize(logits, size).softmax(1)
        reached = self._spread(_flat(logits).softmax(1), walk)
        return resize(self._closer(reached, grid, found)[None].to(self._device), size)

    def _walk(self, found: Mapping[str, torch.Tensor]) -> Walk:
        """Return the walk of preset default's last round.

        What the towers hold for one thing gets one answer on it, and a label that a few patches
        alone are taken for is outvoted.

        Args:
            found: What the towers say, (h, w, D) by name, CLIP's attention among it.
        """
        other, attention = self._second(found), found[ATTENTION].flatten(0, 1) ** self._power
        weight, like = BOTH_TOWERS.rounds[-1].likeness_weight, BOTH_TOWERS.likeness_temperature
        return joint_walk(attention, other, weight, like, CamParams.sinkhorn_iterations)

    @staticmethod
    def _spread(probs: torch.Tensor, walk: Walk | None) -> torch.Tensor:
        """Return answers (N, L) spread over an image; as they are without a walk."""
        if walk is None:
            return probs
        reached = walk.step(probs.to(walk.device))
        # A walk that is symmetric keeps their sum only nearly.
        return reached / reached.sum(1, keepdim=True)

    @staticmethod
    def _closer(
        probs: torch.Tensor, grid: tuple[int, int], found: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return (L, h', w') of (N, L) answers on the grid of a closer look, or on ``grid``."""
        near, closer = closer_names(BOTH_TOWERS.likeness_of)
        if closer in found:
            seen = found[near].flatten(0, 1), found[closer]
            return finer(probs, grid, *seen, BOTH_TOWERS.finer_temperature)
        coarse: torch.Tensor = probs.T.unflatten(1, grid)
        return coarse

    def _second(self, found: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Return the (N, D) tokens that say which patches are alike; None without such a tower."""
        names = [one.name for one in self._model.spec.inputs]
        mine = [name for name in names if name.split(".")[0] == BOTH_TOWERS.likeness_of]
        return found[mine[-1]].flatten(0, 1) if mine else None


def _flat(logits: torch.Tensor) -> torch.Tensor:
    """Return (N, L) of (1, L, h, w)."""
    return logits[0].flatten(1).T


def check_towers(spec: Spec, source: TokenSource) -> None:
    """Refuse towers other than those that a model was trained on.

    Raises:
        ArtifactError: One has other weights.
    """
    for name, sha256 in spec.towers().items():
        found = source.digests.get(name, "")
        if found != sha256:
            raise other_tower("the segmenter", name, sha256, found)
