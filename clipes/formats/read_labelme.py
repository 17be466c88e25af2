"""Corrected masks in labelme's files, painted as labelme paints them: later shapes over earlier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clipes.disk.files import list_files
from clipes.disk.records import read_record
from clipes.errors import DatasetError
from clipes.formats.read import Found, check_inside, check_said_size, mask_values, value_of_label
from clipes.formats.written import RECORD
from clipes.types import UInt8Array

_LARGEST = 1 << 27  # bytes; a picture inside is larger than any polygons


@dataclass(frozen=True)
class _Shape:
    label: str
    points: tuple[tuple[float, float], ...]
    shape_type: str = "polygon"


@dataclass(frozen=True)
class _File:
    shapes: tuple[_Shape, ...]
    imageHeight: int | None = None  # noqa: N815 - labelme's names
    imageWidth: int | None = None  # noqa: N815


def read_labelme(path: Path, classes: Sequence[str]) -> Iterator[Found]:
    """Read a folder of labelme's files, each called after its image, or one of them.

    Raises:
        DatasetError: There is none.
    """
    files = [path] if path.is_file() else list_files(path, ".json")
    files = [file for file in files if file.name != RECORD]
    if not files:
        if not path.exists():
            raise DatasetError(f"there is no file or folder {path}", "check the path")
        raise DatasetError(f"no labelme file (*.json) in {path}", "name the folder they are in")
    values = mask_values(classes)
    for file in files:
        yield Found(file.stem, partial(_draw, path=file, values=values))


def _draw(size: tuple[int, int], path: Path, values: Mapping[str, int]) -> UInt8Array:
    remedy = "save it again in labelme"
    content = read_record(path, _File, "the labelme file", remedy, largest=_LARGEST)
    check_said_size((content.imageHeight, content.imageWidth), size)
    canvas = Image.new("L", size[::-1])
    brush = ImageDraw.Draw(canvas)
    for shape in content.shapes:
        value = value_of_label(shape.label, values)
        check_inside(shape.points, size)
        points = list(shape.points)
        if shape.shape_type == "rectangle" and len(points) == 2:
            (left, top), (right, bottom) = points
            points = [(left, top), (right, top), (right, bottom), (left, bottom)]
        elif shape.shape_type != "polygon" or len(points) < 3:
            raise DatasetError(
                f"{path} has a {shape.shape_type} of {len(points)} points",
                "only polygons and rectangles are read; draw it as a polygon",
            )
        brush.polygon(points, fill=value, outline=value)
    return np.array(canvas)
