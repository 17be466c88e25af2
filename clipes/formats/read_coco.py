"""Corrected masks in an instances file, as ``coco`` writes it and CVAT or FiftyOne give it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clipes.datasets.instances import Header, ImageKey, is_key, read_annotations, read_header
from clipes.datasets.outlines import Outline, draw, parse_outline
from clipes.disk.images import MAX_PIXELS
from clipes.errors import DatasetError
from clipes.formats.coco import FILE
from clipes.formats.read import Found, check_inside, check_said_size, mask_values, value_of_label
from clipes.types import UInt8Array


def read_coco(path: Path, classes: Sequence[str]) -> Iterator[Found]:
    """Read an instances file, or the folder that one is in.

    Raises:
        DatasetError: It is no instances file.
    """
    header = read_header(path / FILE if path.is_dir() else path)
    outlines: dict[ImageKey, list[Outline | DatasetError]] = {}
    values = mask_values(classes)
    for entry in read_annotations(header.path):
        key = entry.get("image_id")
        if is_key(key) and key in header.pictures:
            outlines.setdefault(key, []).append(_outline(entry, header, key, values))
    for key, picture in header.pictures.items():
        found = outlines.pop(key, [])
        yield Found(picture.name, partial(_draw, said=picture.size, outlines=found))


def _outline(
    entry: dict[str, Any], header: Header, key: ImageKey, values: Mapping[str, int]
) -> Outline | DatasetError:
    size = header.pictures[key].size
    try:
        if size is None or size[0] * size[1] > MAX_PIXELS:
            raise DatasetError(f"{header.path} does not say how large it is")
        number = entry.get("category_id")
        name = header.categories.get(number) if isinstance(number, int) else None
        outline = parse_outline(entry, value_of_label(name, values), size)
        if isinstance(polygons := entry["segmentation"], list):
            for polygon in polygons:
                check_inside(list(zip(polygon[::2], polygon[1::2], strict=True)), size)
        return outline
    except DatasetError as error:
        return error


def _draw(
    size: tuple[int, int],
    said: tuple[int, int] | None,
    outlines: Sequence[Outline | DatasetError],
) -> UInt8Array:
    check_said_size(said or (None, None), size)
    good = []
    for outline in outlines:
        if isinstance(outline, DatasetError):
            raise outline
        good.append(outline)
    return draw(good, size)
