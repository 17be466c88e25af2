"""CVAT: ``annotations.xml`` of "CVAT for images 1.1", and ``labels.json`` for the task.

An annotation is a mask: one class in one image, or one connected part of it, as run lengths in its
box, row after row. What is not labelled is a mask of the label ``__ignore__``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO
from xml.etree.ElementTree import Element, SubElement, tostring

from clipes.disk.files import atomic_write, write_json
from clipes.formats.base import Item, Plan, Writer, colour_text
from clipes.formats.regions import Region, regions

FILE = "annotations.xml"


@contextmanager
def write_cvat(plan: Plan) -> Iterator[CvatWriter]:
    """Open the writer of the format."""
    labels = plan.label_values()
    listed = [
        {"name": name, "color": colour_text(value), "type": "mask"}
        for value, name in labels.items()
    ]
    with (
        atomic_write(plan.folder / FILE) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n')
        version = Element("version")
        version.text = "1.1"
        for element in (version, _meta(len(plan.samples), listed)):
            file.write(tostring(element, "unicode") + "\n")
        yield CvatWriter(plan, file, labels)
        file.write("</annotations>\n")
    write_json(plan.folder / "labels.json", [{**label, "attributes": []} for label in listed])


def _meta(images: int, labels: Iterable[Mapping[str, str]]) -> Element:
    """Return what CVAT is told of the task."""
    meta = Element("meta")
    task = SubElement(meta, "task")
    SubElement(task, "size").text = str(images)
    SubElement(task, "mode").text = "annotation"
    parent = SubElement(task, "labels")
    for label in labels:
        entry = SubElement(parent, "label")
        for key, value in label.items():
            SubElement(entry, key).text = value
        SubElement(entry, "attributes")
    return meta


class CvatWriter(Writer):
    """Writes masks as they come, the image and its masks on a line.

    Args:
        plan: What is written.
        file: Where to, inside the root element.
        names: The labels by their values in masks.
    """

    one_file = True

    def __init__(self, plan: Plan, file: TextIO, names: dict[int, str]) -> None:
        super().__init__(plan)
        self._file = file
        self._names = names
        # Where names do not tell, CVAT takes images in this order.
        order = sorted(map(plan.name, plan.samples))
        self._frames = {name: index for index, name in enumerate(order)}

    def add(self, item: Item) -> None:
        """Write the masks of one image."""
        mask = item.mask()
        self.place_upright(item)
        height, width = mask.shape
        name, components = self.plan.name(item.sample), self.plan.options.components
        found = regions(mask, self._names, components=components)
        about = {"id": self._frames[name], "name": name, "width": width, "height": height}
        image = Element("image", _text(about))
        image.extend(Element("mask", _text(self._attributes(region))) for region in found)
        self._file.write(tostring(image, "unicode") + "\n")

    def _attributes(self, region: Region) -> dict[str, object]:
        height, width = region.inside.shape
        return {
            "label": self._names[region.value],
            "source": "auto",
            "occluded": 0,
            "rle": ", ".join(map(str, region.runs_in_box())),
            "left": region.left,
            "top": region.top,
            "width": width,
            "height": height,
            "z_order": 0,
        }


def _text(attributes: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in attributes.items()}
