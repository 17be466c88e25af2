"""One JSON file like COCO's instances files: ``instances.json``.

Categories are numbered as in masks, from 1. An annotation is one class in one image, or one
connected part of it, as compressed run lengths, or as polygons along the edges of pixels. What is
not labelled is a crowd of every class the image is labelled with, always as run lengths: COCO's way
of saying that it may or may not be there. Images whose mask shows nothing stand in the list without
annotations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from clipes.datasets.outlines import MOST_PIXELS, encode_runs
from clipes.disk.files import atomic_write
from clipes.formats.base import Item, Plan, Writer
from clipes.formats.regions import Region, regions
from clipes.formats.rings import rings
from clipes.masks.values import value_of
from clipes.types import IGNORE

FILE = "instances.json"


@contextmanager
def write_coco(plan: Plan) -> Iterator[CocoWriter]:
    """Open the writer of the format."""
    with (
        atomic_write(plan.folder / FILE) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        categories = [
            {"id": value_of(label), "name": name, "supercategory": ""}
            for label, name in enumerate(plan.classes)
        ]
        info = {"description": "Pseudo-masks made by clipes", "version": "1.0"}
        file.write(f'{{"info": {_text(info)},\n"licenses": [],\n')
        file.write(f'"categories": {_text(categories)},\n"annotations": [')
        writer = CocoWriter(plan, file)
        yield writer
        file.write('],\n"images": [')
        file.write(",\n".join(writer.images))
        file.write("]}\n")


class CocoWriter(Writer):
    """Writes annotations as they come; a line about each image is kept for the end.

    Args:
        plan: What is written.
        file: Where to, after the opening bracket of the annotations.
    """

    one_file = True

    def __init__(self, plan: Plan, file: TextIO) -> None:
        super().__init__(plan)
        self.images: list[str] = []
        self._file = file
        self._annotations = 0

    def add(self, item: Item) -> None:
        """Write the annotations of one image."""
        mask, plan = item.mask(), self.plan
        self.place_upright(item)
        height, width = size = mask.shape
        values = [value_of(label) for label in range(len(plan.classes))]
        number = plan.numbers[item.sample.id]
        outline = _polygons if plan.options.polygons else _run_lengths
        found = [
            _annotation(region, region.value, number, outline(region, size), crowd=False)
            for region in regions(mask, values, components=plan.options.components)
        ]
        found += [
            _annotation(region, value_of(label), number, _run_lengths(region, size), crowd=True)
            for region in regions(mask, [IGNORE], components=False)
            for label in item.sample.labels
        ]
        for entry in found:
            comma = ",\n" if self._annotations else "\n"
            self._annotations += 1
            self._file.write(comma + _text({"id": self._annotations, **entry}))
        name = plan.name(item.sample)
        entry = {"id": number, "file_name": name, "height": height, "width": width}
        self.images.append(_text(entry))


def _run_lengths(region: Region, size: tuple[int, int]) -> dict[str, Any]:
    runs = region.runs(size)
    # COCO knows lists, too, for what is too large to be compressed.
    small = size[0] * size[1] <= MOST_PIXELS
    return {"size": list(size), "counts": encode_runs(runs, size) if small else runs.tolist()}


def _polygons(region: Region, _: tuple[int, int]) -> list[list[int]]:
    corner = (region.left, region.top)
    return [(ring + corner).ravel().tolist() for ring in rings(region.inside, edges=True)]


def _annotation(
    region: Region, category: int, image: int, segmentation: object, *, crowd: bool
) -> dict[str, Any]:
    height, width = region.inside.shape
    return {
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "area": region.area,
        "bbox": [region.left, region.top, width, height],
        "iscrowd": int(crowd),
    }


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
