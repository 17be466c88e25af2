"""A few photos with outlines drawn for this project, to try everything without a data set.

The photos are not part of clipes: they are read from an installed scikit-image, which brings them
in its wheel. ``examples.json`` beside this module holds the outlines, the labels and the credits.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from PIL import Image

from clipes.datasets.base import Dataset, find_base
from clipes.datasets.voc import VOC_CLASSES, open_voc
from clipes.disk.files import atomic_write, write_text
from clipes.disk.images import read_image, write_mask
from clipes.errors import DatasetError
from clipes.types import IGNORE, UInt8Array

_CATALOGUE = "examples.json"
_REMEDY = 'pip install "clipes[examples]"'
_VALUES = {"background": 0, "ignore": IGNORE} | {
    name: index + 1 for index, name in enumerate(VOC_CLASSES)
}

# As in VOC's masks, a band around every outline is not scored: outlines drawn by hand are right to
# a few pixels.
_BAND = np.ones((5, 5), np.uint8)

_Entry: TypeAlias = dict[str, Any]
_Example: TypeAlias = tuple[str, list[str], UInt8Array, UInt8Array]  # id, labels, image, mask


def open_examples(
    *,
    root: Path | None = None,
    split: str | None = None,
    labels: Path | None = None,
    classes: tuple[str, ...] | None = None,
    labelled: bool = True,
) -> Dataset:
    """Write the examples to the folder ``examples`` where data sets are, and list them.

    Args:
        root: Folder in which ``examples`` is made, or one that was made before; if None,
            ``$CLIPES_DATA``, else ``datasets/``.
        split: List of images; all of them if None.
        labels: Label file read instead of the one that comes with the examples.
        classes: Class names in mask order, which can only be VOC's.
        labelled: False lists the images without looking for labels.

    Raises:
        DatasetError: scikit-image or one of its photos is missing, or ``classes`` are not VOC's.
        ArtifactError: The folder cannot be written.
    """
    if classes not in (None, VOC_CLASSES):
        raise DatasetError(
            "the examples are outlined with the 20 classes of Pascal VOC, in its order",
            "leave the classes as they are, or use your own images with --dataset folder",
        )
    folder = find_base(root)
    if not (folder / _CATALOGUE).is_file():
        folder /= "examples"
    write_examples(folder)
    chosen = folder / "labels.csv" if labels is None else labels
    data = open_voc(root=folder, split=split, labels=chosen, labelled=labelled)
    return replace(data, name="examples")


def write_examples(root: Path) -> None:
    """Make a folder laid out like VOC out of scikit-image's photos and the outlines.

    ``root`` gets ``JPEGImages``, ``SegmentationClass``, ``ImageSets/Segmentation/train.txt``,
    ``labels.csv`` and, last, ``examples.json``. If all are there and up to date, nothing is done.

    Args:
        root: The folder, made if it does not exist.

    Raises:
        DatasetError: scikit-image or one of its photos is missing, or a photo is not the one that
            was outlined.
        ArtifactError: The folder cannot be written.
    """
    text = (resources.files("clipes.datasets") / _CATALOGUE).read_text("utf-8")
    catalogue: _Entry = json.loads(text)
    ids = [entry["id"] for entry in (*catalogue["photos"], *catalogue["collages"])]
    if _is_complete(root, text, ids):
        return
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["image", "labels"])
    for id_, labels, image, mask in _examples(catalogue, _photo_folder()):
        path = _image_path(root, id_)
        with atomic_write(path) as temporary:
            Image.fromarray(image).save(temporary, format="PNG")
        write_mask(_mask_path(root, id_), mask)
        rows.writerow([path.name, ";".join(labels)])
    write_text(root / "ImageSets" / "Segmentation" / "train.txt", "".join(f"{i}\n" for i in ids))
    write_text(root / "labels.csv", table.getvalue())
    write_text(root / _CATALOGUE, text)


def draw(photo: _Entry, source: Path, height: int | None = None) -> tuple[UInt8Array, UInt8Array]:
    """Read one photo and draw its mask.

    Args:
        photo: An entry of ``photos`` in ``examples.json``.
        source: Folder of the photos.
        height: Height to resize to; if None, that of the entry, else the photo's own.

    Returns:
        The image, (H, W, 3) RGB, and its mask, (H, W).

    Raises:
        DatasetError: The photo is missing or not the one that was outlined.
    """
    path = source / photo["file"]
    if not path.is_file():
        raise DatasetError(f"scikit-image comes without {path}", _REMEDY)
    image = read_image(path)
    if hashlib.sha256(image.tobytes()).hexdigest() != photo["sha256"]:
        raise DatasetError(
            f"{path} is not the photo that the outlines were drawn on",
            "they fit scikit-image 0.24 to 0.26: install one of those, or a newer clipes",
        )
    left, top, right, bottom = photo.get("crop", (0, 0, image.shape[1], image.shape[0]))
    image = image[top:bottom, left:right]
    scale = (height or photo.get("height", bottom - top)) / (bottom - top)
    if scale != 1:
        size = round(scale * (right - left)), round(scale * (bottom - top))
        image = np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    mask = np.zeros(image.shape[:2], np.uint8)
    for region in photo["regions"]:
        corners = np.rint(scale * (np.array(region["outline"]) - (left, top))).astype(np.int32)
        cv2.fillPoly(mask, [corners], _VALUES[region["label"]])
    mask[cv2.dilate(mask, _BAND) != cv2.erode(mask, _BAND)] = IGNORE
    return image, mask


def _examples(catalogue: _Entry, source: Path) -> Iterator[_Example]:
    photos = {photo["id"]: photo for photo in catalogue["photos"]}
    for id_, photo in photos.items():
        yield id_, photo["labels"], *draw(photo, source)
    # None of the photos shows two classes, so some are put side by side.
    for collage in catalogue["collages"]:
        parts = [photos[id_] for id_ in collage["photos"]]
        images, masks = zip(*(draw(part, source, collage["height"]) for part in parts), strict=True)
        labels = [label for part in parts for label in part["labels"]]
        yield collage["id"], labels, np.hstack(images), np.hstack(masks)


def _is_complete(root: Path, text: str, ids: list[str]) -> bool:
    """Tell whether ``root`` was made from this ``examples.json`` and nothing was removed since."""
    files = [root / "labels.csv", root / "ImageSets" / "Segmentation" / "train.txt"]
    files += [path(root, id_) for id_ in ids for path in (_image_path, _mask_path)]
    try:
        written = (root / _CATALOGUE).read_bytes()
    except OSError:
        return False
    return written == text.encode() and all(file.is_file() for file in files)


def _image_path(root: Path, id_: str) -> Path:
    return root / "JPEGImages" / f"{id_}.png"


def _mask_path(root: Path, id_: str) -> Path:
    return root / "SegmentationClass" / f"{id_}.png"


def _photo_folder() -> Path:
    # The files are looked up without importing scikit-image: its own functions would import SciPy,
    # and turn to the network for a photo that is missing.
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise DatasetError("the examples are photos of scikit-image, which is missing", _REMEDY)
    return Path(spec.submodule_search_locations[0]) / "data"
