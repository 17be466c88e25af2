"""The images that say what the classes of a run look like, as they were when they were asked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipes.disk.files import read_arrays
from clipes.errors import ArtifactError
from clipes.run.folder import Run
from clipes.run.freshness import LARGEST_LOOKS
from clipes.run.origin import Picture, mark_seen, same_picture
from clipes.stages.drawn_masks import DrawnMasks
from clipes.types import Sample

Arrays = Mapping[str, npt.NDArray[Any]]
"""What the file of the statistics holds."""


@dataclass(frozen=True)
class Source:
    """An image that was asked.

    Attributes:
        id: Its id.
        labels: 0-based classes, ascending.
        picture: Its file; of those read back, the time is not known.
        mask: The file of the mask that a person drew of it, likewise; None if it was its maps that
            said where its classes are.
    """

    id: str
    labels: tuple[int, ...]
    picture: Picture
    mask: Picture | None = None


def read_looks(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a file of statistics.

    Raises:
        ArtifactError: There is none, or it is damaged.
    """
    try:
        arrays = read_arrays(path, LARGEST_LOOKS)
        (tried, total), ids = arrays["tried"].tolist(), arrays["ids"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"cannot read {path}: {error}") from error
    # In a later round, what was tried in it may be less than what said something in the first.
    if not (ids.ndim == 1 and ids.dtype.kind == "U" and max(len(ids), tried) <= total):
        raise damaged(path, f"{path} is of other classes or another model")
    return arrays


def damaged(path: Path, what: str) -> ArtifactError:
    """Return the error of statistics that cannot be used."""
    return ArtifactError(what, f"remove {path.parent} and run 'clipes cam' again")


def write_sources(sources: Sequence[Source]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that keep the sources."""
    return {
        "ids": np.array([source.id for source in sources], np.str_),
        "labels": np.array([" ".join(map(str, source.labels)) for source in sources], np.str_),
        "pictures": np.array([source.picture.sha256 for source in sources], np.str_),
        "bytes": np.array([source.picture.size for source in sources], np.int64),
        **_write_masks([source.mask for source in sources]),
    }


def read_sources(arrays: Arrays) -> list[Source] | None:
    """Return the sources; None if the file, of an older clipes, has only their ids."""
    columns = [arrays.get(name) for name in ("ids", "labels", "pictures", "bytes")]
    if any(column is None or column.shape != arrays["ids"].shape for column in columns):
        return None
    told = [column.tolist() for column in columns if column is not None]
    rows = zip(*told, _read_masks(arrays), strict=True)
    return [
        Source(i, _labels(str(k)), Picture(str(p), int(n), 0), mask) for i, k, p, n, mask in rows
    ]


def _write_masks(masks: Sequence[Picture | None]) -> dict[str, npt.NDArray[Any]]:
    if not any(masks):
        return {}
    return {
        "masks": np.array([mask.sha256 if mask else "" for mask in masks], np.str_),
        "mask_bytes": np.array([mask.size if mask else 0 for mask in masks], np.int64),
    }


def _read_masks(arrays: Arrays) -> list[Picture | None]:
    names, sizes = arrays.get("masks"), arrays.get("mask_bytes")
    if names is None or sizes is None or not names.shape == sizes.shape == arrays["ids"].shape:
        return [None] * len(arrays["ids"])
    rows = zip(names.tolist(), sizes.tolist(), strict=True)
    return [Picture(str(name), int(size), 0) if name else None for name, size in rows]


def count_changed(
    sources: Sequence[Source],
    samples: Sequence[Sample],
    path: Path,
    drawn: DrawnMasks | None = None,
) -> int:
    """Return how many sources have other labels or masks now, are another picture, or are gone.

    Args:
        sources: The images that were asked.
        samples: All images of the run as they are now.
        path: The file of the statistics.
        drawn: The masks that a person drew; None where none is learnt from.
    """
    now, started = {sample.id: sample for sample in samples}, time.time_ns()
    since = path.stat().st_mtime_ns
    changed, read = 0, False
    for source in sources:
        sample = now.get(source.id)
        if sample is None or tuple(sorted(sample.labels)) != source.labels:
            changed += 1
            continue
        picture = source.picture
        same, was_read = same_picture(sample.image, picture.sha256, picture.size, since)
        if same and drawn is not None:
            same, mask_read = drawn.is_still(sample, source.mask, since)
            was_read |= mask_read
        changed, read = changed + (not same), read or was_read
    if read and not changed:
        mark_seen(path, started)
    return changed


def count_drawn(run: Run) -> int:
    """Return from how many corrected masks a run knows what its classes look like.

    Raises:
        ArtifactError: The file that says it is damaged.
    """
    sources = read_sources(read_looks(run.looks_path)) or ()
    return sum(source.mask is not None for source in sources)


def looks_are_current(run: Run, samples: Sequence[Sample], drawn: DrawnMasks) -> bool:
    """Tell whether a run knows what its classes look like, from images that are what they were.

    Args:
        run: The run folder; its record says which class vectors it has.
        samples: All images of the run.
        drawn: The masks that a person drew of them.

    Raises:
        ArtifactError: The file that says it, or the record, is damaged.
    """
    if not run.looks_path.exists():
        return False
    arrays = read_looks(run.looks_path)
    tried, total = arrays["tried"].tolist()
    # Of none that could be used, all are to be tried again.
    if (
        tried != total
        or not len(arrays["ids"])
        or kept_vectors(arrays) not in ("", vectors_of(run))
    ):
        return False
    sources = read_sources(arrays)
    return sources is None or not count_changed(sources, samples, run.looks_path, drawn)


def vectors_of(run: Run) -> str:
    """Return the sha256 of the class vectors that a run's record tells of; empty if it has none.

    Raises:
        ArtifactError: The record cannot be used.
    """
    text = run.cam_record().settings.text if run.exists() else None
    return "" if text is None else text.sha256


def kept_vectors(arrays: Arrays) -> str:
    """Return the sha256 of the class vectors that was kept; empty in a file of an older clipes."""
    return str(arrays.get("vectors", ""))


def _labels(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split() if part.isdecimal())
