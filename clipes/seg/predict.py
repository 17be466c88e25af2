"""A model of pixels on whole images: at several scales, mirrored, large ones in windows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipes.masks.mosaic import ramp, windows
from clipes.seg.augment import normalise
from clipes.seg.recipes import Model, ModelPredictor
from clipes.seg.resize import resize
from clipes.types import Float32Array, UInt8Array

BYTES_PER_LABEL = 12
"""Memory that an image takes for each pixel and label."""


class Predictor(ModelPredictor[Model]):
    """Turns images into probabilities of labels.

    Takes about ``BYTES_PER_LABEL`` for each pixel and label of the image, at scales above 1 more by
    the square of the scale, beside the network's need for a window.

    Args:
        model: Reads (N, 3, H, W), normalised with ImageNet's mean and deviation; put into
            evaluation mode.
        settings: Scales, mirroring, window.
    """

    @torch.inference_mode()
    def __call__(self, image: UInt8Array, present: Sequence[int] | None = None) -> Float32Array:
        """Return (1 + C, H, W) float32 that sum to 1, background first.

        Args:
            image: (H, W, 3) RGB uint8.
            present: As in ``LabelPredictor``.
        """
        size = (image.shape[0], image.shape[1])
        pixels = torch.from_numpy(normalise(image))[None].to(self._device)
        total = torch.zeros(1, self.labels, *size, device=self._device)
        count = 0
        for scale in self._settings.scales:
            scaled = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
            view = pixels if scaled == size else resize(pixels, scaled)
            total += resize(self._probs(view, present), size)
            count += 1
            if self._settings.flip:
                total += resize(self._probs(view.flip(3), present), size).flip(3)
                count += 1
        probs: Float32Array = total.div_(count)[0].cpu().numpy()
        return probs

    def _probs(self, view: Tensor, present: Sequence[int] | None) -> Tensor:
        """Return the probabilities of a view (1, 3, H, W) at its own size."""
        height, width = view.shape[2], view.shape[3]
        side = self._settings.window
        if height <= side and width <= side:
            return self._network(view, present)
        total = view.new_zeros(1, self.labels, height, width)
        weight = view.new_zeros(1, 1, height, width)
        for rows in windows(height, side):
            for columns in windows(width, side):
                probs = self._network(view[:, :, rows, columns], present)
                # A window knows little beyond its edges: there its neighbour counts more.
                ramps = ramp(probs.shape[2])[:, None] * ramp(probs.shape[3])
                share = torch.from_numpy(ramps).to(view.device)
                total[:, :, rows, columns] += probs * share
                weight[:, :, rows, columns] += share
        return total.div_(weight)

    def _network(self, view: Tensor, present: Sequence[int] | None) -> Tensor:
        logits = resize(self._model(view).float(), (view.shape[2], view.shape[3]))
        return self._allowed(logits, present).softmax(1)
