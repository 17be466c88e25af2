"""The file of zero-shot tags of a run: labels for a person to look through and correct."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
_PICTURE = re.compile(
    rf"(?:{_SHA256})?([0-9a-f]{{{_DIGITS}}})"
)  # an older clipes wrote digits alone


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
    shows none of the classes has empty ones. Other rows stay as they are: a person may have
    corrected them.

    Args:
        path: The label file.
        tagged: The images: of the ``untagged`` ones.
        classes: Class names.

    Raises:
        DatasetError: The label file has lost its columns.
        WriteError: The label file cannot be written.
    """
    again = {one.sample.id for one in tagged}
    rows = [row for row in _read_rows(path) if _id(row[0]) not in again] if path.exists() else []
    words = label_words(classes)
    for one in tagged:
        best = sorted(one.tags, key=lambda label: (-one.tags[label], label))
        columns = (words[label] for label in best), (f"{one.tags[label]:.2f}" for label in best)
        name = f"{one.sample.id}{one.sample.image.suffix}"
        rows.append([name, *map(";".join, columns), _SHA256 + one.picture[:_DIGITS]])
    write_text(path, table_text([_COLUMNS, *rows]))


def untagged(samples: Sequence[Sample], path: Path) -> list[Sample]:
    """Return the images that the label file ``path`` does not list as the pictures they are now.

    Rows that do not say which picture they are about, or no longer legibly, count as right.
    """
    rows = {_id(row[0]): row for row in _read_rows(path)} if path.exists() else {}
    return [s for s in samples if s.id not in rows or not _is_about(rows[s.id], s)]


def _is_about(row: Sequence[str], sample: Sample) -> bool:
    stated = _PICTURE.fullmatch(row[_COLUMNS.index("picture")].strip())
    try:
        return stated is None or sha256_of(sample.image).startswith(stated[1])
    except OSError:
        return True  # whoever reads it says what is wrong with it


def _id(name: str) -> str:
    try:
        return path_id(name)
    except DatasetError:
        return ""


def _read_rows(path: Path) -> list[list[str]]:
    """Read the columns of a label file that a person may have edited in a spreadsheet."""
    text = read_list(path)
    delimiter = delimiter_of(text)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = list(reader)
    except csv.Error as error:
        raise DatasetError(f"{path} is no CSV: {error}", "save it again as CSV") from error
    if not {"image", "labels"} <= set(reader.fieldnames or ()):
        raise DatasetError(f"{path} has no header 'image,labels'", "put it on the first line")
    return [[row.get(column) or "" for column in _COLUMNS] for row in rows]
