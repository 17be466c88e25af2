"""The original CLIP classification: one feature of the whole image, read at its CLS token."""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor

from clipes.types import Float32Array, UInt8Array

_LONGEST = 100  # times the shorter side: 15 MB, once that has 224 pixels


def classifier_input(
    visual: VisionTransformer, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Callable[[UInt8Array], Tensor]:
    """Return what turns a photo into a tower's input, as CLIP's authors do it.

    The shorter side is resized to the tower's own (224 for ViT-B/16), bicubic, and the middle cut
    out.

    Args:
        visual: The image tower.
        mean: Channel means of its training images, RGB in [0, 1].
        std: Channel standard deviations, likewise.

    Returns:
        A function from (H0, W0, 3) RGB uint8 to (3, side, side) float32.
    """
    transform = open_clip.image_transform(visual.image_size, is_train=False, mean=mean, std=std)
    return lambda image: transform(Image.fromarray(_middle(image)))


def _middle(image: UInt8Array) -> UInt8Array:
    """Return the middle of a picture that is next to a line: resized whole, it would be enormous.

    As long as ``_LONGEST`` times its shorter side, of which the middle square is seen.
    """
    height, width = image.shape[:2]
    most = _LONGEST * min(height, width)
    top, left = max(0, (height - most) // 2), max(0, (width - most) // 2)
    return image[top : top + most, left : left + most]


@torch.inference_mode()
def image_features(visual: VisionTransformer, images: Tensor) -> Float32Array:
    """Return the unit features of (B, 3, side, side) prepared images: (B, E) float32."""
    weight = visual.conv1.weight
    features: Float32Array = F.normalize(visual(images.to(weight)).float()).cpu().numpy()
    return features
