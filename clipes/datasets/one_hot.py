"""Labels as an array: a row for each image, a column for each class, 1 where it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipes.datasets.rows import RawLabels, labels_of_classes
from clipes.disk.files import BAD_ARRAY, read_arrays
from clipes.errors import DatasetError
from clipes.names import folded

_LARGEST = 2**30  # bytes; 64-bit rows for 80 classes of 1.6 million images
_PICKLE = b"\x80"
_CONVERT = (
    "where you trust it, save np.savez('labels.npz', ids=np.array(list(d)), "
    "labels=np.stack(list(d.values())))"
)


def one_hot_rows(path: Path, classes: Sequence[str], ids: Sequence[str] | None) -> RawLabels:
    """Read labels from an ``.npz`` with ``ids`` and ``labels``, or an ``.npy`` in given order.

    Args:
        path: ``.npz``: ``ids`` (n,) str or int, ``labels`` (n, C) of 0 and 1, and maybe
            ``classes`` (C,) str. ``.npy``: ``labels`` alone.
        classes: The class names, where they are known.
        ids: What the rows of an ``.npy`` are about.

    Raises:
        DatasetError: The file cannot be read, holds something else, or fits neither ``classes``
            nor ``ids``.
    """
    names: Sequence[str] = ()
    if path.suffix.lower() == ".npz":
        arrays = _read_npz(path)
        table = arrays["labels"]
        ids, names = _texts(path, arrays, "ids"), _texts(path, arrays, "classes")
    else:
        table = _read_npy(path)
        if ids is None:
            raise DatasetError(
                f"{path} does not say which image its rows are about",
                "name the list of images they follow with --split, or save an .npz with the arrays "
                "ids and labels",
            )
    _check(path, table, len(ids), len(names or classes))
    labels = labels_of_classes(names, classes) if names else list(range(table.shape[1]))
    # An array has no first label: they stand in the order of the classes.
    place = {folded(name): k for k, name in enumerate(classes)}

    def order(column: int) -> int:
        label = labels[column]
        return place.get(folded(label), column) if isinstance(label, str) else column

    columns = sorted(range(len(labels)), key=order)
    rows = [
        (id_, [labels[columns[k]] for k in np.flatnonzero(row)])
        for id_, row in zip(ids, table[:, columns], strict=True)
    ]
    return RawLabels(rows, classes=tuple(names), complete=True)


def _check(path: Path, table: npt.NDArray[Any], images: int, classes: int) -> None:
    """Refuse what is no (images, classes) array of 0 and 1; 0 classes stand for any number."""
    if table.ndim != 2 or table.dtype.kind not in "biuf":
        raise DatasetError(
            f"{path} holds a {table.dtype} array of shape {table.shape}, not one row of 0 and 1 "
            "for each image",
            "save an array (images, classes)",
        )
    if len(table) != images:
        raise DatasetError(
            f"{path} has {len(table)} rows for {images} images", "give the list they follow"
        )
    if classes and table.shape[1] != classes:
        raise DatasetError(
            f"{path} has {table.shape[1]} columns for {classes} classes",
            "save one for each class, in the order of the masks, without background",
        )
    if not np.isin(table, (0, 1)).all():
        raise DatasetError(
            f"{path} holds values other than 0 and 1", "save 1 for the classes an image shows"
        )


def _texts(path: Path, arrays: dict[str, npt.NDArray[Any]], name: str) -> list[str]:
    if name not in arrays:
        return []
    kinds = "Uiu" if name == "ids" else "U"  # COCO's images have numbers
    if arrays[name].ndim != 1 or arrays[name].dtype.kind not in kinds:
        raise DatasetError(
            f"{path}: '{name}' is no list of names", f"save {name}=np.array(list_of_names)"
        )
    return [str(text) for text in arrays[name].tolist()]


def _read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    remedy = "save np.savez('labels.npz', ids=..., labels=...)"
    try:
        arrays = read_arrays(path, _LARGEST)
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read {path}: {error}", remedy) from error
    missing = {"ids", "labels"} - set(arrays)
    if missing:
        raise DatasetError(f"{path} has no array '{min(missing)}'", remedy)
    return arrays


def _read_npy(path: Path) -> npt.NDArray[Any]:
    try:
        with path.open("rb") as file:
            first = file.read(8)
            file.seek(0)
            if first.startswith(_PICKLE):
                raise _pickled(path)
            magic = np.lib.format.read_magic(file)
            if magic[0] > 3:
                raise ValueError(f"unknown version {magic}")
            file.seek(0)
            array: npt.NDArray[Any] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, *BAD_ARRAY) as error:
        if "Object arrays" in str(error):
            raise _pickled(path) from error
        raise DatasetError(
            f"cannot read {path}: {error}", "save a (images, classes) array with np.save"
        ) from error
    return array


def _pickled(path: Path) -> DatasetError:
    return DatasetError(
        f"{path} holds pickled Python objects, which can run code when they are loaded", _CONVERT
    )
