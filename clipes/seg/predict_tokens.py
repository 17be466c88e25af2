"""A decoder on frozen tokens, asked about whole images: at several scales, mirrored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from clipes.errors import ArtifactError
from clipes.seg.frozen import FrozenDecoder, flat_tokens
from clipes.seg.recipes import ModelPredictor, Spec, TestSettings
from clipes.seg.resize import resize
from clipes.seg.weakclip import WeakClip
from clipes.towers.tokens import TokenSource
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

    @torch.inference_mode()
    def __call__(
        self, image: UInt8Array, kept: Mapping[str, torch.Tensor] | None = None
    ) -> Float32Array:
        """Return (1 + C, H, W) float32 that sum to 1, background first.

        Args:
            image: (H, W, 3) RGB uint8.
            kept: What the towers say of it as it is, where that is known; None to ask them.
        """
        size = (image.shape[0], image.shape[1])
        total = torch.zeros(1, self.labels, *size, device=self._device)
        count = 0
        for scale in self._settings.scales:
            scaled = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
            view = (
                image if scaled == size else np.asarray(cv2.resize(image, scaled[::-1]), np.uint8)
            )
            known = kept if view is image else None
            total += self._probs(self._source.tokens(view) if known is None else known, size)
            count += 1
            if self._settings.flip:
                mirrored = self._source.tokens(np.ascontiguousarray(view[:, ::-1]))
                total += self._probs(mirrored, size).flip(3)
                count += 1
        probs: Float32Array = total.div_(count)[0].cpu().numpy()
        return probs

    def _probs(self, found: Mapping[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Return the probabilities (1, 1 + C, H, W) of a view's tokens at the image's size."""
        grid, tokens = flat_tokens(found, self._model.spec)
        # As in training, where they come from files.
        rounded = [one.half().to(self._device) for one in tokens]
        logits = self._model(torch.tensor([grid], device=self._device), *rounded)[0]
        return resize(logits.float(), size).softmax(1)


@dataclass(frozen=True)
class KnownImage:
    """A ``LabelPredictor`` for one image whose tokens are known; others it asks the towers about.

    Attributes:
        predictor: The decoder.
        image: The image, as it will be asked about.
        kept: Its tokens, (h, w, D) by name.
    """

    predictor: TokenPredictor
    image: UInt8Array
    kept: Mapping[str, torch.Tensor]

    @property
    def labels(self) -> int:
        """Number of labels, background included."""
        return self.predictor.labels

    def __call__(self, image: UInt8Array) -> Float32Array:
        """Return (1 + C, H, W) float32 that sum to 1, background first, of RGB (H, W, 3) uint8."""
        return self.predictor(image, self.kept if image is self.image else None)


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
