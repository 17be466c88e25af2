"""What the readers of all label formats return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from clipes.datasets.base import image_id, printable
from clipes.datasets.problems import Problem
from clipes.errors import DatasetError
from clipes.names import folded

Label: TypeAlias = str | int
"""A class as a label file names it: by name, or by number."""


@dataclass(frozen=True)
class RawLabels:
    """The content of a label file, images as it names them.

    Attributes:
        rows: Images with their labels; a text holds labels that are still to be split.
        problems: What is wrong with the entries that are not among ``rows``, by name.
        classes: Class names in order, if the file lists them.
        complete: Whether an image without labels shows none of the classes.
        remarks: How the file was understood where it could be understood otherwise.
    """

    rows: Sequence[tuple[str, str | Sequence[Label]]]
    problems: dict[str, Problem] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    complete: bool = False
    remarks: tuple[str, ...] = ()


def labels_of_classes(stated: Sequence[str], classes: Sequence[str]) -> list[Label]:
    """Return what each class that a file lists is called among the data set's classes.

    By name, in whatever spelling; but a list of the same length in which some or all names are
    others (another language) and the rest stand where they should is taken to be in the same order.
    """
    here, there = list(map(folded, stated)), list(map(folded, classes))
    known = set(here) & set(there)
    in_order = len(stated) == len(classes) and all(
        one == other or not {one, other} & known for one, other in zip(here, there, strict=True)
    )
    return list(range(len(stated))) if in_order else list(stated)


def id_or_text(name: str) -> str:
    """Return the id of the image that is called ``name``, or what can be printed of it."""
    try:
        return image_id(name)
    except DatasetError:
        return printable(name)
