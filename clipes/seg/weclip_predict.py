"""WeCLIP and WeCLIP+, asked about whole images: scores of all scales averaged, then enlarged."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from clipes.seg.predict_tokens import check_towers
from clipes.seg.recipes import ModelPredictor, TestSettings
from clipes.seg.resize import resize
from clipes.seg.weclip import WeClip, require_scales
from clipes.seg.weclip_plus import WeClipPlus
from clipes.towers.tokens import TokenSource
from clipes.types import Float32Array, UInt8Array


class WeClipPredictor(ModelPredictor[WeClip | WeClipPlus]):
    """Turns images into probabilities of labels; see ``LabelPredictor``.

    An image's longer side is brought to ``spec.side`` first, so there is no window. Unlike the
    published code, it covers whole patches by being stretched, not by losing its last rows.

    Args:
        model: The decoder; put into evaluation mode.
        settings: Scales, mirroring.
        source: The towers, their tokens raw.

    Raises:
        ArtifactError: The decoder was trained on other towers.
        UsageError: A scale is beyond ``LARGEST_SCALE``.
    """

    def __init__(
        self, model: WeClip | WeClipPlus, settings: TestSettings, source: TokenSource
    ) -> None:
        check_towers(model.spec, source)
        require_scales(settings.scales)
        super().__init__(model, settings)
        self._source = source

    @torch.inference_mode()
    def __call__(self, image: UInt8Array, present: Sequence[int] | None = None) -> Float32Array:
        """Return (1 + C, H, W) float32 of RGB (H, W, 3) uint8; see ``LabelPredictor``."""
        size = (image.shape[0], image.shape[1])
        whole = self._model.spec.side / max(size)
        answers: list[Tensor] = []
        # That of the image itself first: its grid is the answer's.
        for scale in sorted(self._settings.scales, key=lambda scale: abs(scale - 1)):
            height, width = (max(1, round(length * whole * scale)) for length in size)
            view = np.asarray(cv2.resize(image, (width, height)), np.uint8)
            answers.append(self._logits(view))
            if self._settings.flip:
                answers.append(self._logits(np.ascontiguousarray(view[:, ::-1])).flip(3))
        grid = (answers[0].shape[2], answers[0].shape[3])
        mean = torch.stack([resize(one, grid) for one in answers]).mean(0)
        probs: Float32Array = self._allowed(resize(mean, size), present).softmax(1)[0].cpu().numpy()
        return probs

    def _logits(self, view: UInt8Array) -> Tensor:
        """Return (1, 1 + C, h, w) of a view."""
        tokens = {name: one.to(self._device) for name, one in self._source.tokens(view).items()}
        return self._model.score(tokens).float()
