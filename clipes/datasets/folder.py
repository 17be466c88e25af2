"""Any folder of images, with a label file or with one sub-folder per class."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, field
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
from clipes.datasets.labels import (
    LABEL_FILES,
    LabelFile,
    LabelRow,
    find_label_file,
    read_labels,
)
from clipes.datasets.problems import Kind, Problem, ProblemError
from clipes.errors import DatasetError
from clipes.files import list_files
from clipes.types import Sample

_IMAGE_FOLDERS = ("images", "JPEGImages")
_MASK_FOLDERS = ("masks", "SegmentationClassAug", "SegmentationClass")


@dataclass(frozen=True)
class _Images:
    """Images by id.

    Attributes:
        paths: The files that have an id.
        names: ``file name`` or ``folder/file name``, by id.
        ids_by_path: Ids that are more than a file name, by ``folder/file name``.
        problems: What is wrong with those that have no id of their own, by name.
    """

    paths: dict[str, list[Path]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    ids_by_path: dict[str, str] = field(default_factory=dict)
    problems: dict[str, Problem] = field(default_factory=dict)


def open_folder(
    *,
    root: Path | None = None,
    split: str | None = None,
    labels: Path | None = None,
    classes: tuple[str, ...] | None = None,
    labelled: bool = True,
) -> Dataset:
    """List the images of any folder.

    Images lie in ``root``, ``root/images`` or ``root/JPEGImages``. Their labels come from
    ``labels``, else from ``labels.csv``, ``.json``, ``.txt`` or ``.npz`` in ``root``, else from
    the sub-folders that they lie in, one per class. Masks come from ``masks``,
    ``SegmentationClassAug`` or ``SegmentationClass`` in ``root``, under the image's id.

    The id of an image is the stem of its file name. Where two sub-folders hold the same stem, the
    folder's name and ``_`` come before it: ``cat/1.jpg`` is ``cat_1`` if there is a ``dog/1.jpg``.

    Args:
        root: The folder; if None, ``folder`` in ``$CLIPES_DATA``, else in ``datasets/``, or these.
        split: Name of a list of images in ``root``, or path of one; all images if None.
        labels: Label file, see ``read_labels``.
        classes: Class names in mask order; if None those of ``root/classes.txt``, one a line, else
            those that the label file lists, else the names that occur, sorted.
        labelled: False lists the images without looking for labels; the classes may stay unknown.

    Returns:
        The images in the order of the split, else of the label file, else of the file names.

    Raises:
        DatasetError: There are no images, labels or classes, or they cannot be read.
    """
    root = _find(root)
    folder = _image_folder(root)
    names = _known_classes(root, classes)
    here = _images_in(folder)
    below = _images_below(folder, here)
    listed, failures = None, list(here.problems.values())
    if split is not None:
        listed, failures = read_split(root, split, below.ids_by_path)
    path = (labels or find_label_file(root)) if labelled else None
    if path is not None:
        table = read_labels(path, names, listed)
    elif labelled:
        table = _labels_by_folder(folder, below)
    else:
        everything = {**below.names, **here.names}
        rows = {id_: LabelRow(name, ()) for id_, name in everything.items()}
        table = LabelFile(folder, rows, below.problems)
    if labelled and not names:
        names = check_classes(table.names(), str(table.path))
    ids = listed if listed is not None else {**table.rows, **table.problems, **here.paths}
    masks: dict[str, Path] = {}
    for name in reversed(_MASK_FOLDERS):
        masks |= index_files(root / name, ".png")

    def make(id_: str) -> Sample:
        present = table.indices(id_, names) if labelled else ()
        called = table.rows[id_].image if id_ in table.rows else id_
        same_id = here.paths.get(id_) or below.paths.get(id_, [])
        return Sample(id_, _locate(called, (folder, root), same_id), present, masks.get(id_))

    return collect("folder", root, names, ids, make, failures, table.remarks_on(names))


def _find(root: Path | None) -> Path:
    base = find_base(root)
    places = [base] if root is not None else [base / "folder", base]
    for place in places:
        folder = _image_folder(place)
        if list_files(folder, *IMAGE_SUFFIXES) or _class_folders(folder) or find_label_file(place):
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


def _labels_by_folder(folder: Path, images: _Images) -> LabelFile:
    """Return the labels that the names of the sub-folders are."""
    if not images.paths and not images.problems:
        raise DatasetError(
            f"no labels for the images in {folder}: looked for {', '.join(LABEL_FILES)} and for "
            "one sub-folder per class",
            "write a labels.csv with the header 'image,labels', or name a file with --labels",
        )
    rows = {id_: LabelRow(name, (name.split("/")[0],)) for id_, name in images.names.items()}
    return LabelFile(folder, rows, images.problems)


def _images_in(folder: Path) -> _Images:
    """Return the images right in ``folder``."""
    images = _Images()
    for path in list_files(folder, *IMAGE_SUFFIXES):
        name = printable(path.name)
        try:
            id_ = image_id(path.name)
        except DatasetError as error:
            reason = f"{error}; rename it"
            images.problems[name] = Problem(name, reason, Kind.unusable_entry)
            continue
        images.paths.setdefault(id_, []).append(path)
        images.names.setdefault(id_, path.name)
    return images


def _images_below(folder: Path, here: _Images) -> _Images:
    """Return the images in the sub-folders of ``folder``; ``here`` are those right in it."""
    images = _Images()
    found = [(name, path) for name, paths in _class_folders(folder).items() for path in paths]
    places = {(path.stem, name) for name, path in found} | {(stem, "") for stem in here.paths}
    repeated = Counter(stem for stem, _ in places)
    for name, path in found:
        relative = f"{name}/{path.name}"
        try:
            id_ = image_id(f"{name}_{path.name}" if repeated[path.stem] > 1 else path.name)
        except DatasetError as error:
            key = printable(relative)
            images.problems[key] = Problem(key, str(error), Kind.unusable_entry)
            continue
        if id_ in images.paths:
            both = f"{printable(images.names[id_])} and {printable(relative)}"
            reason = f"{both} have one name; rename one, they share their output files"
            images.problems[id_] = Problem(id_, reason, Kind.duplicate_id)
        images.paths.setdefault(id_, []).append(path)
        images.names.setdefault(id_, relative)
        if repeated[path.stem] > 1:
            images.ids_by_path[relative] = id_
    for id_ in images.problems.keys() & images.paths.keys():
        del images.paths[id_], images.names[id_]
    return images


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
        raise ProblemError(
            Kind.missing_image,
            f"no image {printable(name)} in {folders[0]}",
            "add it, or drop its row",
        )
    if len(found) > 1:
        raise ProblemError(
            Kind.duplicate_id,
            f"{' and '.join(path.name for path in found)} in {folders[0]} have one name",
            "rename one, or give the suffix in the label file",
        )
    return found[0]
