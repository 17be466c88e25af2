"""One random view of an image, its mask and its confidence map, the three kept aligned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
import torch
from torch import Tensor

from clipes.config import IMAGENET_MEAN, IMAGENET_STD, SegmenterPreset
from clipes.types import IGNORE, Float32Array, UInt8Array

_GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601

Colours: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and deviation of the channels, RGB in [0, 1]."""

_MEAN = np.rint(np.multiply(IMAGENET_MEAN, 255)).astype(np.uint8)

Example = tuple[UInt8Array, UInt8Array, Float32Array]
"""Image (H, W, 3) RGB uint8, mask (H, W) uint8, confidence (H, W) float32."""


def augment(example: Example, preset: SegmenterPreset, rng: np.random.Generator) -> Example:
    """Scale, pad, crop, flip and colour an example at random.

    Args:
        example: The three arrays, of one size.
        preset: Says how much.
        rng: Source of chance; the same state gives the same view.

    Returns:
        The three at ``preset.crop`` pixels square. Where the image had to be padded, with its mean
        colour, the mask is ``IGNORE`` and the confidence 0.
    """
    scaled = scale(example, rng.uniform(*preset.scale))
    image, mask, confidence = crop(scaled, preset.crop, rng)
    if rng.random() < 0.5:
        image, mask, confidence = image[:, ::-1], mask[:, ::-1], confidence[:, ::-1]
    if preset.colour > 0:
        image = recolour(image, preset.colour, rng)
    return (
        np.ascontiguousarray(image),
        np.ascontiguousarray(mask),
        np.ascontiguousarray(confidence),
    )


def scale(example: Example, factor: float) -> Example:
    """Resize an example; a pixel keeps the confidence that belongs to its label."""
    image, mask, confidence = example
    height, width = mask.shape
    size = max(1, round(width * factor)), max(1, round(height * factor))
    nearest = cv2.INTER_NEAREST_EXACT
    return (
        np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), np.uint8),
        np.asarray(cv2.resize(mask, size, interpolation=nearest), np.uint8),
        np.asarray(cv2.resize(confidence, size, interpolation=nearest), np.float32),
    )


def crop(example: Example, side: int, rng: np.random.Generator) -> Example:
    """Cut a random square of ``side`` pixels; smaller examples are padded at a random place."""
    return Square.of(example[1], side, rng).cut(example)


@dataclass(frozen=True)
class Square:
    """Where a square lies in an image, and where the image in the square, if it is smaller.

    Attributes:
        side: In pixels.
        taken: Rows and columns of the image.
        put: Rows and columns of the square that have them.
    """

    side: int
    taken: tuple[slice, slice]
    put: tuple[slice, slice]

    @classmethod
    def of(cls, image: UInt8Array, side: int, rng: np.random.Generator) -> Square:
        """Choose a square of an image (H, W, ...) at random."""
        rows, to_rows = _overlap(image.shape[0], side, rng)
        columns, to_columns = _overlap(image.shape[1], side, rng)
        return cls(side, (rows, columns), (to_rows, to_columns))

    def cut(self, example: Example) -> Example:
        """Cut an example, padded with the mean colour, ``IGNORE`` and confidence 0."""
        image, mask, confidence = example
        labels = np.full((self.side, self.side), IGNORE, np.uint8)
        sure = np.zeros((self.side, self.side), np.float32)
        labels[self.put] = mask[self.taken]
        sure[self.put] = confidence[self.taken]
        return self.padded(image[self.taken]), labels, sure

    def padded(self, pixels: UInt8Array) -> UInt8Array:
        """Return the square (S, S, 3) with the pixels that are taken, else of the mean colour."""
        view = np.full((self.side, self.side, 3), _MEAN, np.uint8)
        view[self.put] = pixels
        return view


def recolour(image: UInt8Array, strength: float, rng: np.random.Generator) -> UInt8Array:
    """Change brightness, contrast and saturation, each by up to ``strength`` of itself."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    pixels = image.astype(np.float32) * np.float32(brightness)
    grey = pixels @ np.array(_GREY, np.float32)
    pixels = grey[..., None] + (pixels - grey[..., None]) * np.float32(saturation)
    pixels = grey.mean() + (pixels - grey.mean()) * np.float32(contrast)
    coloured: UInt8Array = np.rint(pixels.clip(0, 255)).astype(np.uint8)
    return coloured


def in_colours(image: UInt8Array, colours: Colours) -> Tensor:
    """Return an image (H, W, 3) RGB uint8 as the (3, H, W) float32 that a frozen tower reads."""
    mean, std = (torch.tensor(one)[:, None, None] for one in colours)
    return (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - mean) / std


def normalise(image: UInt8Array) -> Float32Array:
    """Return an image (H, W, 3) RGB uint8 as the (3, H, W) float32 that a backbone reads."""
    mean, std = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
    pixels = (image.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)


def _overlap(length: int, side: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Return where the view lies in the example, and where the example lies in the view."""
    shared = min(length, side)
    start = int(rng.integers(length - shared + 1))
    to = int(rng.integers(side - shared + 1))
    return slice(start, start + shared), slice(to, to + shared)
