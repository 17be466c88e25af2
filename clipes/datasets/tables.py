"""Labels as text: CSV, JSON, or one image a line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from clipes.datasets.base import printable, read_list, split_line, without_suffix
from clipes.datasets.problems import Kind, Problem
from clipes.datasets.rows import Label, RawLabels, id_or_text
from clipes.errors import DatasetError

_Row: TypeAlias = tuple[str, "str | list[Label]"]
_Complain: TypeAlias = Callable[[str, str], None]

_IMAGE_COLUMNS = ("image", "filename", "file_name", "file", "path", "images", "img", "name")
_LABEL_COLUMNS = ("labels", "label", "classes", "class", "tags", "tag", "categories", "category")
"""What people call the columns of a table; the first is what it should be."""


def read_table(path: Path) -> RawLabels:
    """Read labels in the text format that the suffix tells.

    Raises:
        DatasetError: The file cannot be read or is not in that format.
    """
    problems: dict[str, Problem] = {}
    remarks: list[str] = []

    def complain(image: str, reason: str) -> None:
        name = id_or_text(image)
        problems[name] = Problem(name, f"{path} {reason}", Kind.unusable_entry)

    reader = {".csv": _csv_rows, ".json": _json_rows}.get(path.suffix.lower(), _text_rows)
    rows = list(reader(path, read_list(path), complain, remarks.append))
    return RawLabels(rows, problems, remarks=tuple(remarks))


def label_words(classes: Sequence[str]) -> list[str]:
    """Return what a table that is read again calls each class.

    A name that holds a separator would be taken for two; its number is the class all the same.

    >>> label_words(["cat", "cup;mug"])
    ['cat', '1']
    """
    return [str(k) if set(";|") & set(name) else name for k, name in enumerate(classes)]


def table_text(rows: Iterable[Iterable[object]]) -> str:
    """Return rows as CSV."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    return table.getvalue()


def delimiter_of(text: str) -> str:
    """Return what separates the columns of a CSV file: spreadsheets differ."""
    header = text.partition("\n")[0]
    return next((mark for mark in ",;\t" if mark in header), ",")


def _csv_rows(
    path: Path, text: str, complain: _Complain, say: Callable[[str], None]
) -> Iterator[_Row]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(text))
    try:
        columns = [name.strip().lower() for name in next(lines, [])]
        image, labels = _find_columns(path, columns)
        if (columns[image], columns[labels]) != ("image", "labels"):
            say(
                f"{path}: column '{columns[image]}' taken for 'image', '{columns[labels]}' for "
                "'labels'"
            )
        for fields in lines:
            # Spreadsheets leave out empty fields at the end of a row.
            if max(image, labels) < len(fields) <= len(columns) and fields[image].strip():
                yield fields[image].strip(), fields[labels]
            elif any(field.strip() for field in fields):
                name = fields[image].strip() if image < len(fields) else ""
                complain(
                    name or f"line {lines.line_num}",
                    f"line {lines.line_num} has {len(fields)} fields where the header has "
                    f"{len(columns)}, or no image; separate labels with ';'",
                )
    except csv.Error as error:
        raise DatasetError(f"{path} is no CSV: {error}", "save it again as CSV") from error


def _find_columns(path: Path, columns: Sequence[str]) -> tuple[int, int]:
    """Return which columns hold the images and the labels.

    Raises:
        DatasetError: None does, or several may hold labels.
    """
    images = [name for name in _IMAGE_COLUMNS if name in columns]
    labels = [name for name in _LABEL_COLUMNS if name in columns]
    if "labels" in labels:
        labels = ["labels"]
    if images and len(labels) == 1:
        return columns.index(images[0]), columns.index(labels[0])
    first = printable(",".join(columns))
    # A first line that is a row must stay, any other is to be put right.
    if not first or any(without_suffix(name) != name for name in columns):
        raise DatasetError(f"{path} has no header 'image,labels'", "put it on the first line")
    raise DatasetError(
        f"{path}: the first line is '{first}', not 'image,labels'",
        "call the column of the images 'image' there, and that of the labels 'labels'",
    )


def _text_rows(
    path: Path, text: str, complain: _Complain, say: Callable[[str], None]
) -> Iterator[_Row]:
    for line in text.splitlines():
        if line.strip():
            yield split_line(line)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object that keeps repeated keys."""


def _json_rows(
    path: Path, text: str, complain: _Complain, say: Callable[[str], None]
) -> Iterator[_Row]:
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
        if type(labels) is int:
            labels = [labels]
        listed = type(labels) is list and all(type(label) in (str, int) for label in labels)
        if not isinstance(image, str) or not (listed or isinstance(labels, str)):
            complain(
                image if isinstance(image, str) else f"entry {number}",
                f"entry {number} is no image with a list of labels; "
                'write {"image": "a.jpg", "labels": ["cat"]}',
            )
        else:
            yield image, labels
