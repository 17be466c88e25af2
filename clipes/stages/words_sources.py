"""Whether the class vectors that were fitted to a run are still those that would be fitted now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from clipes.datasets import Dataset
from clipes.disk.files import read_arrays, sha256_of
from clipes.run.folder import Run
from clipes.run.freshness import LARGEST_LOOKS
from clipes.stages.looks_sources import count_changed, read_sources

KNOWN = -1
"""Number of images of a class that was not fitted: its vector was there before."""


def read_words(run: Run, classes: tuple[str, ...]) -> Mapping[str, npt.NDArray[Any]] | None:
    """Return what a run keeps beside its fitted vectors.

    Beside those of ``--text-features`` and of ``write_sources`` these are ``fitted`` (C,) int64,
    the number of images of each class, or ``KNOWN``, ``made_with`` (), what else counts, and
    ``unfitted`` (N,), what ``unfitted`` told when they were fitted; an older clipes kept none.

    Args:
        run: The run folder.
        classes: Class names in mask order.

    Returns:
        The arrays; None if there are none, or they are damaged or of other classes: all of it can
        be made again.
    """
    try:
        arrays = read_arrays(run.words_path, LARGEST_LOOKS)
        names = tuple(arrays["names"][~arrays["background"]].tolist())
        fitted, sources = arrays["fitted"], read_sources(arrays)
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    counts = fitted.dtype == np.int64 and fitted.shape == (len(classes),)
    usable = names == classes and counts and sources is not None and "made_with" in arrays
    return arrays if usable else None


def unfitted(data: Dataset, fitted: npt.NDArray[np.int64]) -> Iterator[str]:
    """Yield sha256 and id of each image of a class whose images could not be used, as it is now.

    One that was mended since is another. One that cannot be read at all is left out: it is new
    when it is there again.

    Args:
        data: All images of the run.
        fitted: (C,) number of images of each class that could be used, or ``KNOWN``.
    """
    for sample in data.samples:
        if any(fitted[label] == 0 for label in sample.labels):
            with suppress(OSError):  # the last pass says what is wrong with it
                yield f"{sha256_of(sample.image)} {sample.id}"


def words_are_current(run: Run, data: Dataset, *, keep: bool = False) -> bool:
    """Tell whether fitted vectors are there, of images that are what they were, for all classes.

    Images that came later change nothing, unless they are the first of their class that can be
    used, as far as that is known.

    Args:
        run: The run folder.
        data: Its images as they are now.
        keep: Whether they are current whatever has changed, as long as all classes have one.
    """
    arrays = read_words(run, data.classes)
    if arrays is None:
        return False
    kept = arrays.get("unfitted")
    tried = set() if kept is None else set(kept.ravel().tolist())
    if any(image not in tried for image in unfitted(data, arrays["fitted"])):
        return False
    return keep or not count_changed(read_sources(arrays) or (), data.samples, run.words_path)
