"""Any folder of images, with a label file or with one sub-folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipes.datasets.base import (
    IMAGE_SUFFIXES,
    Dataset,
    check_classes,
    collect,
    find_base,
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
from clipes.datasets.pictures import IMAGE_FOLDERS, Pictures, count_text, find_masks, find_pictures
from clipes.datasets.problems import Kind, Problem
from clipes.disk.files import list_files
from clipes.errors import DatasetError
from clipes.types import Sample


def open_folder(
    *,
    root: Path | None = None,
    split: str | None = None,
    labels: Path | None = None,
    classes: tuple[str, ...] | None = None,
    labelled: bool = True,
) -> Dataset:
    """List the images of any folder.

    Images lie in and below ``root/images``, else ``root/JPEGImages``, else ``root``. Their labels
    come from ``labels``, else from ``labels.csv``, ``.json``, ``.txt`` or ``.npz`` in ``root``,
    else from the first of the sub-folders that they lie in, one per class. Masks come from
    ``masks``, ``SegmentationClassAug`` or ``SegmentationClass`` in ``root``, under the image's id
    or path.

    The id of an image is its path below the folder of the images, without suffix, joined by ``_``:
    ``cat/1.jpg`` is ``cat_1``. So no image changes the id of another.

    Args:
        root: The folder; if None, ``folder`` in ``$CLIPES_DATA``, else in ``datasets/``, or these.
        split: Name of a list of images in ``root``, or path of one; all images if None.
        labels: Label file, see ``read_labels``; what a row may call an image says
            ``Pictures.id_of``.
        classes: Class names in mask order; if None those of ``root/classes.txt``, one a line, else
            those that the label file lists, else the names that occur, sorted.
        labelled: False lists the images without looking for labels; the classes may stay unknown.

    Returns:
        The images in the order of the split, else of the label file, else of the file names.

    Raises:
        DatasetError: There are no images, labels or classes, or they cannot be read.
    """
    pictures = _find(root)
    root = pictures.root
    names = _known_classes(root, classes)
    listed: list[str] | None = None
    failures: Sequence[Problem] = ()
    if split is not None:
        listed, failures = read_split(root, split, pictures.id_of)
    path = (labels or find_label_file(root)) if labelled else None
    if path is not None:
        table = read_labels(path, names, listed, pictures.id_of, pictures.same)
        # Sub-folders may hold pictures that are not meant; those beside the meant ones are.
        known = {id_: "" for file, id_ in pictures.ids.items() if "/" not in file}
        bad = [item for file, item in pictures.problems.items() if "/" not in file]
    else:
        table = _labels_by_folder(pictures) if labelled else _no_labels(pictures)
        known, bad = dict.fromkeys(pictures.ids.values(), ""), list(pictures.problems.values())
    if labelled and not names:
        names = check_classes(_names(table), str(table.path))
    ids = listed if listed is not None else {**table.rows, **table.problems, **known}
    masks, about_masks = find_masks(root, pictures)

    def make(id_: str) -> Sample:
        if labelled and id_ not in table.rows and id_ not in table.problems:
            pictures.locate(id_)  # an image that is not there needs no labels
        present = table.indices(id_, names) if labelled else ()
        row = table.rows.get(id_) if path is not None else None
        image = pictures.locate(id_, row.image if row else None)
        return Sample(id_, image, present, masks.get(image))

    failures = failures if split is not None else bad
    data = collect("folder", root, names, ids, make, failures, table.remarks_on(names))
    remarks = [] if split is not None else _remarks(pictures, data, path, labelled=labelled)
    return replace(data, remarks=(*data.remarks, *remarks, *about_masks))


def _find(root: Path | None) -> Pictures:
    """Return the pictures of the folder that was named, or of a usual one."""
    base = find_base(root)
    _refuse_run(base)
    places = [base] if root is not None else [base / "folder", base]
    seen: list[str] = []
    for place in places:
        # Where no folder is named, other data sets may lie in the last place: further down.
        named = root is not None or place != base or find_label_file(place) is not None
        pictures = find_pictures(place, deepest=64 if named else 1)
        if pictures.ids or pictures.problems or find_label_file(place) is not None:
            return pictures
        seen += pictures.remarks()
    looked = (
        f"no images: looked for {', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)} files in "
        f"{', '.join(map(str, places))} and their sub-folders"
    )
    raise DatasetError("; ".join([looked, *seen]), "name the folder with --root or CLIPES_DATA")


def _refuse_run(root: Path) -> None:
    """Refuse a run folder, unless photos lie in it, too: its masks would be taken for photos.

    Raises:
        DatasetError: It is one.
    """
    if not (root / "run.json").is_file() or any((root / name).is_dir() for name in IMAGE_FOLDERS):
        return
    if not list_files(root, *IMAGE_SUFFIXES):
        raise DatasetError(
            f"{root} is a run folder, its pictures are masks",
            "name the folder of the photos with --root",
        )


def _known_classes(root: Path, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the class names the user states, empty if none."""
    if classes is not None:
        return check_classes(classes, "the list of classes")
    path = root / "classes.txt"
    if not path.is_file():
        return ()
    lines = [line.strip() for line in read_list(path).splitlines()]
    return check_classes([line for line in lines if line], str(path))


