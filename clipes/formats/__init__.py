"""Pseudo-masks and maps in the formats of other tools.

One module per format. A writer takes one image at a time, so that memory does not grow with the
pixels of a data set; a format is a file per image, or one file that is complete or absent.
"""

from __future__ import annotations

from clipes.formats.base import Format, Item, Options, Plan, Writer
from clipes.formats.clip_es import write_clip_es
from clipes.formats.coco import write_coco
from clipes.formats.cvat import write_cvat
from clipes.formats.cvat_mask import write_cvat_mask
from clipes.formats.labelme import write_labelme
from clipes.formats.mmseg import write_mmseg
from clipes.formats.ultralytics import write_ultralytics
from clipes.formats.voc import write_voc
from clipes.formats.yolo_seg import write_yolo_seg

__all__ = ["FORMATS", "Format", "Item", "Options", "Plan", "Writer"]

FORMATS: dict[str, Format] = {
    "coco": Format(write_coco, "pseudo", frozenset({"confidence", "components", "polygons"})),
    "labelme": Format(write_labelme, "pseudo", frozenset({"confidence", "tolerance"})),
    "cvat": Format(write_cvat, "pseudo", frozenset({"confidence", "components"})),
    "cvat-mask": Format(write_cvat_mask, "pseudo", frozenset({"confidence"})),
    "mmseg": Format(write_mmseg, "pseudo", frozenset({"confidence", "copy", "grey"})),
    "voc": Format(write_voc, "pseudo", frozenset({"confidence", "copy", "grey"})),
    "ultralytics": Format(write_ultralytics, "pseudo", frozenset({"confidence", "copy"})),
    "yolo-seg": Format(write_yolo_seg, "pseudo", frozenset({"confidence", "copy"})),
    "clip-es": Format(write_clip_es, "cams", frozenset()),
}
"""The formats by their names on the command line."""
