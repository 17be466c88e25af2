"""What the formats share: which image is written, with which mask, under which name."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from clipes.disk.files import atomic_write, check_id
from clipes.disk.images import (
    read_confidence,
    read_header,
    read_image,
    read_mask,
    voc_palette,
)
from clipes.errors import ArtifactError, UsageError
from clipes.masks.values import require_classes
from clipes.run.folder import Run
from clipes.types import IGNORE, CamMaps, Sample, UInt8Array, size_text

IGNORE_LABEL = "__ignore__"
"""What regions without a label are called where a format only knows names."""

BACKGROUND_LABELS = ("_background_", "background")
"""What the background is called where a format needs a name for it: labelme's, and CVAT's."""

_QUALITY = 95  # of photos that are turned upright


@dataclass(frozen=True)
class Options:
    """What a user may choose; see ``Format.options`` for which format knows what.

    Attributes:
        confidence: Pixels that are less sure count as not labelled; None keeps them all.
        components: One annotation for each connected part instead of one for each class.
        tolerance: How far polygons may leave the mask's outline, in pixels; 0 is exact.
        copy: Copy the images instead of linking to them.
        grey: Masks without a palette: a pixel of the file is the label, however it is read.
        polygons: Outlines as polygons rather than run lengths.
        upright: Place the images beside the masks, turned as they are to be looked at.
    """

    confidence: float | None = None
    components: bool = False
    tolerance: float = 0.0
    copy: bool = False
    grey: bool = False
    polygons: bool = False
    upright: bool = False


@dataclass(frozen=True)
class Plan:
    """What is written, and where to.

    Attributes:
        folder: Where the files go.
        samples: The images, those that were written before included.
        classes: Class names in mask order.
        split: What the list of images is called.
        images: The folder that all images of the run lie in or below, whichever are written.
        numbers: A number from 1 for each id, the same however many images are ready.
        options: What the user chose.
    """

    folder: Path
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    split: str
    images: Path
    numbers: dict[str, int]
    options: Options = Options()

    def name(self, sample: Sample) -> str:
        """Return what an image is called in the tool: its path below ``images``, with slashes."""
        return name_below(self.images, sample)

    def labels_with_ignore(self) -> tuple[str, ...]:
        """Return the class names and the name of what has no label.

        Raises:
            UsageError: A class has that name.
        """
        if IGNORE_LABEL in self.classes:
            raise UsageError(
                f"the class '{IGNORE_LABEL}' has the name of what is not labelled",
                "choose another format, or rename the class",
            )
        return (*self.classes, IGNORE_LABEL)

    def label_values(self) -> dict[int, str]:
        """Return the labels by their values in masks, background apart; raises as the above."""
        labels = self.labels_with_ignore()
        return dict(zip((*range(1, len(labels)), IGNORE), labels, strict=True))


@dataclass(frozen=True)
class Item:
    """One image to write; what belongs to it is read when it is asked for.

    Attributes:
        sample: The image.
        run: Where its maps and mask are.
        plan: What is written.
        placed: Whether the files of this image alone are there, made from what there is now.
    """

    sample: Sample
    run: Run
    plan: Plan
    placed: bool = False

    def mask(self) -> UInt8Array:
        """Return the (H0, W0) mask, 255 where it says nothing or is not sure enough.

        Raises:
            ArtifactError: It does not fit the image or the classes.
            ImageError: Mask, confidence or image cannot be read.
        """
        path = self.run.pseudo_path(self.sample.id)
        mask, threshold = read_mask(path), self.plan.options.confidence
        refine = f"and run 'clipes refine {self.run.root}' again"
        again = refine if self.run.exists() else "and import it again"  # a person's mask
        if mask.shape != (size := read_header(self.sample.image)[0]):
            raise ArtifactError(
                f"{path} is {size_text(mask.shape)}, the image {size_text(size)}",
                f"delete it {again}",
            )
        require_classes(mask, len(self.plan.classes), str(path), f"delete it {again}")
        if threshold is None:
            return mask
        confidence = read_confidence(self.run.confidence_path(self.sample.id))
        if confidence.shape != mask.shape:
            raise ArtifactError(
                f"{path} is {size_text(mask.shape)}, its confidence {size_text(confidence.shape)}",
                f"delete both {again}",
            )
        mask[confidence < threshold] = IGNORE
        return mask

    def cams(self) -> CamMaps:
        """Return the maps.

        Raises:
            ArtifactError: They cannot be read.
        """
        return self.run.load_cams(self.sample.id)


class Writer(ABC):
    """Writes the images of a data set in one format.

    Args:
        plan: What is written.
    """

    one_file = False
    """Whether a file holds all images: then each of them is written every time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def upright(self, sample: Sample) -> tuple[Path, ...]:
        """Return where an image is placed upright, if that is asked for."""
        if not self.plan.options.upright:
            return ()
        return (self.plan.folder / "images" / self.plan.name(sample),)

    def files(self, sample: Sample) -> tuple[Path, ...]:
        """Return the files of an image alone."""
        return self.upright(sample)

    def place_upright(self, item: Item) -> None:
        """Place an image upright, if that is asked for and has not been done.

        Raises:
            ImageError: The image cannot be read.
            WriteError: It cannot be written.
        """
        for path in self.upright(item.sample):
            if not item.placed:
                place_image(item.sample, path, copy=False)

    @abstractmethod
    def add(self, item: Item) -> None:
        """Write one image; if that fails, nothing of it remains.

        Raises:
            ClipesError: The image, its mask or its maps cannot be used, or the disk is full.
        """

    def lost(self) -> str:
        """Return what the format could not carry of the images that were added, if anything."""
        return ""


