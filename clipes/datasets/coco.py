"""COCO 2014, and data sets laid out like it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from clipes.datasets.base import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    Dataset,
    check_classes,
    collect,
    find_base,
    find_split,
    image_id,
    index_files,
    read_split,
)
from clipes.datasets.labels import LabelFile, LabelRow, find_label_file, read_labels
from clipes.datasets.pictures import flat_mask_remarks, not_read, not_there
from clipes.datasets.problems import Kind, Problem, ProblemError
from clipes.errors import DatasetError, SplitError
from clipes.types import Sample

COCO_CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack"),
    *("umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball"),
    *("kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket"),
    *("bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair"),
    *("couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse"),
    *("remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
    *("refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier"),
    "toothbrush",
)
"""The 80 classes of COCO in the order of their category ids (which go from 1 to 90, with gaps)."""

MASK_FOLDER = "SegmentationClass"
"""Where masks drawn from annotations go, in the folder of the data set."""

_PLACES = ("", "coco", "coco2014", "COCO2014", "COCO", "coco/2014", "MSCOCO")
_SPLITS = ("train", "val")
_MASK_FOLDERS = ("masks", MASK_FOLDER)
_NUMBERED = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{1,12})")


@dataclass(frozen=True)
class _Part:
    """Which images of the data set are meant.

    Attributes:
        names: Splits they are from: train, val or both.
        ids: The images, if a list says which.
        failures: What is wrong with the list.
    """

    names: tuple[str, ...]
    ids: list[str] | None
    failures: list[Problem]


def open_coco(
    *,
    root: Path | None = None,
    split: str | None = None,
    labels: Path | None = None,
    classes: tuple[str, ...] | None = None,
    labelled: bool = True,
) -> Dataset:
    """List the images of COCO 2014, or of a data set laid out like it.

    Images lie in ``train2014`` and ``val2014``, in ``root`` or in ``images`` or ``JPEGImages``
    there, or in ``JPEGImages`` itself. Labels come from ``labels``, else from
    ``annotations/instances_<split>2014.json``, else from a label file in ``root``. Masks come from
    ``SegmentationClass`` or ``masks``, or from a folder for each split there.

    ``COCO_train2014_000000000009`` and ``000000000009`` are the same image to lists, labels and
    masks; the id of a sample is the stem of its file name.

    Args:
        root: The folder of the data set, or the one above; if None, ``$CLIPES_DATA``, else
            ``datasets/``.
        split: ``train`` (if None) or ``val``, or the name or path of a list of images.
        labels: Label file, see ``read_labels``.
        classes: Class names in mask order; COCO's if None.
        labelled: False lists the images without looking for labels.

    Returns:
        The images in the order of the list, else of the label file. Images that an instances file
        gives no annotation are ``empty``: 702 of train2014 are.

    Raises:
        DatasetError: The data set, its split or its labels are not there.
    """
    root = find_coco(root)
    names = COCO_CLASSES if classes is None else check_classes(classes, "classes")
    part = _read_part(root, split)
    images = _index(_image_folders(root, part), *IMAGE_SUFFIXES)
    unread = _index(_image_folders(root, part), *UNREAD_SUFFIXES)
    capitals = {known.casefold(): known for known in images}
    if not images:
        places = ", ".join(map(str, _image_folders(root, part)))
        error = DatasetError if split is None else SplitError
        raise error(
            f"no images: looked in {places}", "download them, or choose another list of images"
        )
    table = _read_labels(root, part, labels, names) if labelled else None
    folders = [root / name for name in _MASK_FOLDERS]
    folders += [f / f"{n}2014" for f in folders for n in _SPLITS]
    masks = _index(folders, ".png")
    if part.ids is not None:
        keys = dict.fromkeys(map(image_key, part.ids))
    else:
        known = {**table.rows, **table.problems} if table is not None else {}
        keys = dict.fromkeys([*known, *images])

    def make(key: str) -> Sample:
        if table is not None and (key in table.rows or key in table.problems):
            table.indices(key, names)  # what is wrong with its labels is told first
        if key not in images and key in unread:
            raise not_read(unread[key])
        if key not in images:
            raise not_there(key, root, capitals.get(key.casefold()), "it from the list")
        present = table.indices(key, names) if table is not None else ()
        try:
            id_ = image_id(images[key].name)
        except DatasetError as error:
            raise ProblemError(Kind.unusable_entry, f"{error}; rename it") from error
        return Sample(id_, images[key], present, masks.get(key))

    remarks = table.remarks if table is not None else ()
    data = collect("coco", root, names, keys, make, part.failures, remarks)
    used = {sample.mask for sample in data.samples}
    about_masks = flat_mask_remarks(folders, used, next(iter(keys), "IMAGE"))
    return replace(data, remarks=(*data.remarks, *about_masks))


def find_coco(root: Path | None) -> Path:
    """Return the folder of the data set: ``root`` or one of the usual ones below it.

    Raises:
        DatasetError: There is none.
    """
    base = find_base(root)
    places = [base / place for place in _PLACES]
    for place in places:
        if any(folder.is_dir() for folder in _image_folders(place, _Part(_SPLITS, [], []))):
            return place
    raise DatasetError(
        f"no COCO data set: looked for a folder train2014, val2014 or JPEGImages in "
        f"{', '.join(map(str, places))}",
        "download COCO 2014 (cocodataset.org) and name its folder with --root or CLIPES_DATA",
    )


def instance_files(root: Path, split: str | None) -> list[Path]:
    """Return the instances files of a split of the data set in ``root``."""
    return _instance_files(root, _read_part(root, split).names)


def image_key(id_: str) -> str:
    """Return what the names of one image have in common: its number, in 12 digits.

    >>> image_key("COCO_train2014_000000000009"), image_key("9"), image_key("my_photo")
    ('000000000009', '000000000009', 'my_photo')
    """
    match = _NUMBERED.fullmatch(id_)
    return match[1].zfill(12) if match and match[1].isascii() else id_


def _read_part(root: Path, split: str | None) -> _Part:
    name = (split or "train").removesuffix("2014")
    if find_split(root, split or name) is None and name in _SPLITS:
        part = _Part((name,), None, [])
        # A folder of images that is not divided is taken for training images.
        if name == "train" or any(folder.is_dir() for folder in _split_folders(root, name)):
            return part
    ids, failures = read_split(root, split or name)
    return _Part((name,) if name in _SPLITS else _SPLITS, ids, failures)


def _split_folders(root: Path, name: str) -> list[Path]:
    return [
        root / parent / folder
        for parent in ("", "images", "JPEGImages")
        for folder in (f"{name}2014", name)
    ]


def _image_folders(root: Path, part: _Part) -> list[Path]:
    folders = [folder for name in part.names for folder in _split_folders(root, name)]
    if part.ids is None and any(folder.is_dir() for folder in folders):
        return folders
    return [*folders, root / "JPEGImages", root / "images"]


def _instance_files(root: Path, names: Iterable[str]) -> list[Path]:
    folder = root / "annotations"
    paths = [folder / f"instances_{name}2014.json" for name in names]
    return [path for path in paths if path.is_file()]


def _read_labels(root: Path, part: _Part, labels: Path | None, names: tuple[str, ...]) -> LabelFile:
    paths = [labels] if labels is not None else _instance_files(root, part.names)
    if not paths:
        found = find_label_file(root)
        if found is None:
            wanted = ", ".join(f"instances_{name}2014.json" for name in part.names)
            raise DatasetError(
                f"no labels: looked for {wanted} in {root / 'annotations'} and for a label file in "
                f"{root}",
                "download the annotations (cocodataset.org), or name a label file with --labels",
            )
        paths = [found]
    tables = [_by_key(read_labels(path, names, part.ids)) for path in paths]
    rows = {key: row for table in tables for key, row in table.rows.items()}
    problems = {key: problem for table in tables for key, problem in table.problems.items()}
    remarks = tuple(remark for table in tables for remark in table.remarks_on(names))
    complete = all(table.complete for table in tables)
    return LabelFile(paths[0], rows, problems, names, complete=complete, remarks=remarks)


def _by_key(table: LabelFile) -> LabelFile:
    """Return a label file with its images under what their names have in common."""
    problems = {image_key(id_): problem for id_, problem in table.problems.items()}
    rows: dict[str, LabelRow] = {}
    for id_, row in table.rows.items():
        key = image_key(id_)
        if key in rows:
            reason = f"{table.path} lists it twice, as {rows[key].image} and {row.image}"
            problems[key] = Problem(key, f"{reason}; remove one", Kind.duplicate_id)
        rows[key] = row
    rows = {key: row for key, row in rows.items() if key not in problems}
    return replace(table, rows=rows, problems=problems)


def _index(folders: Iterable[Path], *suffixes: str) -> dict[str, Path]:
    """Return files by what their names have in common; of several, that of the first folder."""
    found: dict[str, Path] = {}
    for folder in folders:
        for id_, path in index_files(folder, *suffixes).items():
            found.setdefault(image_key(id_), path)
    return found