def _names(table: LabelFile) -> tuple[str, ...]:
    """Return the class names that a label file lists or uses."""
    if not table.rows and table.problems:
        first = next(iter(table.problems.values()))
        raise DatasetError(
            f"{table.path} says nothing usable about any image; the first of "
            f"{len(table.problems)} problems: {first.id}: {first.reason}"
        )
    names = table.names()
    if not names:
        raise DatasetError(
            f"{table.path} gives no image a label",
            "write an image and its labels on each line, in a .txt a space or tab after the image, "
            "in a .csv the labels in the column 'labels'",
        )
    return names


def _no_labels(pictures: Pictures) -> LabelFile:
    return LabelFile(pictures.folder, {}, {})


def _labels_by_folder(pictures: Pictures) -> LabelFile:
    """Return the labels that the names of the sub-folders are."""
    folder = pictures.folder
    below = [path for path in pictures.ids if "/" in path]
    if not below and not any("/" in path for path in pictures.problems):
        raise DatasetError(
            f"no labels for the images in {folder}: looked for {', '.join(LABEL_FILES)} and for "
            "one sub-folder per class",
            "write a labels.csv with the header 'image,labels', or name a file with --labels",
        )
    # Where no image lies right in a folder of the first level, train/cat/1.jpg is as likely as
    # cat/monday/1.jpg, and nothing says which level is the class.
    if below and len(_deeper(below)) == len(below):
        raise DatasetError(
            f"no image lies right in a sub-folder of {folder} that would be its class: the first "
            f"is {printable(below[0])}",
            "name the folder that holds the folders of the classes with --root, or write a "
            "labels.csv",
        )
    rows = {pictures.ids[path]: LabelRow(path, (path.split("/")[0],)) for path in below}
    beside = {
        id_: Problem(
            id_,
            f"{folder / printable(path)} lies beside the folders of the classes; move it into that "
            "of its class",
            Kind.no_labels,
        )
        for path, id_ in pictures.ids.items()
        if "/" not in path and id_ not in rows
    }
    return LabelFile(folder, rows, beside)


def _deeper(paths: Sequence[str]) -> list[str]:
    """Return the images that do not lie right in the folder of their class."""
    return [path for path in paths if path.count("/") > 1]


def _remarks(pictures: Pictures, data: Dataset, path: Path | None, *, labelled: bool) -> list[str]:
    """Return what was seen and not used, and what was taken for something."""
    used = {sample.image for sample in data.samples}
    lines = pictures.remarks(used)
    told = {*(failure.id for failure in data.failures), *data.empty}
    unused = pictures.unused(used, told) if path is not None else []
    if path is not None and unused:
        lines.append(
            f"{count_text(unused)} not used: no row of {path.name} names them, the first is "
            f"{pictures.folder / printable(unused[0])}"
        )
    deeper = _deeper(list(pictures.ids)) if path is None and labelled else []
    if deeper:
        first = printable(deeper[0])
        lines.append(
            f"{count_text(deeper)} deeper than one folder per class, such as {first}: taken for "
            f"'{first.split('/')[0]}'"
        )
    return lines
