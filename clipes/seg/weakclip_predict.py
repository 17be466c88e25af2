"""WeakCLIP, asked about images in windows: as it was trained on views, several scales, mirrored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from clipes.seg.predict_tokens import check_towers
from clipes.seg.recipes import ModelPredictor, TestSettings
from clipes.seg.resize import resize
from clipes.seg.views import LONGEST, PATCH
from clipes.seg.weakclip import WeakClip
from clipes.towers.tokens import TokenSource
from clipes.types import Float32Array, UInt8Array

_STEP = 2 / 3  # of a window, to the next


class WindowPredictor(ModelPredictor[WeakClip]):
    """Turns images into probabilities of labels; see ``LabelPredictor``.

    At each scale the shorter side is brought to ``spec.side`` times it. Windows begin at whole
    patches, unlike in the published code, so that their answers are added up as they are, a 16th as
    many as there are pixels: at scale 1.75 that takes 0.8 MB for each label at most.

    Args:
        model: The model; put into evaluation mode.
        settings: Scales, mirroring; ``window`` means nothing here.
        source: The tower.

    Raises:
        ArtifactError: The model was trained on another tower.
    """

    def __init__(self, model: WeakClip, settings: TestSettings, source: TokenSource) -> None:
        check_towers(model.spec, source)
        super().__init__(model, settings)
        self._source = source

    @torch.inference_mode()
    def __call__(self, image: UInt8Array, present: Sequence[int] | None = None) -> Float32Array:
        """Return (1 + C, H, W) float32 of RGB (H, W, 3) uint8; see ``LabelPredictor``."""
        size = (image.shape[0], image.shape[1])
        total = torch.zeros(1, self.labels, *size, device=self._device)
        count = 0
        for scale in self._settings.scales:
            height, width = view_size(size, self._model.spec.side * scale)
            view = np.asarray(cv2.resize(image, (width, height)), np.uint8)
            total += self._allowed(resize(self._logits(view), size), present).softmax(1)
            count += 1
            if self._settings.flip:
                mirrored = self._logits(np.ascontiguousarray(view[:, ::-1])).flip(3)
                total += self._allowed(resize(mirrored, size), present).softmax(1)
                count += 1
        probs: Float32Array = total.div_(count)[0].cpu().numpy()
        return probs

    def _logits(self, view: UInt8Array) -> Tensor:
        """Return the mean logits (1, 1 + C, h, w) of a view's windows, at the finest stride."""
        side, stride = self._model.spec.side, self._model.spec.strides[0]
        height, width = view.shape[0] // stride, view.shape[1] // stride
        total = torch.zeros(1, self.labels, height, width, device=self._device)
        count = torch.zeros(1, 1, height, width, device=self._device)
        for top in starts(view.shape[0], side):
            for left in starts(view.shape[1], side):
                window = view[top : top + side, left : left + side]
                part = self._look(window)
                rows = slice(top // stride, top // stride + part.shape[2])
                columns = slice(left // stride, left // stride + part.shape[3])
                total[:, :, rows, columns] += part
                count[:, :, rows, columns] += 1
        return total / count

    def _look(self, window: UInt8Array) -> Tensor:
        """Return the logits (1, 1 + C, h, w) of a window of whole patches."""
        found = self._source.tokens(np.ascontiguousarray(window))
        grid = torch.tensor([[side // PATCH for side in window.shape[:2]]])
        names = [one.name for one in self._model.spec.inputs]
        tokens = [found[name].flatten(0, 1).to(self._device) for name in names]
        logits: Tensor = self._model(grid, *tokens)[0]
        return logits.float()


def view_size(size: tuple[int, int], short: float) -> tuple[int, int]:
    """Return the size, in whole patches, at which an image's shorter side is ``short``.

    >>> view_size((375, 500), 512), view_size((10, 1000), 512)
    ((512, 688), (512, 2048))
    """
    factor = short / min(size)
    height, width = (
        PATCH * max(1, round(min(length * factor, LONGEST * short) / PATCH)) for length in size
    )
    return height, width


def starts(length: int, side: int) -> list[int]:
    """Return where windows of a view begin: at two thirds of the one before, and at the end.

    >>> starts(400, 512), starts(896, 512)
    ([0], [0, 336, 384])
    """
    step = PATCH * max(1, math.floor(side * _STEP / PATCH))
    last = max(length - side, 0)
    return [min(step * index, last) for index in range(math.ceil(last / step) + 1)]
