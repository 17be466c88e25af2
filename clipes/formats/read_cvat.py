"""Corrected masks in CVAT's ``annotations.xml``, "CVAT for images 1.1": masks, polygons and boxes.

They are painted by their ``z_order``, then in the order of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias
from xml.etree.ElementTree import ParseError

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import iterparse

from clipes.datasets.base import printable
from clipes.datasets.outlines import parse_outline
from clipes.errors import DatasetError
from clipes.formats.cvat import FILE
from clipes.formats.read import Found, check_inside, check_said_size, mask_values, value_of_label
from clipes.types import UInt8Array

_Shape: TypeAlias = tuple[str, dict[str, str]]
_LABELS_ALONE = ("tag",)  # which say nothing of where


def read_cvat(path: Path, classes: Sequence[str]) -> Iterator[Found]:
    """Read an ``annotations.xml``, or the folder that one is in.

    Raises:
        DatasetError: It is no such file.
    """
    file, values = path / FILE if path.is_dir() else path, mask_values(classes)
    try:
        for _, element in iterparse(file):
            if element.tag == "image":
                shapes = [(child.tag, dict(child.attrib)) for child in element]
                about = {key: element.get(key) for key in ("height", "width")}
                said = (_whole(about["height"]), _whole(about["width"]))
                draw = partial(_draw, said=said, shapes=shapes, values=values)
                yield Found(element.get("name", ""), draw)
                element.clear()
    except (OSError, ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise DatasetError(
            f"cannot read {file}: {error}",
            "give annotations.xml of a 'CVAT for images 1.1' export, out of its zip file",
        ) from error


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 10 else None


def _draw(
    size: tuple[int, int],
    said: tuple[int | None, int | None],
    shapes: Sequence[_Shape],
    values: Mapping[str, int],
) -> UInt8Array:
    check_said_size(said, size)
    mask: UInt8Array = np.zeros(size, np.uint8)
    for kind, about in sorted(shapes, key=lambda shape: _number(shape[1].get("z_order", "0"))):
        if kind in _LABELS_ALONE:
            continue
        value = value_of_label(about.get("label"), values)
        if kind == "mask":
            _paint_runs(mask, about, value)
        elif kind in ("polygon", "box"):
            corners = _corners(kind, about)
            check_inside(corners, size)
            flat = [number for corner in corners for number in corner]
            mask[parse_outline({"segmentation": [flat]}, value, size).inside(size)] = value
        else:
            raise DatasetError(
                f"a shape is a {printable(kind)}", "only masks, polygons and boxes are read"
            )
    return mask


def _paint_runs(mask: UInt8Array, about: Mapping[str, str], value: int) -> None:
    left, top, width, height = (
        _whole(about.get(key, "")) for key in ("left", "top", "width", "height")
    )
    runs = [_whole(text.strip()) for text in about.get("rle", "").split(",")]
    known = [run for run in runs if run is not None]
    if left is None or top is None or not width or not height or len(known) < len(runs):
        raise DatasetError("a mask is damaged", "export it again")
    if top + height > mask.shape[0] or left + width > mask.shape[1]:
        raise DatasetError("a mask reaches out of the picture", "it was drawn on another picture")
    if sum(known) != width * height:
        raise DatasetError("the run lengths of a mask do not fill its box", "export it again")
    inside = np.repeat(np.arange(len(known)) % 2 == 1, known).reshape(height, width)
    mask[top : top + height, left : left + width][inside] = value


def _corners(kind: str, about: Mapping[str, str]) -> list[tuple[float, float]]:
    if kind == "box":
        left, top, right, bottom = (
            _number(about.get(key, "")) for key in ("xtl", "ytl", "xbr", "ybr")
        )
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        return _turned(corners, math.radians(_number(about.get("rotation", "0"))))
    pairs = [point.split(",") for point in about.get("points", "").split(";")]
    if any(len(pair) != 2 for pair in pairs):
        raise DatasetError("a polygon is damaged", "export it again")
    return [(_number(x), _number(y)) for x, y in pairs]


def _turned(corners: Sequence[tuple[float, float]], angle: float) -> list[tuple[float, float]]:
    """Return a box's corners turned about its middle, clockwise by ``angle`` in radians."""
    if not angle:
        return [*corners]
    middle_x, middle_y = (sum(several) / len(corners) for several in zip(*corners, strict=True))
    cos, sin = math.cos(angle), math.sin(angle)
    away = [(x - middle_x, y - middle_y) for x, y in corners]
    return [(middle_x + cos * x - sin * y, middle_y + sin * x + cos * y) for x, y in away]


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DatasetError(f"'{printable(text)}' is no number", "export it again")
    return number