class FileWriter(Writer):
    """Writes a file for each image, named by its id.

    Args:
        plan: What is written.
        folder: Where the files go.
        suffix: Of the files.
    """

    def __init__(self, plan: Plan, folder: Path, suffix: str) -> None:
        super().__init__(plan)
        self._folder, self._suffix = folder, suffix

    def path(self, sample: Sample) -> Path:
        """Return the file of an image."""
        return self._folder / f"{check_id(sample.id)}{self._suffix}"

    def files(self, sample: Sample) -> tuple[Path, ...]:
        """Return the files of an image."""
        return (self.path(sample),)

    def written(self) -> list[Sample]:
        """Return the images whose file is there, in their order in the plan."""
        return [sample for sample in self.plan.samples if self.path(sample).exists()]


OpenWriter: TypeAlias = Callable[[Plan], AbstractContextManager[Writer]]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        write: Opens its writer; what the block does not write, such as lists, is written at the
            end of it.
        source: The folder of a run that it is made from: pseudo or cams.
        options: Names of the ``Options`` that it knows.
    """

    write: OpenWriter
    source: str
    options: frozenset[str]


def common_folder(samples: Iterable[Sample]) -> Path:
    """Return the deepest folder that all images lie in or below."""
    return Path(os.path.commonpath([sample.image.absolute().parent for sample in samples]))


def name_below(folder: Path, sample: Sample) -> str:
    """Return the path of an image below a folder, with slashes."""
    return sample.image.absolute().relative_to(folder).as_posix()


def image_suffix(sample: Sample) -> str:
    """Return the suffix an image gets where files are named by id: lower case, and one for JPEG."""
    suffix = sample.image.suffix.lower()
    return ".jpg" if suffix in (".jpeg", ".jpe", ".jfif") else suffix


def place_image(sample: Sample, target: Path, *, copy: bool) -> None:
    """Put an image where a tool looks for it, upright.

    It is linked if that can be done here. A photo that only its EXIF orientation turns upright is
    always a copy, drawn anew: many tools read the pixels as they are stored.

    Raises:
        ImageError: The image cannot be read.
        ArtifactError: The target cannot be written.
    """
    _, turned = read_header(sample.image)
    with atomic_write(target) as temporary:
        if turned:
            Image.fromarray(read_image(sample.image)).save(temporary, quality=_QUALITY)
        elif copy or not _linked(sample.image.absolute(), temporary):
            shutil.copyfile(sample.image, temporary)


def placed_path(folder: Path, sample: Sample) -> Path:
    """Return where ``place_image`` is to put an image named by its id."""
    return folder / f"{check_id(sample.id)}{image_suffix(sample)}"


def colour_text(value: int) -> str:
    """Return the colour of a mask value in VOC's palette, as ``#rrggbb``.

    >>> colour_text(1)
    '#800000'
    """
    return "#{:02x}{:02x}{:02x}".format(*voc_palette()[value])


def list_text(names: Sequence[str]) -> str:
    """Return a list of images, one a line."""
    return "".join(f"{name}\n" for name in names)


def _linked(source: Path, target: Path) -> bool:
    """Replace ``target`` by a link, if the system and the disk know links."""
    target.unlink()
    try:
        target.symlink_to(source)
    except (OSError, NotImplementedError):
        return False
    return True
