"""Label files: which classes each image shows, as CSV, JSON or plain text."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from clipes.datasets.base import class_index, image_id, printable, read_list, split_line
from clipes.errors import DatasetError

Label: TypeAlias = str | int
"""A class as a label file names it: by name, or by number."""

_Row: TypeAlias = tuple[str, "str | list[Label]"]
_SEPARATOR = re.compile(r"[;|]")


@dataclass(frozen=True)
class LabelRow:
    """What a label file says about one image.

    Attributes:
        image: The image as the file names it.
        labels: Its classes, as the file names them.
    """

    image: str
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class LabelFile:
    """A label file.

    Attributes:
        path: The file.
        rows: Its usable rows by image id, in the order of the file.
        problems: Reasons for the rows that are not usable, by image id or by what stands there.
    """

    path: Path
    rows: dict[str, LabelRow]
    problems: dict[str, str]

    def names(self) -> tuple[str, ...]:
        """Return the class names that occur, sorted.

        Raises:
            DatasetError: All are numbers, so that the names have to come from elsewhere.
        """
        found = {str(label) for row in self.rows.values() for label in row.labels}
        if found and all(name.isdigit() for name in found):
            raise DatasetError(
                f"{self.path} holds class numbers, and the names of the classes are not known",
                "put the names into classes.txt in the root folder, one a line",
            )
        return tuple(sorted(found))

    def indices(self, image: str, classes: tuple[str, ...]) -> tuple[int, ...]:
        """Return the 0-based classes of the image with the id ``image``, without repeats.

        Raises:
            DatasetError: The file says nothing usable about it, or names a class not in
                ``classes``.
        """
        if image in self.problems:
            raise DatasetError(self.problems[image])
        if image not in self.rows or not self.rows[image].labels:
            raise DatasetError(
                f"no labels in {self.path}", "list the classes it shows there, or drop the image"
            )
        try:
            found = [_index(label, classes) for label in self.rows[image].labels]
        except DatasetError as error:
            raise DatasetError(f"{self.path}: {error.what}", error.remedy) from error
        return tuple(dict.fromkeys(found))


def read_labels(path: Path, classes: Collection[str] = ()) -> LabelFile:
    """Read a label file.

    The suffix tells the format:

    - ``.csv`` with the header ``image,labels``; labels separated by ``;``, ``|`` or spaces;
    - ``.json``: ``{image: [labels]}`` or ``[{"image": image, "labels": [labels]}]``;
    - anything else: ``image label label``, one image a line.

    A class name that contains spaces needs known ``classes``, JSON, or a separator other than
    space: a text that holds ``;`` or ``|`` is split there only, and so is a whole file of which at
    least one row does, as long as the classes are unknown.

    Args:
        path: The file.
        classes: The class names, where they are known.

    Raises:
        DatasetError: The file cannot be read or is not in the format its suffix promises.
    """
    text = read_list(path)
    problems: dict[str, str] = {}
    reader = {".csv": _csv_rows, ".json": _json_rows}.get(path.suffix.lower(), _text_rows)
    raw = list(reader(path, text, problems))
    spaced = not classes and any(
        isinstance(labels, str) and _SEPARATOR.search(labels) for _, labels in raw
    )
    rows: dict[str, LabelRow] = {}
    for image, labels in raw:
        try:
            id_ = image_id(image)
        except DatasetError as error:
            problems[printable(image)] = f"{path}: {error}"
            continue
        if id_ in rows:
            both = f"{printable(rows[id_].image)} and {printable(image)}"
            problems[id_] = f"{path} lists it twice, as {both}; remove or rename one"
        found = _split(labels, classes, spaced) if isinstance(labels, str) else labels
        # Where the classes are unknown, a number can only be a name.
        rows[id_] = LabelRow(image, tuple(found if classes else map(str, found)))
    if not raw and not problems:
        raise DatasetError(f"{path} lists no image", "put one image with its labels on each line")
    return LabelFile(path, {k: row for k, row in rows.items() if k not in problems}, problems)


def _index(label: Label, classes: tuple[str, ...]) -> int:
    """Return the index of a class given by name or, where no name fits, by number."""
    if label in classes:
        return classes.index(str(label))
    # int() refuses very long digits, and no class number has more than three.
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) <= 3:
        label = int(label)
    if isinstance(label, str):
        return class_index(label, classes)
    if 0 <= label < len(classes):
        return label
    raise DatasetError(
        f"there is no class {str(label)[:20]}", f"class numbers go from 0 to {len(classes) - 1}"
    )


def _split(text: str, classes: Collection[str], spaced: bool) -> list[Label]:
    """Split a text of labels; ``spaced`` says that a space belongs to a name."""
    if _SEPARATOR.search(text) or spaced or text.strip() in classes:
        return [part.strip() for part in _SEPARATOR.split(text) if part.strip()]
    return list(text.split())


def _csv_rows(path: Path, text: str, problems: dict[str, str]) -> Iterator[_Row]:
    header = text.partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = [name.strip().lower() for name in next(lines, [])]
        if "image" not in columns or "labels" not in columns:
            raise DatasetError(f"{path} has no header 'image,labels'", "put it on the first line")
        image, labels = columns.index("image"), columns.index("labels")
        for fields in lines:
            if len(fields) == len(columns) and fields[image].strip():
                yield fields[image].strip(), fields[labels]
            elif any(field.strip() for field in fields):
                name = fields[image].strip() if image < len(fields) else ""
                problems[_id_or_text(name or f"line {lines.line_num}")] = (
                    f"{path} line {lines.line_num} has {len(fields)} fields where the header has "
                    f"{len(columns)}, or no image; separate labels with ';'"
                )
    except csv.Error as error:
        raise DatasetError(f"{path} is no CSV: {error}", "save it again as CSV") from error


def _text_rows(path: Path, text: str, problems: dict[str, str]) -> Iterator[_Row]:
    for line in text.splitlines():
        if line.strip():
            yield split_line(line)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object that keeps repeated keys."""


def _json_rows(path: Path, text: str, problems: dict[str, str]) -> Iterator[_Row]:
    try:
        value = json.loads(text, object_pairs_hook=_Pairs)
    # Depth and long numbers are bounded by the interpreter, with errors of their own.
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is no JSON: {error}", "correct it") from error
    if not isinstance(value, list):
        raise DatasetError(
            f"{path} holds neither an object nor a list",
            'write {"image.jpg": ["label", ...], ...}',
        )
    for number, entry in enumerate(value, start=1):
        # Each item of an object is a pair; an entry of a list is an object of its own.
        if isinstance(value, _Pairs):
            image, labels = entry
        elif isinstance(entry, _Pairs):
            image, labels = dict(entry).get("image"), dict(entry).get("labels")
        else:
            image = labels = None
        if isinstance(labels, str) or type(labels) is int:
            labels = [labels]
        if (
            not isinstance(image, str)
            or type(labels) is not list
            or any(type(label) not in (str, int) for label in labels)
        ):
            problems[_id_or_text(image if isinstance(image, str) else f"entry {number}")] = (
                f"{path} entry {number} is no image with a list of labels; "
                'write {"image": "a.jpg", "labels": ["cat"]}'
            )
        else:
            yield image, labels


def _id_or_text(name: str) -> str:
    try:
        return image_id(name)
    except DatasetError:
        return printable(name)
