"""labelme: ``<id>.json`` with polygons for each image, and ``labels.txt``.

labelme's polygons have no holes, and it paints later shapes over earlier ones. So what shows
through a hole stands as a polygon of its own after the one with the hole: another class, or
``_background_``. What is not labelled is ``__ignore__``. Both names are those of labelme's own
converters, which make 0 and 255 of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipes.disk.files import write_text
from clipes.formats.base import (
    BACKGROUND_LABELS,
    IGNORE_LABEL,
    FileWriter,
    Item,
    Plan,
    list_text,
    placed_path,
)
from clipes.formats.regions import paint_order, simplify
from clipes.masks.values import class_of
from clipes.types import IGNORE, Sample

BACKGROUND_LABEL = BACKGROUND_LABELS[0]

_VERSION = "5.5.0"  # of the first labelme with all of these keys
_FEWEST = 3  # corners of what labelme takes for a polygon


@contextmanager
def write_labelme(plan: Plan) -> Iterator[LabelmeWriter]:
    """Open the writer of the format."""
    *classes, ignore = plan.labels_with_ignore()
    yield LabelmeWriter(plan, plan.folder, ".json")
    write_text(plan.folder / "labels.txt", list_text([ignore, BACKGROUND_LABEL, *classes]))


class LabelmeWriter(FileWriter):
    """Writes a file for each image."""

    def upright(self, sample: Sample) -> tuple[Path, ...]:
        """Return where an image is placed upright, if that is asked for: beside its polygons."""
        return (placed_path(self.plan.folder, sample),) if self.plan.options.upright else ()

    def files(self, sample: Sample) -> tuple[Path, ...]:
        """Return the files of an image: itself, if asked for, and its polygons."""
        return (*self.upright(sample), self.path(sample))

    def add(self, item: Item) -> None:
        """Write the polygons of one image."""
        mask, path = item.mask(), self.path(item.sample)
        self.place_upright(item)
        shapes = [
            self._shape(value, simplify(outline, self.plan.options.tolerance))
            for value, outline in paint_order(mask)
        ]
        height, width = mask.shape
        (source,) = self.upright(item.sample) or (item.sample.image,)
        # Of real folders: "..", above a link, leads elsewhere. Not of the picture, if it is a link:
        # labels and masks are called after its own name.
        at = Path(os.path.realpath(source.parent), source.name)
        image = os.path.relpath(at, os.path.realpath(path.parent))
        content = {
            "version": _VERSION,
            "flags": {},
            "shapes": shapes,
            "imagePath": Path(image).as_posix(),
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        # One line: with an indent, coordinates take four times the room.
        write_text(path, json.dumps(content, ensure_ascii=False) + "\n")

    def _shape(self, value: int, outline: npt.NDArray[np.int32]) -> dict[str, Any]:
        names = {0: BACKGROUND_LABEL, IGNORE: IGNORE_LABEL}
        corners = outline.tolist()
        corners += corners[-1:] * (_FEWEST - len(corners))
        return {
            "label": names.get(value) or self.plan.classes[class_of(value)],
            "points": [[float(x), float(y)] for x, y in corners],
            "group_id": None,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
            "mask": None,
        }
