"""CVAT: "Segmentation mask 1.1", the masks themselves.

::

    SegmentationClass/<name>.png          palette masks; labelmap.txt says what a colour is
    SegmentationObject/<name>.png         the same: each class of an image is one object
    ImageSets/Segmentation/<split>.txt    the names: paths of the images without suffix
    labelmap.txt                          label:red,green,blue:: in the order of values

Without objects CVAT makes a mask of the background, too, and asks for a label of that name. What is
not labelled is the label ``__ignore__``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from clipes.disk.files import write_text
from clipes.disk.images import voc_palette, write_mask
from clipes.errors import UsageError
from clipes.formats.base import BACKGROUND_LABELS, FileWriter, Item, Plan, list_text
from clipes.types import Sample

_BACKGROUND = BACKGROUND_LABELS[1]
_MASKS = "SegmentationClass"


@contextmanager
def write_cvat_mask(plan: Plan) -> Iterator[CvatMaskWriter]:
    """Open the writer of the format."""
    labelmap = _labelmap(plan)
    writer = CvatMaskWriter(plan, plan.folder / _MASKS, ".png")
    yield writer
    names = [str(writer.name(sample)) for sample in writer.written()]
    write_text(plan.folder / "ImageSets" / "Segmentation" / f"{plan.split}.txt", list_text(names))
    write_text(plan.folder / "labelmap.txt", labelmap)


class CvatMaskWriter(FileWriter):
    """Writes two files for each image."""

    def name(self, sample: Sample) -> PurePosixPath:
        """Return what CVAT calls an image: its path without the suffix."""
        return PurePosixPath(self.plan.name(sample)).with_suffix("")

    def path(self, sample: Sample) -> Path:
        """Return the mask of an image."""
        return self._below(_MASKS, sample)

    def files(self, sample: Sample) -> tuple[Path, ...]:
        """Return the files of an image: its objects and its mask."""
        return self._below("SegmentationObject", sample), self.path(sample)

    def add(self, item: Item) -> None:
        """Write objects, then the mask, which stands for both."""
        mask = item.mask()
        for path in self.files(item.sample):
            write_mask(path, mask)

    def _below(self, folder: str, sample: Sample) -> Path:
        return self.plan.folder / folder / f"{self.name(sample)}.png"


def _labelmap(plan: Plan) -> str:
    """Return the colours of the labels.

    Raises:
        UsageError: A name cannot stand in such a file.
    """
    labels = {0: _BACKGROUND, **plan.label_values()}
    for name in plan.classes:
        if ":" in name or name.startswith("#") or name == _BACKGROUND:
            raise UsageError(
                f"CVAT's labelmap.txt cannot hold the class '{name}'",
                "choose the format cvat, or rename the class",
            )
    palette = voc_palette().tolist()
    lines = [f"{name}:{','.join(map(str, palette[value]))}::" for value, name in labels.items()]
    return list_text(["# label:color_rgb:parts:actions", *lines])
