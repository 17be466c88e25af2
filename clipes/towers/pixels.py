"""An image's way into a tower: resized to whole patches, normalised, cut up."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipes.towers.taps import Grid
from clipes.types import UInt8Array


class Pixels:
    """Brings images to what a tower was trained on.

    Args:
        patch: Pixels along each side of a patch.
        mean: Channel means of the training images, RGB in [0, 1].
        std: Channel standard deviations, likewise.
    """

    def __init__(
        self, patch: int, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> None:
        self._patch = patch
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._std = torch.tensor(std).view(3, 1, 1)

    def prepare(self, image: UInt8Array, grid: Grid) -> Tensor:
        """Resize an RGB image (H0, W0, 3) to ``grid`` (h, w) patches and normalise it.

        Returns:
            (3, H, W) float32, H and W in whole patches.
        """
        h, w = grid
        resized = Image.fromarray(image).resize(
            (w * self._patch, h * self._patch), Image.Resampling.BICUBIC
        )
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
        return pixels.div_(255).sub_(self._mean).div_(self._std)

    def grid(self, images: Tensor) -> Grid:
        """Return the (h, w) patches of prepared images (B, 3, H, W)."""
        return images.shape[-2] // self._patch, images.shape[-1] // self._patch

    def cut(self, images: Tensor) -> Tensor:
        """Cut (B, 3, H, W) into patches: (B, N, 3 * patch**2), as a convolution's weights lie.

        So embedding them is a product: PyTorch lets convolutions on GPUs round to TF32.
        """
        (h, w), side = self.grid(images), self._patch
        apart: Tensor = images.unflatten(3, (w, side)).unflatten(2, (h, side))
        pixels = apart.permute(0, 2, 4, 1, 3, 5)
        return pixels.reshape(len(images), h * w, -1)
