"""Folders of masks ``<id>.png`` that a person names, and what is said if they are of no use."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from clipes.datasets.base import index_files
from clipes.disk.files import list_files
from clipes.errors import ArtifactError


def find_masks(folder: Path, option: str) -> dict[str, Path]:
    """Return the PNGs of a folder by the id of their image, ``.PNG`` included.

    Args:
        folder: The folder.
        option: The option that named it, for the message.

    Raises:
        ArtifactError: There is no such folder.
    """
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {folder}", f"check the path given by {option}")
    return index_files(folder, ".png")


def require_some(folder: Path, ids: Container[str], whose: str, example: str) -> None:
    """Refuse a folder without a single mask of some images; say what is in it instead.

    Args:
        folder: A folder.
        ids: The images.
        whose: What they are, for the message.
        example: One of them.

    Raises:
        ArtifactError: None of its PNGs is called after one of the images.
    """
    files = list_files(folder)
    masks = index_files(folder, ".png")
    if any(id_ in ids for id_ in masks):
        return
    found = "it holds no file"
    if masks:
        found = (
            f"its {len(masks)} PNGs are called otherwise, the first is {min(masks.values()).name}"
        )
    elif files:
        found = f"none of its {len(files)} files is a PNG, the first is {files[0].name}"
    raise ArtifactError(
        f"no mask in {folder} belongs to {whose}: {found}",
        f"a mask is a PNG of label numbers, called after its image, such as {example}.png",
    )
