"""Corrected masks as PNGs of label numbers, called after their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from clipes.disk.images import read_mask
from clipes.formats.read import Found, check_said_size
from clipes.masks.folder import find_masks
from clipes.masks.values import RULE, require_classes
from clipes.types import UInt8Array

_FOLDERS = ("SegmentationClassAug", "SegmentationClass", "masks")


def read_masks(path: Path, classes: Sequence[str]) -> Iterator[Found]:
    """Read a folder of masks, or one that has them in a folder as ``voc`` or ``ultralytics`` do.

    Raises:
        ArtifactError: There is no such folder.
    """
    folders = [path / name for name in _FOLDERS if (path / name).is_dir()]
    for id_, file in sorted(find_masks((*folders, path)[0], "the argument").items()):
        yield Found(id_, partial(_read, path=file, count=len(classes)))


def _read(size: tuple[int, int], path: Path, count: int) -> UInt8Array:
    mask = read_mask(path)
    check_said_size(mask.shape, size)
    require_classes(mask, count, str(path), RULE)
    return mask
