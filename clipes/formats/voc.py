"""Laid out like Pascal VOC, and a folder that ``--dataset folder`` reads.

::

    JPEGImages/<id>.jpg                   links to the images, or copies
    SegmentationClassAug/<id>.png         palette masks, or grey ones; 255 not labelled
    ImageSets/Segmentation/<split>.txt    the ids
    classes.txt                           class k is on line k, from 1
    labels.csv                            the images' labels
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clipes.datasets.tables import label_words, table_text
from clipes.disk.files import write_text
from clipes.disk.images import write_mask
from clipes.formats.base import FileWriter, Item, Plan, list_text, place_image, placed_path
from clipes.types import Sample


@contextmanager
def write_voc(plan: Plan) -> Iterator[FolderWriter]:
    """Open the writer of the format."""
    images, masks = Path("JPEGImages"), Path("SegmentationClassAug")
    writer = FolderWriter(plan, images, masks, grey=plan.options.grey)
    yield writer
    written = writer.written()
    ids = [sample.id for sample in written]
    write_text(plan.folder / "ImageSets" / "Segmentation" / f"{plan.split}.txt", list_text(ids))
    write_text(plan.folder / "classes.txt", list_text(plan.classes))
    write_text(plan.folder / "labels.csv", _labels(plan, written))


def _labels(plan: Plan, samples: Sequence[Sample]) -> str:
    """Return the labels as a table that is read again."""
    words = label_words(plan.classes)
    rows = [
        (placed_path(Path(), sample).name, ";".join(words[label] for label in sample.labels))
        for sample in samples
    ]
    return table_text([("image", "labels"), *rows])


class FolderWriter(FileWriter):
    """Puts images into one folder and masks into another, under their ids.

    Args:
        plan: What is written.
        images: Folder of the images, in the plan's.
        masks: Folder of the masks, in the plan's.
        grey: Whether masks have no palette.
    """

    def __init__(self, plan: Plan, images: Path, masks: Path, *, grey: bool) -> None:
        super().__init__(plan, plan.folder / masks, ".png")
        self._images, self._grey = plan.folder / images, grey

    def files(self, sample: Sample) -> tuple[Path, ...]:
        """Return the files of an image: itself and its mask."""
        return placed_path(self._images, sample), self.path(sample)

    def add(self, item: Item) -> None:
        """Place the image, then write the mask, which stands for both."""
        mask = item.mask()
        image, path = self.files(item.sample)
        place_image(item.sample, image, copy=self.plan.options.copy)
        write_mask(path, mask, grey=self._grey)
