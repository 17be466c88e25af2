"""Label Studio: ``tasks.json`` with masks to be corrected, and ``labels.xml`` for the project.

A mask is a prediction: brush strokes, one for each class in an image or each connected part of it.
What is not labelled is a stroke of the label ``__ignore__``. Images are named as Label Studio
serves them where its document root is the folder above theirs: it refuses to serve the root itself.

A stroke is run lengths of a picture of four channels, all 255 inside and 0 outside, row after row,
in the code of thi.ng's ``rle-pack``, which Label Studio's front end reads. It starts with the count
of values (32 bits), the width of a value less one (5 bits) and four widths of run lengths, less one
(4 bits each). Then each run is a 1, which of the four widths its length has (2 bits), the length
less one, and the value. Bits are packed into bytes, highest first, and the last byte is filled up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO
from urllib.parse import quote
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np

from clipes.disk.files import atomic_write, write_text
from clipes.formats.base import Item, Plan, Writer, colour_text
from clipes.formats.regions import Region, regions
from clipes.types import Int64Array

FILE = "tasks.json"

_SERVED = "/data/local-files/?d="
_FROM, _TO = "label", "image"
_CHANNELS = 4
_VALUE_BITS = 8
_RUN_BITS = np.array([3, 4, 8, 16])
_LONGEST = 1 << 16


@contextmanager
def write_label_studio(plan: Plan) -> Iterator[LabelStudioWriter]:
    """Open the writer of the format."""
    labels = plan.label_values()
    with (
        atomic_write(plan.folder / FILE) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.write("[")
        yield LabelStudioWriter(plan, file, labels)
        file.write("\n]\n")
    write_text(plan.folder / "labels.xml", _interface(plan, labels))


def _interface(plan: Plan, labels: dict[int, str]) -> str:
    """Return the labelling interface of the project."""
    view = Element("View")
    SubElement(view, "Image", name=_TO, value=f"${_TO}", zoom="true")
    brushes = SubElement(view, "BrushLabels", name=_FROM, toName=_TO)
    for value, name in labels.items():
        SubElement(brushes, "Label", value=name, background=colour_text(value))
    indent(view)
    return tostring(view, "unicode") + "\n"


class LabelStudioWriter(Writer):
    """Writes tasks as they come, one a line.

    Args:
        plan: What is written.
        file: Where to, after the opening bracket.
        labels: The labels by their values in masks.
    """

    one_file = True

    def __init__(self, plan: Plan, file: TextIO, labels: dict[int, str]) -> None:
        super().__init__(plan)
        self._file, self._labels = file, labels
        self._tasks = 0

    def add(self, item: Item) -> None:
        """Write the task of one image."""
        mask = item.mask()
        found = regions(mask, self._labels, components=self.plan.options.components)
        strokes = [self._stroke(str(number), part, mask.shape) for number, part in enumerate(found)]
        path = f"{self.plan.images.name}/{self.plan.name(item.sample)}"
        task = {
            "data": {_TO: _SERVED + quote(path)},
            "predictions": [{"model_version": "clipes", "result": strokes}],
        }
        self._file.write(",\n" if self._tasks else "\n")
        self._file.write(json.dumps(task, ensure_ascii=False))
        self._tasks += 1

    def _stroke(self, number: str, region: Region, size: tuple[int, int]) -> dict[str, Any]:
        height, width = size
        return {
            "id": number,
            "type": "brushlabels",
            "from_name": _FROM,
            "to_name": _TO,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {
                "format": "rle",
                "rle": encode_brush(region.runs_by_rows(size), height * width),
                "brushlabels": [self._labels[region.value]],
            },
        }


def encode_brush(runs: Int64Array, pixels: int) -> list[int]:
    """Return run lengths in the code of a brush stroke, as bytes.

    Args:
        runs: Run lengths in pixels, alternating, outside first.
        pixels: What they add up to.
    """
    lengths, values = _CHANNELS * runs, np.arange(len(runs)) % 2 * 255
    pieces = -(-lengths // _LONGEST)  # none of a run without length
    last = np.cumsum(pieces)[pieces > 0] - 1
    split = np.full(pieces.sum(), _LONGEST)
    split[last] = (lengths - (pieces - 1) * _LONGEST)[pieces > 0]
    chosen = np.searchsorted(1 << _RUN_BITS, split)
    bits = _RUN_BITS[chosen]
    codes = ((4 | chosen) << bits | split - 1) << _VALUE_BITS | np.repeat(values, pieces)
    head = [_CHANNELS * pixels, _VALUE_BITS - 1, *(_RUN_BITS - 1)]
    widths = np.concatenate([[32, 5, 4, 4, 4, 4], 3 + bits + _VALUE_BITS])
    aligned = (np.concatenate([head, codes]) << 32 - widths).astype(">u4")
    unpacked = np.unpackbits(aligned.view(np.uint8)).reshape(-1, 32)
    packed = np.packbits(unpacked[np.arange(32) < widths[:, None]])
    return packed.tolist()
