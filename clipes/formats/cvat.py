"""CVAT: ``annotations.xml`` of "CVAT for images 1.1", and ``labels.json`` for the task.

An annotation is a mask: one class in one image, or one connected part of it, as run lengths in its
box, row after row. What is not labelled is a mask of the label ``__ignore__``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from xml.sax.saxutils import XMLGenerator
from xml.sax.xmlreader import AttributesImpl

from clipes.disk.files import atomic_write, write_json
from clipes.disk.images import voc_palette
from clipes.formats.base import Item, Plan
from clipes.formats.regions import Region, regions
from clipes.types import IGNORE, Sample

FILE = "annotations.xml"


@contextmanager
def write_cvat(plan: Plan) -> Iterator[CvatWriter]:
    """Open the writer of the format."""
    labels = plan.labels_with_ignore()
    palette = voc_palette()
    values = [*range(1, len(labels)), IGNORE]
    colours = ["#{:02x}{:02x}{:02x}".format(*palette[value]) for value in values]
    with (
        atomic_write(plan.folder / FILE) as temporary,
        temporary.open("wb") as file,
    ):
        xml = _Xml(file)
        xml.open("annotations")
        xml.leaf("version", text="1.1")
        xml.open("meta")
        xml.open("task")
        xml.leaf("size", text=str(len(plan.samples)))
        xml.leaf("mode", text="annotation")
        xml.open("labels")
        for name, colour in zip(labels, colours, strict=True):
            xml.open("label")
            xml.leaf("name", text=name)
            xml.leaf("color", text=colour)
            xml.leaf("type", text="mask")
            xml.leaf("attributes")
            xml.close("label")
        for name in ("labels", "task", "meta"):
            xml.close(name)
        yield CvatWriter(plan, xml, dict(zip(values, labels, strict=True)))
        xml.close("annotations")
        xml.end()
    label_list = [
        {"name": name, "color": colour, "type": "mask", "attributes": []}
        for name, colour in zip(labels, colours, strict=True)
    ]
    write_json(plan.folder / "labels.json", label_list)


class _Xml:
    """Elements, each on a line of its own; text and attributes are escaped.

    Args:
        file: Where they go.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._generator = XMLGenerator(file, "utf-8", short_empty_elements=True)
        self._generator.startDocument()

    def open(self, element: str, /, **attributes: object) -> None:
        self._start(element, attributes)
        self._generator.ignorableWhitespace("\n")

    def close(self, element: str) -> None:
        self._generator.endElement(element)
        self._generator.ignorableWhitespace("\n")

    def leaf(self, element: str, /, text: str = "", **attributes: object) -> None:
        self._start(element, attributes)
        self._generator.characters(text)
        self.close(element)

    def end(self) -> None:
        self._generator.endDocument()

    def _start(self, element: str, attributes: dict[str, object]) -> None:
        plain = {key: str(value) for key, value in attributes.items()}
        self._generator.startElement(element, AttributesImpl(plain))


class CvatWriter:
    """Writes masks as they come.

    Args:
        plan: What is written.
        xml: Where to, inside the root element.
        names: The labels by their values in masks.
    """

    def __init__(self, plan: Plan, xml: _Xml, names: dict[int, str]) -> None:
        self._plan = plan
        self._xml = xml
        self._names = names
        # Where names do not tell, CVAT takes images in this order.
        order = sorted(map(plan.name, plan.samples))
        self._frames = {name: index for index, name in enumerate(order)}

    def files(self, _sample: Sample) -> tuple[Path, ...]:
        """Return none: all images share a file, which is written anew."""
        return ()

    def add(self, item: Item) -> None:
        """Write the masks of one image."""
        mask = item.mask()
        height, width = mask.shape
        name = self._plan.name(item.sample)
        options = self._plan.options
        classes = [value for value in self._names if value != IGNORE]
        self._xml.open("image", id=self._frames[name], name=name, width=width, height=height)
        for region in regions(mask, classes, components=options.components):
            self._write(region)
        for region in regions(mask, [IGNORE], components=False):
            self._write(region)
        self._xml.close("image")

    def _write(self, region: Region) -> None:
        height, width = region.inside.shape
        self._xml.leaf(
            "mask",
            label=self._names[region.value],
            source="auto",
            occluded=0,
            rle=", ".join(map(str, region.runs_in_box())),
            left=region.left,
            top=region.top,
            width=width,
            height=height,
            z_order=0,
        )
