"""Random photos with masks, for tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipes.disk.images import write_mask
from clipes.types import Sample


def random_photo(
    folder: Path, number: int, labels: Sequence[int], blobs: tuple[int, int], size: tuple[int, int]
) -> Sample:
    """Write a photo and its mask, whose rows are the background and its classes in some order.

    Args:
        folder: For both.
        number: Its id, and the seed of all chance.
        labels: 0-based classes that it shows.
        blobs: (h, w) random colours that become the photo.
        size: (H0, W0).
    """
    image, mask = folder / f"{number}.png", folder / f"{number}_truth.png"
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (*blobs, 3), dtype=np.uint8))
    small.resize(size[::-1], Image.Resampling.BILINEAR).save(image)
    truth = rng.permutation([0, *(1 + label for label in labels)]).astype(np.uint8)
    write_mask(mask, np.resize(np.repeat(truth, 40), size))
    return Sample(str(number), image, tuple(labels), mask)
