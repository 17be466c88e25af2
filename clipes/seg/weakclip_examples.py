"""What WeakCLIP learns from: whole images whose tokens are kept, or random views.

With each go its labels and their confidence, a small copy for the CRF of the boundary loss, one
pixel a cell of stride 8, the classes that it may show, and its number in the training's sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from clipes.config import WeakClipPreset
from clipes.disk.images import read_image
from clipes.masks.values import classes_in, value_count
from clipes.seg.augment import Colours, Example, Square, in_colours, scale
from clipes.seg.data import TrainingPair
from clipes.seg.draws import choose_draws
from clipes.seg.frozen import labels_at
from clipes.seg.frozen_recipe import TokenExamples
from clipes.seg.recipes import Batch, Examples
from clipes.seg.views import LONGEST, PATCH
from clipes.types import IGNORE, Float32Array, UInt8Array

CELLS_PER_TOKEN = 2
"""Cells of stride 8 along each side of a patch: where losses are taken."""

_MOST_OF_ONE, _TRIES = 0.75, 10
"""Largest share of a view's labels that one label may have, and how often another is cut."""


class WholeExamples(TokenExamples):
    """Whole images as tokens; see ``TokenExamples``.

    Beside tokens and labels an example has labels and confidence of cells (4 h w,), a small copy
    (4 h w, 3) uint8, the classes that it may show (1, C) bool, and its number (1,) int64.
    """

    def beside(
        self,
        position: int,
        pair: TrainingPair,
        labels: tuple[UInt8Array, Float32Array],
        grid: tuple[int, int],
        *,
        mirrored: bool,
    ) -> tuple[Tensor, ...]:
        """Return labels and confidence of cells, the small copy, the classes and the number."""
        image = read_image(pair.image)
        small = small_copy(image[:, ::-1] if mirrored else image, grid)
        # Of the mask itself: shrunk once more, the others' would lie two pixels off.
        cells = labels_at(*labels, cells_of(grid))
        return (
            *(one.flatten() for one in cells),
            torch.from_numpy(small).flatten(0, 1),
            may_show(pair, labels[0], len(self._spec.classes))[None],
            torch.tensor([position]),
        )


class MaskedViews(Examples):
    """Random views, pass after pass over the images, or class after class.

    An example is its view (3, S, S) float32, normalised, labels (S, S) int64 and confidence (S, S)
    float32, a small copy (S / 8, S / 8, 3) uint8, the classes that it may show (C,) bool, and its
    number () int64.

    Args:
        pairs: The images and their masks.
        classes: C.
        preset: Augmentation, and which images come.
        colours: What is taken off.
        seed: Chooses the sequence.
    """

    def __init__(
        self,
        pairs: Sequence[TrainingPair],
        classes: int,
        preset: WeakClipPreset,
        colours: Colours,
        seed: int,
    ) -> None:
        self._pairs = pairs
        self._classes = classes
        self._preset = preset
        self._colours = colours
        self._draws = choose_draws([pair.labels for pair in pairs], seed, even=preset.even_classes)

    def __getitem__(self, position: int) -> Batch:
        """Return a view."""
        index, rng = self._draws.at(position)
        pair = self._pairs[index]
        example = pair.read(value_count(self._classes))
        image, mask, confidence = random_view(example, self._preset, rng)
        patches = self._preset.crop // PATCH
        return (
            in_colours(image, self._colours),
            torch.from_numpy(mask.astype(np.int64)),
            torch.from_numpy(confidence),
            torch.from_numpy(small_copy(image, (patches, patches))),
            may_show(pair, example[1], self._classes),
            torch.tensor(position),
        )


def cells_of(grid: tuple[int, int]) -> tuple[int, int]:
    """Return how many cells of stride 8 a grid has, down and across."""
    return CELLS_PER_TOKEN * grid[0], CELLS_PER_TOKEN * grid[1]


def small_copy(image: UInt8Array, grid: tuple[int, int]) -> UInt8Array:
    """Return an image (H, W, 3) at one pixel a cell of stride 8 of a grid, bilinear."""
    size = cells_of(grid)[::-1]
    return np.asarray(cv2.resize(np.ascontiguousarray(image), size), np.uint8)


def may_show(pair: TrainingPair, mask: UInt8Array, classes: int) -> Tensor:
    """Return the classes that an image is labelled with, or that its mask has: (C,) bool."""
    present = pair.shows(classes)
    present[[*classes_in(mask, classes)]] = True
    return present


def random_view(example: Example, preset: WeakClipPreset, rng: np.random.Generator) -> Example:
    """Scale, crop, mirror and colour an example at random.

    Args:
        example: Image, mask and confidence, of one size.
        preset: Says how much.
        rng: Source of chance; the same state gives the same view.

    Returns:
        The three at ``preset.crop`` pixels square; padded with the mean colour and ``IGNORE``.
    """
    short, long = sorted(example[1].shape)
    factor = rng.uniform(*preset.scale) * preset.crop
    scaled = scale(example, min(factor / short, LONGEST * factor / long))
    square = Square.of(scaled[1], preset.crop, rng)
    for _ in range(_TRIES):
        if not _one_rules(scaled[1][square.taken]):
            break
        square = Square.of(scaled[1], preset.crop, rng)
    mirrored = rng.random() < 0.5
    _, mask, confidence = square.cut(scaled)
    # What is padded stays the mean, whatever becomes of the colours.
    image = square.padded(distort(scaled[0][square.taken], rng))
    if mirrored:
        image, mask, confidence = image[:, ::-1], mask[:, ::-1], confidence[:, ::-1]
    return (
        np.ascontiguousarray(image),
        np.ascontiguousarray(mask),
        np.ascontiguousarray(confidence),
    )


def _one_rules(mask: UInt8Array) -> bool:
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)[:IGNORE]
    return bool(counts.max() > _MOST_OF_ONE * counts.sum())


def distort(image: UInt8Array, rng: np.random.Generator) -> UInt8Array:
    """Change colours at random, each step every second time (SSD, Liu et al. 2016, section 2.2).

    Brightness by up to 32, contrast and saturation by half to three halves, hue by up to 36
    degrees; contrast before or after the other two.

    Args:
        image: (H, W, 3) RGB uint8.
        rng: Source of chance.
    """
    pixels = image.astype(np.float32)
    if rng.random() < 0.5:
        pixels += np.float32(rng.uniform(-32, 32))
    early = rng.random() < 0.5
    contrast = np.float32(rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1)
    if early:
        pixels = pixels.clip(0, 255) * contrast
    hsv = cv2.cvtColor(_bytes(pixels), cv2.COLOR_RGB2HSV)
    if rng.random() < 0.5:
        hsv[..., 1] = _bytes(hsv[..., 1] * np.float32(rng.uniform(0.5, 1.5)))
    if rng.random() < 0.5:  # OpenCV's unit of hue is two degrees
        hsv[..., 0] = (hsv[..., 0].astype(np.int64) + int(rng.integers(-18, 18))) % 180
    pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.float32)
    return _bytes(pixels if early else pixels * contrast)


def _bytes(values: np.ndarray) -> UInt8Array:
    rounded: UInt8Array = values.clip(0, 255).astype(np.uint8)
    return rounded
