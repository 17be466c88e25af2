"""Labels as text: CSV, JSON, or one image a line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from clipes.datasets.base import read_list, split_line
from clipes.datasets.problems import Kind, Problem
from clipes.datasets.rows import Label, RawLabels, id_or_text
from clipes.errors import DatasetError

_Row: TypeAlias = tuple[str, "str | list[Label]"]
_Complain: TypeAlias = Callable[[str, str], None]


def read_table(path: Path) -> RawLabels:
    """Read labels in the text format that the suffix tells.

    Raises:
        DatasetError: The file cannot be read or is not in that format.
    """
    problems: dict[str, Problem] = {}

    def complain(image: str, reason: str) -> None:
        name = id_or_text(image)
        problems[name] = Problem(name, f"{path} {reason}", Kind.unusable_entry)

    reader = {".csv": _csv_rows, ".json": _json_rows}.get(path.suffix.lower(), _text_rows)
    return RawLabels(list(reader(path, read_list(path), complain)), problems)


def _csv_rows(path: Path, text: str, complain: _Complain) -> Iterator[_Row]:
    header = text.partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = [name.strip().lower() for name in next(lines, [])]
        if "image" not in columns or "labels" not in columns:
            raise DatasetError(f"{path} has no header 'image,labels'", "put it on the first line")
        image, labels = columns.index("image"), columns.index("labels")
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


def _text_rows(path: Path, text: str, complain: _Complain) -> Iterator[_Row]:
    for line in text.splitlines():
        if line.strip():
            yield split_line(line)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object that keeps repeated keys."""


def _json_rows(path: Path, text: str, complain: _Complain) -> Iterator[_Row]:
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
