"""Data sets: images, the classes each of them shows, and ground truth where there is any.

What is wrong with one image becomes a ``Problem`` beside the samples, so that the others can go on;
what is wrong with the data set as a whole is a ``DatasetError``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipes.datasets.base import Dataset
from clipes.datasets.coco import COCO_CLASSES, open_coco
from clipes.datasets.folder import open_folder
from clipes.datasets.voc import VOC_CLASSES, open_voc
from clipes.errors import DatasetError, UsageError

__all__ = [
    "COCO_CLASSES",
    "DATASETS",
    "VOC_CLASSES",
    "Dataset",
    "open_coco",
    "open_dataset",
    "open_folder",
    "open_voc",
]


def _open_examples(**options: Any) -> Dataset:  # noqa: ANN401 - those of open_dataset
    # Drawing the examples needs OpenCV, which the other data sets do without.
    from clipes.datasets.examples import open_examples

    return open_examples(**options)


DATASETS: dict[str, Callable[..., Dataset]] = {
    "voc": open_voc,
    "coco": open_coco,
    "folder": open_folder,
    "examples": _open_examples,
}
"""What opens each kind of data set; all take the keywords of ``open_dataset`` but ``difficult``."""


def open_dataset(
    name: str,
    *,
    root: Path | None = None,
    split: str | None = None,
    labels: Path | None = None,
    classes: tuple[str, ...] | None = None,
    difficult: bool = True,
    labelled: bool = True,
) -> Dataset:
    """Find a data set and list its images with their labels; no image is read.

    Args:
        name: Which kind it is, one of ``DATASETS``.
        root: Folder of the data set; if None, ``$CLIPES_DATA``, else ``datasets/``.
        split: Name of a list of images that comes with the data set, or path of one.
        labels: File with the labels of the images, read instead of the annotations.
        classes: Class names in mask order; if None, those of the data set.
        difficult: Whether objects that VOC's annotations mark difficult count.
        labelled: False lists the images without looking for labels: samples have none.

    Raises:
        UsageError: There is no such kind of data set, or nothing in it is marked difficult.
        DatasetError: The data set is absent or unusable as a whole.
    """
    if name not in DATASETS:
        raise UsageError(f"unknown data set '{name}'", f"choose one of {', '.join(DATASETS)}")
    options: dict[str, Any] = {"split": split, "labels": labels, "classes": classes}
    if not difficult:
        if name != "voc" or labels is not None or not labelled:
            raise UsageError(
                "only VOC's annotations say which objects are difficult", "drop --no-difficult"
            )
        options["difficult"] = False
    try:
        return DATASETS[name](root=root, labelled=labelled, **options)
    except OSError as error:
        raise DatasetError(
            f"cannot look through the data set: {error}", "check the path and its permissions"
        ) from error
