"""Training examples: what is on disk, checked, and the endless random sequence drawn from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipes.config import SegmenterPreset
from clipes.disk.images import read_confidence, read_image, read_mask
from clipes.errors import ArtifactError
from clipes.masks.values import require_classes
from clipes.seg.augment import Example, augment, normalise
from clipes.seg.draws import choose_draws
from clipes.seg.loss import Guidance
from clipes.seg.recipes import Batch, Examples
from clipes.types import Float32Array, Int64Array, Progress, UInt8Array

_CHECKERS = 4  # threads; decoding leaves Python's lock

_AHEAD = 2  # batches for each thread that loads


@dataclass(frozen=True)
class TrainingPair:
    """Files of one training example.

    Attributes:
        id: Of the image.
        image: The photo.
        mask: Its labels; None for recipes that read no masks.
        confidence: How sure they are; None: everywhere 1.
        labels: Classes of the image, 0-based, where they matter to what is drawn.
    """

    id: str
    image: Path
    mask: Path | None
    confidence: Path | None
    labels: tuple[int, ...] = ()

    def read(self, labels: int) -> Example:
        """Read the three arrays.

        Args:
            labels: Number of labels, background included.

        Raises:
            ImageError: A file is missing or damaged.
            ArtifactError: Sizes differ, or a label is no class.
        """
        mask = self._read_mask(labels)
        image = read_image(self.image)
        self._check_size("the image", image.shape[:2], mask.shape)
        return image, mask, self._read_confidence(mask.shape)

    def read_labels(self, labels: int) -> tuple[UInt8Array, Float32Array]:
        """Read mask and confidence alone; otherwise as ``read``."""
        mask = self._read_mask(labels)
        return mask, self._read_confidence(mask.shape)

    def shows(self, classes: int) -> Tensor:
        """Return which classes its image is labelled with: (C,) bool."""
        present = torch.zeros(classes, dtype=torch.bool)
        present[list(self.labels)] = True
        return present

    def _read_mask(self, labels: int) -> UInt8Array:
        if self.mask is None:
            raise ValueError(f"{self.id} has no mask to read")
        mask = read_mask(self.mask)
        remedy = "give the masks of this run's classes"
        require_classes(mask, labels - 1, str(self.mask), remedy)
        return mask

    def _read_confidence(self, size: tuple[int, ...]) -> Float32Array:
        if self.confidence is None:
            return np.ones(size, np.float32)
        confidence = read_confidence(self.confidence)
        self._check_size("the confidence map", confidence.shape, size)
        return confidence

    def _check_size(self, what: str, size: tuple[int, ...], mask: tuple[int, ...]) -> None:
        if size != mask:
            raise ArtifactError(
                f"{self.id}: {what} is {size[0]} x {size[1]}, its mask {mask[0]} x {mask[1]} "
                f"({self.mask})",
                "make the masks again from these images",
            )


@dataclass(frozen=True)
class Tally:
    """How many pixels there are to learn from.

    Attributes:
        pixels: All.
        labelled: Those that have a label.
        used: (L,) int64, of those the ones that count in the loss, by label.
    """

    pixels: int
    labelled: int
    used: Int64Array


def check_pairs(
    pairs: Sequence[TrainingPair],
    labels: int,
    guidance: Guidance,
    progress: Progress,
) -> Tally:
    """Read everything once, so that a bad file is known before hours of training.

    Args:
        pairs: The examples.
        labels: Number of labels, background included.
        guidance: How the confidence of a pixel counts.
        progress: Called after each example.

    Raises:
        ClipesError: The first bad file's, as in ``TrainingPair.read``.
    """
    pixels = labelled = 0
    used = np.zeros(labels, np.int64)

    def read(pair: TrainingPair) -> tuple[int, Int64Array, Int64Array]:
        _, mask, confidence = pair.read(labels)
        counts = confidence >= (guidance.threshold or 0)
        if guidance.soft:
            counts &= confidence > 0
        return mask.size, _count(mask, labels), _count(mask[counts], labels)

    with ThreadPoolExecutor(_CHECKERS) as pool:
        for done, (size, given, kept) in enumerate(pool.map(read, pairs), start=1):
            pixels += size
            labelled += int(given.sum())
            used += kept
            progress(done, len(pairs))
    return Tally(pixels, labelled, used)


def _count(mask: UInt8Array, labels: int) -> Int64Array:
    """Return how often each label occurs; what is not labelled is none."""
    return np.bincount(mask.ravel(), minlength=labels)[:labels]


class TrainingSet(Examples):
    """Random views, pass after pass over the examples, or class after class.

    Args:
        pairs: The examples.
        labels: Number of labels, background included.
        preset: Augmentation, and which examples come.
        seed: Chooses the sequence.
    """

    def __init__(
        self, pairs: Sequence[TrainingPair], labels: int, preset: SegmenterPreset, seed: int
    ) -> None:
        self._pairs = pairs
        self._labels = labels
        self._preset = preset
        self._draws = choose_draws([pair.labels for pair in pairs], seed, even=preset.even_classes)

    def __getitem__(self, position: int) -> Batch:
        """Return a view's image (3, H, W) float32, labels (H, W) int64 and confidence (H, W)."""
        index, rng = self._draws.at(position)
        example = self._pairs[index].read(self._labels)
        image, mask, confidence = augment(example, self._preset, rng)
        return (
            torch.from_numpy(normalise(image)),
            torch.from_numpy(mask.astype(np.int64)),
            torch.from_numpy(confidence),
        )


def batches(
    data: Examples, positions: Sequence[Sequence[int]], workers: int, *, pin: bool
) -> Generator[Batch, None, None]:
    """Yield a batch for each list of positions.

    Loading is done in threads: decoding and resizing leave Python's lock, two threads load 1.4
    times as much as two processes, and a thread needs no shared memory and cannot die alone.

    Args:
        data: The sequence.
        positions: Of the examples in each batch.
        workers: Threads that load ahead; 0 loads when a batch is asked for.
        pin: Whether to lock the batches in memory, for faster copies to a GPU.

    Raises:
        ClipesError: An example cannot be read.
    """

    def load(batch: Sequence[int]) -> Batch:
        loaded = data.collate([data[position] for position in batch])
        return tuple(tensor.pin_memory() for tensor in loaded) if pin else loaded

    if not workers:
        yield from map(load, positions)
        return
    pool = ThreadPoolExecutor(workers)
    coming: deque[Future[Batch]] = deque()
    try:
        for batch in positions:
            coming.append(pool.submit(load, batch))
            if len(coming) > _AHEAD * workers:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
