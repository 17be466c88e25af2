"""The file of zero-shot tags of a run: labels for a person to look through and correct."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clipes.datasets import Dataset, open_dataset
from clipes.datasets.base import path_id, read_list
from clipes.datasets.tables import delimiter_of, label_words, table_text
from clipes.disk.files import sha256_of, write_text
from clipes.errors import DatasetError
from clipes.run.folder import Run
from clipes.types import Sample

_COLUMNS = ("image", "labels", "scores", "picture")
_DIGITS = 16  # of the picture's sha256
_SHA256 = "sha256:"  # before them: a spreadsheet takes 1234567890123456 or 12e4 for a number
# An older clipes wrote digits alone: if none is a letter, a spreadsheet may have rounded them.
_PICTURE = re.compile(rf"(?:{_SHA256}|(?!\d+$))([0-9a-f]{{{_DIGITS}}})")


def open_tagged(data: Dataset, run: Run, split: str | None) -> Dataset:
    """Open the data set of untagged images ``data`` with the tags of a run as labels."""
    return open_dataset(
        data.name, root=data.root, split=split, labels=run.tags_path, classes=data.classes
    ).without_unlabelled()


@dataclass(frozen=True)
class Tagged:
    """The tags of an image.

    Attributes:
        sample: The image.
        picture: sha256 of its file.
        tags: Probability of each class that it shows, by its number.
    """

    sample: Sample
    picture: str
    tags: Mapping[int, float]


def add_tags(path: Path, tagged: Sequence[Tagged], classes: Sequence[str]) -> None:
    """Write the tags of images into a label file.

    The file has the columns image, labels, scores and picture, the best label first; an image that
    shows none of the classes has empty ones. Other rows and columns stay as they are: a person may
    have corrected them.

    Args:
        path: The label file.
        tagged: The images: of the ``untagged`` ones.
        classes: Class names.

    Raises:
        DatasetError: The label file has lost its columns.
        WriteError: The label file cannot be written.
    """
    again = {one.sample.id for one in tagged}
    table = _read_table(path) if path.exists() else _Table([*_COLUMNS], [])
    header = [*table.header, *(name for name in _COLUMNS if name not in table.at)]
    rows = [row for row in table.rows if _id(table.cell(row, "image")) not in again]
    words = label_words(classes)
    for one in tagged:
        best = sorted(one.tags, key=lambda label: (-one.tags[label], label))
        columns = (words[label] for label in best), (f"{one.tags[label]:.2f}" for label in best)
        name = f"{one.sample.id}{one.sample.image.suffix}"
        cells = (name, *map(";".join, columns), _SHA256 + one.picture[:_DIGITS])
        own = dict(zip(_COLUMNS, cells, strict=True))
        rows.append([own.get(_plain(column), "") for column in header])
    write_text(path, table_text([header, *rows]))


def untagged(samples: Sequence[Sample], path: Path) -> list[Sample]:
    """Return the images that the label file ``path`` does not list as the pictures they are now.

    Rows that do not say which picture they are about, or no longer legibly, count as right.
    """
    table = _read_table(path) if path.exists() else _Table([], [])
    stated = {_id(table.cell(row, "image")): table.cell(row, "picture") for row in table.rows}
    return [s for s in samples if s.id not in stated or not _is_about(stated[s.id], s)]


def _is_about(stated: str, sample: Sample) -> bool:
    digits = _PICTURE.fullmatch(stated.strip())
    try:
        return digits is None or sha256_of(sample.image).startswith(digits[1])
    except OSError:
        return True  # whoever reads it says what is wrong with it


def _id(name: str) -> str:
    try:
        return path_id(name)
    except DatasetError:
        return ""


def _plain(column: str) -> str:
    return column.strip().lower()


@dataclass(frozen=True)
class _Table:
    """A label file that a person may have edited in a spreadsheet.

    Attributes:
        header: Names of its columns, as they are written.
        rows: Its fields, of which empty ones at the end of a row may lack.
    """

    header: list[str]
    rows: list[list[str]]

    @cached_property
    def at(self) -> dict[str, int]:
        """Where each column is; of several of one name the first, as for who reads labels."""
        return {_plain(column): k for k, column in reversed([*enumerate(self.header)])}

    def cell(self, row: Sequence[str], column: str) -> str:
        """Return a field; empty if the row has none there."""
        index = self.at.get(column, len(row))
        return row[index] if index < len(row) else ""


def _read_table(path: Path) -> _Table:
    text = read_list(path)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(text))
    try:
        header, rows = next(lines, []), [row for row in lines if row]
    except csv.Error as error:
        raise DatasetError(f"{path} is no CSV: {error}", "save it again as CSV") from error
    table = _Table(header, rows)
    if not {"image", "labels"} <= table.at.keys():
        raise DatasetError(f"{path} has no header 'image,labels'", "put it on the first line")
    return table
