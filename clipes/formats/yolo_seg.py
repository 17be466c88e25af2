"""Laid out as Ultralytics reads it for instance segmentation (``yolo segment train``).

::

    images/<id>.jpg    links to the images, or copies
    labels/<id>.txt    a part a line: its class from 0, then x y x y ..., as fractions of the size
    data.yaml          where they are, and the names of the classes

A part is what hangs together, corners included. Its polygon runs through the centres of pixels, and
holes are bridged (``rings``): drawn by OpenCV, as Ultralytics does, it gives the pixels again. What
the format cannot say is counted: pixels without a label, which become background, and parts that
are a point or a straight line, which is no polygon.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from clipes.disk.files import write_text
from clipes.formats.base import FileWriter, Item, Plan, place_image, placed_path
from clipes.formats.regions import Region, regions
from clipes.formats.rings import rings
from clipes.formats.ultralytics import IMAGES, write_data_yaml
from clipes.masks.values import class_of, value_of
from clipes.types import IGNORE, Sample

_FEWEST = 3  # corners; Ultralytics takes a line of fewer for a box, or refuses the file


@contextmanager
def write_yolo_seg(plan: Plan) -> Iterator[YoloSegWriter]:
    """Open the writer of the format."""
    yield YoloSegWriter(plan)
    write_data_yaml(plan.folder, plan.classes)


class YoloSegWriter(FileWriter):
    """Places images, and writes a file of polygons for each.

    Args:
        plan: What is written.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, plan.folder / "labels", ".txt")
        self._unlabelled = self._thin = self._thin_pixels = 0

    def files(self, sample: Sample) -> tuple[Path, ...]:
        """Return the files of an image: itself and its polygons."""
        return placed_path(self.plan.folder / IMAGES, sample), self.path(sample)

    def add(self, item: Item) -> None:
        """Place the image, then write its polygons, which stand for both."""
        mask = item.mask()
        image, path = self.files(item.sample)
        values = [value_of(label) for label in range(len(self.plan.classes))]
        lines = []
        for part in regions(mask, values, components=True):
            if line := part_line(part, mask.shape):
                lines.append(line)
            else:
                self._thin += 1
                self._thin_pixels += part.area
        place_image(item.sample, image, copy=self.plan.options.copy)
        write_text(path, "".join(lines))
        self._unlabelled += int(np.count_nonzero(mask == IGNORE))

    def lost(self) -> str:
        """Return what was lost of the images that were written."""
        found = []
        if self._unlabelled:
            found.append(f"{self._unlabelled} pixels without a label are background")
        if self._thin:
            pixels = f"{self._thin_pixels} pixels"
            found.append(f"{self._thin} parts that are points or lines ({pixels}) are left out")
        return "; ".join(found)


def part_line(part: Region, size: tuple[int, int]) -> str:
    """Return the line of a part that hangs together; empty if it has fewer than three corners.

    Args:
        part: The part.
        size: (H, W) of the picture.
    """
    (ring,) = rings(part.inside, edges=False)
    if len(ring) < _FEWEST:
        return ""
    height, width = size
    # Half a pixel further is the centre; truncated, it is the pixel, as Ultralytics has it.
    corners = (ring + np.array([part.left, part.top]) + 0.5) / np.array([width, height])
    numbers = " ".join(f"{number:.6f}" for number in corners.ravel())
    return f"{class_of(part.value)} {numbers}\n"
