"""Masks that a person corrected in another tool, read back from its files.

A reader yields images as the tool names them, each with what draws its mask once the size of the
picture is known. What is wrong with one image is told when it is drawn; the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from clipes.datasets.base import printable
from clipes.errors import DatasetError
from clipes.formats.base import BACKGROUND_LABELS, IGNORE_LABEL
from clipes.masks.values import value_of
from clipes.types import IGNORE, UInt8Array, size_text


@dataclass(frozen=True)
class Found:
    """One image of a tool's file.

    Attributes:
        name: What the file calls it: a path, a file name or an id.
        draw: Returns its (H, W) mask for the size (H, W) of the picture, or raises a
            ``ClipesError``: the file has another size, a class that the run has not, or shapes
            that cannot be drawn.
    """

    name: str
    draw: Callable[[tuple[int, int]], UInt8Array]


Reader: TypeAlias = Callable[[Path, Sequence[str]], Iterator[Found]]
"""Reads a file or folder, given the class names in mask order; raises a ``ClipesError`` if it is
none of the format."""


def mask_values(classes: Sequence[str]) -> dict[str, int]:
    """Return the values in masks by the names of labels; a class goes before what is its like."""
    others = {**dict.fromkeys(BACKGROUND_LABELS, 0), IGNORE_LABEL: IGNORE}
    return {**others, **{name: value_of(label) for label, name in enumerate(classes)}}


def value_of_label(name: object, values: Mapping[str, int]) -> int:
    """Return the value of a label.

    Raises:
        DatasetError: There is no such label.
    """
    if not isinstance(name, str) or name not in values:
        raise DatasetError(
            f"the label '{printable(str(name))}' is none of the run's classes", "rename it there"
        )
    return values[name]


def check_said_size(said: tuple[object, object], size: tuple[int, int]) -> None:
    """Refuse an image of which a file says another (H, W) than it has; None is not said.

    Raises:
        DatasetError: It does.
    """
    if said != (None, None) and said != size:
        told = " x ".join(printable(str(number)) for number in said)
        raise DatasetError(
            f"it is {told} in the file, the picture {size_text(size)}",
            "turn or resize neither of them; --upright exports pictures as the masks see them",
        )


def check_inside(points: Sequence[tuple[float, float]], size: tuple[int, int]) -> None:
    """Refuse corners that lie more than a pixel outside the picture.

    Args:
        points: x, y.
        size: (H, W).

    Raises:
        DatasetError: One does.
    """
    height, width = size
    for x, y in points:
        if not (-1 <= x <= width + 1 and -1 <= y <= height + 1):
            raise DatasetError(
                f"a shape has a corner at {x:g}, {y:g}, outside the picture of {size_text(size)}",
                "it was drawn on another picture",
            )
