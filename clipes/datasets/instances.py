"""COCO's instances files: JSON of hundreds of megabytes, read as a stream.

An instances file holds three lists: ``images`` (id, file_name, height, width), ``annotations``
(image_id, category_id, segmentation, iscrowd, area) and ``categories`` (id, name). Only one entry
is in memory at a time; what is kept grows with the number of images, not with the outlines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import ijson

from clipes.datasets.base import printable
from clipes.datasets.problems import Kind, Problem
from clipes.datasets.rows import RawLabels, id_or_text, labels_of_classes
from clipes.errors import DatasetError

ImageKey: TypeAlias = int | str
"""How an instances file tells its images apart."""

_LISTS = ("images", "annotations", "categories")
_REMEDY = "give an instances file, such as instances_train2014.json"
_CHUNK = 1 << 18  # bytes
_DEEPEST = 100


@dataclass(frozen=True)
class Picture:
    """An entry of ``images``.

    Attributes:
        name: Its file name.
        size: (height, width), or None where the file does not say.
    """

    name: str
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Header:
    """All of an instances file but the annotations.

    Attributes:
        path: The file.
        pictures: Images by id.
        categories: Names of the categories by id, ids ascending: the order of the classes.
    """

    path: Path
    pictures: dict[ImageKey, Picture]
    categories: dict[int, str]


def is_instances(path: Path) -> bool:
    """Tell from the beginning of a JSON file whether it is an instances file.

    Raises:
        DatasetError: The file cannot be read.
    """
    depth, key, in_list = 0, "", False
    try:
        for event, value in _events(path):
            if event.startswith("start_"):
                if depth == 0 and event == "start_array":
                    return False
                if depth == 2 and in_list and key in _LISTS:
                    return event == "start_map"
                in_list = event == "start_array" if depth == 1 else in_list
                depth += 1
            elif event.startswith("end_"):
                depth -= 1
            elif event == "map_key":
                key = str(value) if depth == 1 else key
            elif depth == 2 and in_list:
                return False  # {"image.jpg": ["label"]}
    except _NotJsonError:
        return False
    return False


def read_header(
    path: Path, on_annotation: Callable[[dict[str, Any]], None] | None = None
) -> Header:
    """Read the images and categories of an instances file.

    Args:
        path: The file.
        on_annotation: Called with each annotation, in the order of the file.

    Raises:
        DatasetError: The file is no instances file, or lists no image or no category.
    """
    pictures: dict[ImageKey, Picture] = {}
    categories: dict[int, str] = {}
    for kind, entry in _entries(path):
        key = entry.get("id")
        if kind == "annotations":
            if on_annotation is not None:
                on_annotation(entry)
        elif kind == "images":
            name = entry.get("file_name")
            if not is_key(key) or not isinstance(name, str) or key in pictures:
                number = len(pictures) + 1
                raise DatasetError(f"{path}: image {number} has no id of its own or no file_name")
            height, width = entry.get("height"), entry.get("width")
            size = None
            if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
                size = height, width
            pictures[key] = Picture(name, size)
        elif kind == "categories":
            name = entry.get("name")
            if type(key) is not int or not isinstance(name, str) or key in categories:
                number = len(categories) + 1
                raise DatasetError(f"{path}: category {number} has no id of its own or no name")
            categories[key] = name
    for kind, found in (("images", pictures), ("categories", categories)):
        if not found:
            raise DatasetError(f"{path} has no list '{kind}'", _REMEDY)
    return Header(path, pictures, dict(sorted(categories.items())))


def read_annotations(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the annotations of an instances file, in its order.

    Raises:
        DatasetError: The file is no JSON.
    """
    return (entry for kind, entry in _entries(path) if kind == "annotations")


def instance_rows(path: Path, classes: Sequence[str]) -> RawLabels:
    """Read which categories each image has annotations of, crowds included.

    Args:
        path: The file.
        classes: The class names, where they are known. Categories are found among them by name; if
            their names differ but their number does not, the category with the k-th smallest id is
            class k (COCO's ids go from 1 to 90, its classes from 0 to 79).

    Raises:
        DatasetError: The file is no instances file.
    """
    present: dict[ImageKey, dict[Any, None]] = {}

    def note(annotation: dict[str, Any]) -> None:
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if not is_key(image) or not is_key(category):
            raise DatasetError(f"{path}: an annotation has no image_id or no category_id", _REMEDY)
        present.setdefault(image, {})[category] = None

    header = read_header(path, note)
    names = tuple(header.categories.values())
    labels = dict(zip(header.categories, labels_of_classes(names, classes), strict=True))
    rows, problems = [], {}
    for key, picture in header.pictures.items():
        shown = present.pop(key, {})
        unknown = [category for category in shown if category not in labels]
        if unknown:
            name = id_or_text(picture.name)
            reason = (
                f"{path} gives it category {printable(str(unknown[0]))}, which it does not list"
            )
            problems[name] = Problem(name, reason, Kind.unknown_class)
        else:
            rows.append((picture.name, [labels[category] for category in shown]))
    if present:
        reason = f"{path} has annotations of {len(present)} images that it does not list"
        problems["annotations"] = Problem("annotations", reason, Kind.unusable_entry)
    return RawLabels(rows, problems, names, complete=True)


class _NotJsonError(DatasetError):
    """What is read is no JSON, or JSON that nobody writes."""


def _events(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the tokens of a JSON file."""
    try:
        with path.open("rb") as file:
            yield from ijson.basic_parse(file, use_float=True, buf_size=_CHUNK)
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error}", "check the path") from error
    except (ijson.JSONError, ValueError) as error:
        raise _NotJsonError(f"{path} is no JSON: {error}", "get the file again") from error


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of the lists in the outermost object, each with the name of its list."""
    # ijson.items keeps the path to each value, which grows with the square of the depth: 100 kB of
    # brackets take more than 3 GB. A depth that is checked before it needs as many lines as this.
    outside, name, key = 0, "", ""
    entry: list[Any] | dict[str, Any] | None = None
    above: list[list[Any] | dict[str, Any]] = []
    for event, value in _events(path):
        opens = event == "start_map" or event == "start_array"
        if entry is None:
            if opens and event == "start_map" and outside == 2:
                entry = {}
            elif opens:
                outside += 1
            elif event == "map_key":
                name = value if outside == 1 else name
            elif event in ("end_map", "end_array"):
                outside -= 1
        elif event == "map_key":
            key = value
        elif event in ("end_map", "end_array"):
            if above:
                entry = above.pop()
            elif isinstance(entry, dict):
                yield name, entry
                entry = None
        else:
            new: Any = ({} if event == "start_map" else []) if opens else value
            if isinstance(entry, list):
                entry.append(new)
            else:
                entry[key] = new
            if opens:
                above.append(entry)
                entry = new
                if len(above) > _DEEPEST:
                    raise _NotJsonError(f"{path} nests deeper than {_DEEPEST} levels", _REMEDY)


def is_key(value: object) -> TypeGuard[ImageKey]:
    """Tell whether a value of an instances file can be the id of an image."""
    return type(value) in (int, str)
