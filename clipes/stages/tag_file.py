"""The file of zero-shot tags of a run: labels for a person to look through and correct."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from clipes.datasets import Dataset, open_dataset
from clipes.datasets.base import path_id, read_list
from clipes.datasets.tables import delimiter_of, label_words, table_text
from clipes.disk.files import sha256_of, write_text
from clipes.errors import DatasetError
from clipes.listener import Listener
from clipes.run.folder import Run
from clipes.run.loop import Summary, for_each
from clipes.run.origin import read_picture
from clipes.types import Float32Array, Sample, UInt8Array

_COLUMNS = ("image", "labels", "scores", "picture")
_DIGITS = 16  # of the picture's sha256
_SECONDS_BETWEEN_WRITES = 20.0


def open_tagged(data: Dataset, run: Run, split: str | None) -> Dataset:
    """Open the data set of untagged images ``data`` with the tags of a run as labels."""
    return open_dataset(
        data.name, root=data.root, split=split, labels=run.tags_path, classes=data.classes
    ).without_unlabelled()


def make_tags(
    todo: Sequence[Sample],
    classes: Sequence[str],
    tagger: Callable[[UInt8Array], Float32Array],
    choose: Callable[[Float32Array], Sequence[int]],
    path: Path,
    listener: Listener,
) -> Summary:
    """Tag images, in the label file ``path``.

    The file has the columns image, labels, scores and picture, the best label first; an image that
    shows none of the classes has empty ones. Other rows stay as they are: a person may have
    corrected them.

    Args:
        todo: The images to tag: the ``untagged`` ones.
        classes: Class names, in the order of the scores.
        tagger: Scores the classes of an image.
        choose: Chooses the tags by their scores, the best first.
        path: The label file; it is written every few seconds, so that little is lost.
        listener: Who is told of images that cannot be tagged, and how it goes.

    Raises:
        DatasetError: The label file has lost its columns.
        WriteError: The label file cannot be written.
    """
    again = {sample.id for sample in todo}
    rows = [row for row in _read_rows(path) if _id(row[0]) not in again] if path.exists() else []
    words = label_words(classes)
    written = time.monotonic()

    def tag(sample: Sample) -> None:
        nonlocal written
        pixels, picture = read_picture(sample.image)
        scores = tagger(pixels)
        tags = choose(scores)
        columns = (words[k] for k in tags), (f"{scores[k]:.2f}" for k in tags)
        name = f"{sample.id}{sample.image.suffix}"
        rows.append([name, *map(";".join, columns), picture.sha256[:_DIGITS]])
        if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
            write_text(path, table_text([_COLUMNS, *rows]))
            written = time.monotonic()

    with listener.progress("tag") as progress:
        summary = for_each(tag, todo, progress=progress, report=listener.report)
    if todo:
        write_text(path, table_text([_COLUMNS, *rows]))
    return summary


def untagged(samples: Sequence[Sample], path: Path) -> list[Sample]:
    """Return the images that the label file ``path`` does not list as the pictures they are now.

    Rows that do not say which picture they are about count as right.
    """
    rows = {_id(row[0]): row for row in _read_rows(path)} if path.exists() else {}
    return [s for s in samples if s.id not in rows or not _is_about(rows[s.id], s)]


def _is_about(row: Sequence[str], sample: Sample) -> bool:
    stated = row[_COLUMNS.index("picture")].strip()
    try:
        return not stated or sha256_of(sample.image).startswith(stated)
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
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise DatasetError(f"{path} is no CSV: {error}", "save it again as CSV") from error
    if not {"image", "labels"} <= set(text.partition("\n")[0].strip().split(delimiter)):
        raise DatasetError(f"{path} has no header 'image,labels'", "put it on the first line")
    return [[row.get(column) or "" for column in _COLUMNS] for row in rows]
