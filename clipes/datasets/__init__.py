"""Data sets: images, the classes each of them shows, and ground truth where there is any.

What is wrong with one image becomes a ``Failure`` beside the samples, so that the others can go on;
what is wrong with the data set as a whole is a ``DatasetError``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipes.datasets.base import Dataset
from clipes.datasets.folder import open_folder
from clipes.datasets.voc import VOC_CLASSES, open_voc
from clipes.errors import DatasetError, UsageError

__all__ = ["DATASETS", "VOC_CLASSES", "Dataset", "open_dataset", "open_folder", "open_voc"]


def _open_examples(**options: Any) -> Dataset:  # noqa: ANN401 - those of open_dataset
    # Drawing the examples needs OpenCV, which the other data sets do without.
    from clipes.datasets.examples import open_examples

    return open_examples(**options)


DATASETS: dict[str, Callable[..., Dataset]] = {
    "voc": open_voc,
    "folder": open_folder,
    "examples": _open_examples,
}
"""What opens each kind of data set; all take the keywords of ``open_dataset``."""


def open_dataset(
    name: str,
    *,
    root: Path | None = None,
    split: str | None = None,
    labels: Path | None = None,
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """Find a data set and list its images with their labels; no image is read.

    Args:
        name: Which kind it is, one of ``DATASETS``.
        root: Folder of the data set; if None, ``$CLIPES_DATA``, else ``datasets/``.
        split: Name of a list of images that comes with the data set, or path of one.
        labels: File with the labels of the images, read instead of the annotations.
        classes: Class names in mask order; if None, those of the data set.

    Raises:
        UsageError: There is no such kind of data set.
        DatasetError: The data set is absent or unusable as a whole.
    """
    if name not in DATASETS:
        raise UsageError(f"unknown data set '{name}'", f"choose one of {', '.join(DATASETS)}")
    try:
        return DATASETS[name](root=root, split=split, labels=labels, classes=classes)
    except OSError as error:
        raise DatasetError(
            f"cannot look through the data set: {error}", "check the path and its permissions"
        ) from error
