"""Pseudo-masks and maps in the formats of other tools, and corrected masks out of them.

One module per format and direction. A writer takes one image at a time, so that memory does not
grow with the pixels of a data set; a format is a file per image, or one file that is complete or
absent.
"""

from __future__ import annotations

from clipes.formats.base import Format, Item, OpenWriter, Options, Plan, Writer
from clipes.formats.clip_es import write_clip_es
from clipes.formats.coco import write_coco
from clipes.formats.cvat import write_cvat
from clipes.formats.cvat_mask import write_cvat_mask
from clipes.formats.label_studio import write_label_studio
from clipes.formats.labelme import write_labelme
from clipes.formats.mmseg import write_mmseg
from clipes.formats.read import Reader
from clipes.formats.read_coco import read_coco
from clipes.formats.read_cvat import read_cvat
from clipes.formats.read_labelme import read_labelme
from clipes.formats.read_masks import read_masks
from clipes.formats.ultralytics import write_ultralytics
from clipes.formats.voc import write_voc
from clipes.formats.yolo_seg import write_yolo_seg

__all__ = ["FORMATS", "READERS", "Format", "Item", "Options", "Plan", "Writer"]


def _of_masks(write: OpenWriter, *options: str) -> Format:
    return Format(write, "pseudo", frozenset({"confidence", *options}))


FORMATS: dict[str, Format] = {
    "coco": _of_masks(write_coco, "components", "polygons", "upright"),
    "labelme": _of_masks(write_labelme, "tolerance", "upright"),
    "cvat": _of_masks(write_cvat, "components", "upright"),
    "cvat-mask": _of_masks(write_cvat_mask),
    "label-studio": _of_masks(write_label_studio, "components"),
    "mmseg": _of_masks(write_mmseg, "copy", "grey"),
    "voc": _of_masks(write_voc, "copy", "grey"),
    "ultralytics": _of_masks(write_ultralytics, "copy"),
    "yolo-seg": _of_masks(write_yolo_seg, "copy"),
    "clip-es": Format(write_clip_es, "cams", frozenset()),
}
"""The formats by their names on the command line."""

READERS: dict[str, Reader] = {
    "coco": read_coco,
    "labelme": read_labelme,
    "cvat": read_cvat,
    "voc": read_masks,
}
"""Those that corrected masks are read from."""
