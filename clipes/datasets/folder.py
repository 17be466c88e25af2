"""Any folder of images, with a label file or with one sub-folder per class."""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath

from clipes.datasets.base import (
    IMAGE_SUFFIXES,
    Dataset,
    check_classes,
    collect,
    find_base,
    image_id,
    index_files,
    printable,
    read_list,
    read_split,
)
from clipes.datasets.labels import LabelFile, LabelRow, read_labels
from clipes.errors import DatasetError
from clipes.files import list_files
from clipes.types import Failure, Sample

_LABEL_FILES = ("labels.csv", "labels.json", "labels.txt")
_IMAGE_FOLDERS = ("images", "JPEGImages")
_MASK_FOLDERS = ("masks", "SegmentationClassAug", "SegmentationClass")


def open_folder(
    *,
    root: Path | None = None,
    split: str | None = None,
    labels: Path | None = None,
    classes: tuple[str, ...] | None = None,
) -> Dataset:
    """List the images of any folder.

    Images lie in ``root``, ``root/images`` or ``root/JPEGImages``. Their labels come from
    ``labels``, else from ``labels.csv``, ``labels.json`` or ``labels.txt`` in ``root``, else from
    the sub-folders that they lie in, one per class. Masks come from ``masks``,
    ``SegmentationClassAug`` or ``SegmentationClass`` in ``root``, under the image's name.

    Args:
        root: The folder; if None, ``folder`` in ``$CLIPES_DATA``, else in ``datasets/``, or these.
        split: Name of a list of images in ``root``, or path of one; all images if None.
        labels: Label file, see ``read_labels``.
        classes: Class names in mask order; if None those of ``root/classes.txt``, one a line, else
            the names that occur, sorted.

    Returns:
        The images in the order of the split, else of the label file, else of the file names.

    Raises:
        DatasetError: There are no images, labels or classes, or they cannot be read.
    """
    root = _find(root)
    folder = _image_folder(root)
    known = _known_classes(root, classes)
    path = labels if labels is not None else _label_file(root)
    table = _labels_by_folder(folder) if path is None else read_labels(path, known)
    names = known or check_classes(table.names(), str(table.path))
    by_id, failures = _index_images(folder)
    if split is None:
        ids = list(dict.fromkeys([*table.rows, *table.problems, *by_id]))
    else:
        ids, failures = read_split(root, split)
    masks: dict[str, Path] = {}
    for name in reversed(_MASK_FOLDERS):
        masks |= index_files(root / name, ".png")

    def make(id_: str) -> Sample:
        present = table.indices(id_, names)
        image = _locate(table.rows[id_].image, (folder, root), by_id.get(id_, []))
        return Sample(id_, image, present, masks.get(id_))

    samples, left_out = collect(ids, make)
    return Dataset("folder", root, names, tuple(samples), (*failures, *left_out))


def _find(root: Path | None) -> Path:
    base = find_base(root)
    places = [base] if root is not None else [base / "folder", base]
    for place in places:
        folder = _image_folder(place)
        if list_files(folder, *IMAGE_SUFFIXES) or _class_folders(folder) or _label_file(place):
            return place
    raise DatasetError(
        f"no images: looked for {', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)} files in "
        f"{', '.join(map(str, places))} and in sub-folders images, JPEGImages and one per class",
        "name the folder with --root or CLIPES_DATA",
    )


def _image_folder(root: Path) -> Path:
    return next((root / name for name in _IMAGE_FOLDERS if (root / name).is_dir()), root)


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """Return the images of each sub-folder that has any and can be a class."""
    if not folder.is_dir():
        return {}
    reserved = {*_IMAGE_FOLDERS, *_MASK_FOLDERS}
    found = {
        path.name: list_files(path, *IMAGE_SUFFIXES)
        for path in sorted(folder.iterdir())
        if path.name not in reserved and not path.name.startswith(".") and path.is_dir()
    }
    return {name: images for name, images in found.items() if images}


def _known_classes(root: Path, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the class names the user states, empty if none."""
    if classes is not None:
        return check_classes(classes, "the list of classes")
    path = root / "classes.txt"
    if not path.is_file():
        return ()
    lines = [line.strip() for line in read_list(path).splitlines()]
    return check_classes([line for line in lines if line], str(path))


def _label_file(root: Path) -> Path | None:
    found = [root / name for name in _LABEL_FILES if (root / name).is_file()]
    if len(found) > 1:
        raise DatasetError(
            f"{root} holds {' and '.join(path.name for path in found)}",
            "remove all but one, or choose with --labels",
        )
    return found[0] if found else None


def _labels_by_folder(folder: Path) -> LabelFile:
    """Return the labels that the names of the sub-folders are."""
    rows: dict[str, LabelRow] = {}
    problems: dict[str, str] = {}
    for name, images in _class_folders(folder).items():
        for path in images:
            image = f"{name}/{path.name}"
            try:
                id_ = image_id(image)
            except DatasetError as error:
                problems[printable(image)] = str(error)
                continue
            if id_ in rows:
                both = f"{printable(rows[id_].image)} and {printable(image)}"
                problems[id_] = f"{both} have one name; rename one, they share their output files"
            rows.setdefault(id_, LabelRow(image, (name,)))
    if not rows and not problems:
        raise DatasetError(
            f"no labels for the images in {folder}: looked for {', '.join(_LABEL_FILES)} and for "
            "one sub-folder per class",
            "write a labels.csv with the header 'image,labels', or name a file with --labels",
        )
    return LabelFile(folder, {k: row for k, row in rows.items() if k not in problems}, problems)


def _index_images(folder: Path) -> tuple[dict[str, list[Path]], list[Failure]]:
    """Return the images right in ``folder`` by id, and a failure for each that can have none."""
    by_id: dict[str, list[Path]] = {}
    failures = []
    for path in list_files(folder, *IMAGE_SUFFIXES):
        name = printable(path.name)
        try:
            by_id.setdefault(image_id(path.name), []).append(path)
        except DatasetError as error:
            failures.append(Failure(name, f"{error}; rename it"))
    return by_id, failures


def _locate(name: str, folders: tuple[Path, ...], same_id: list[Path]) -> Path:
    """Return the file of the image that a row calls ``name``.

    Args:
        name: File name, path below one of ``folders``, or id.
        folders: Where paths start.
        same_id: The files that have the id of the image.
    """
    relative = PurePosixPath(name.replace("\\", "/").lstrip("/"))
    if len(relative.parts) > 1 and relative.suffix.lower() in IMAGE_SUFFIXES:
        for folder in folders:
            if (folder / relative).is_file():
                return folder / relative
    named = unicodedata.normalize("NFC", relative.name)
    exact = [path for path in same_id if unicodedata.normalize("NFC", path.name) == named]
    found = exact or same_id
    if not found:
        raise DatasetError(f"no image {printable(name)} in {folders[0]}", "add it, or drop its row")
    if len(found) > 1:
        raise DatasetError(
            f"{' and '.join(path.name for path in found)} in {folders[0]} have one name",
            "rename one, or give the suffix in the label file",
        )
    return found[0]
