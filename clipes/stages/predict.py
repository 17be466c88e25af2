"""A trained segmenter's masks of any images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from clipes.config import CrfParams
from clipes.datasets.base import IMAGE_SUFFIXES, image_id
from clipes.datasets.pictures import Pictures, find_pictures
from clipes.disk.images import read_origin, write_mask
from clipes.errors import ClipesError, DatasetError, ImageError, WriteError
from clipes.masks.crf import dense_crf
from clipes.masks.pseudo import SHRUNK, shrunk, workable_size
from clipes.run.loop import Summary
from clipes.run.origin import PredictionOrigin, read_picture, same_picture
from clipes.seg.predict import BYTES_PER_LABEL, Predictor
from clipes.types import Failure, Progress, UInt8Array


@dataclass(frozen=True)
class Found:
    """The images that are to be predicted.

    Attributes:
        images: Their paths, by id.
        failures: Those whose names make no id.
        remarks: What was seen and not used, how many, and why.
    """

    images: dict[str, Path]
    failures: tuple[Failure, ...]
    remarks: tuple[str, ...]


def find_images(paths: Sequence[Path], out: Path) -> Found:
    """Return the images named, and those in and below the folders named, with the ids of ``cam``.

    Args:
        paths: Images, and folders of images.
        out: Where the masks go: a folder below one of ``paths`` that holds none of the images.

    Raises:
        DatasetError: A path is not there, a folder holds no image, or two images share an id.
    """
    images: dict[str, Path] = {}
    failures: list[Failure] = []
    remarks: list[str] = []
    for path in paths:
        if path.is_dir():
            pictures = find_pictures(path, leave_out=out)
            failures += pictures.problems.values()
            remarks += pictures.remarks()
            pairs = _pairs(path, pictures)
        elif path.is_file():
            pairs = [(image_id(path.name), path)]
        else:
            raise DatasetError(f"there is no file or folder {path}", "check the path")
        for id_, image in pairs:
            if images.setdefault(id_, image) != image:
                raise DatasetError(
                    f"{images[id_]} and {image} would both become {id_}.png",
                    "rename one, or predict them into different folders",
                )
    return Found(images, tuple(failures), tuple(remarks))


def _pairs(path: Path, pictures: Pictures) -> list[tuple[str, Path]]:
    if not pictures.ids:
        seen = "; ".join([f"no image in {path}", *pictures.remarks()])
        raise DatasetError(seen, f"it takes {', '.join(IMAGE_SUFFIXES)}")
    return [(id_, pictures.folder / name) for name, id_ in pictures.ids.items()]


def predict(
    images: dict[str, Path],
    predictor: Predictor,
    out: Path,
    *,
    crf: CrfParams | None,
    made_with: str | None = None,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Write the mask ``<id>.png`` of every image.

    Args:
        images: Paths by id.
        predictor: The segmenter.
        out: Folder of the masks.
        crf: Settings of the dense CRF at the end, or None for none.
        made_with: Digest of the segmenter and of how it is asked: masks that say that they were
            made with it, of the pictures that there are, stay. None makes all again.
        progress: Called after each image.
        report: Called with each image that cannot be processed; the others go on.

    Raises:
        WriteError: A mask cannot be written; the rest is not tried.
    """
    paths = {id_: out / f"{id_}.png" for id_ in images}
    todo = [id_ for id_ in images if not _is_done(paths[id_], images[id_], made_with)]
    failures = []
    large = 0
    progress(0, len(todo))
    for index, id_ in enumerate(todo):
        try:
            pixels, picture = read_picture(images[id_])
            mask, was_shrunk = predict_any_size(pixels, predictor, crf)
            origin = PredictionOrigin(picture.sha256, picture.size, made_with or "")
            write_mask(paths[id_], mask, origin=origin.text() if made_with else "")
            large += was_shrunk
        except WriteError:
            raise
        except ClipesError as error:
            failures.append(Failure(id_, str(error)))
            report(failures[-1])
        progress(index + 1, len(todo))
    remarks = {SHRUNK: large} if large else {}
    return Summary(len(todo) - len(failures), len(images) - len(todo), tuple(failures), remarks)


def _is_done(path: Path, image: Path, made_with: str | None) -> bool:
    """Tell whether a mask is there and is the one that would be made now."""
    if made_with is None or not path.exists():
        return False
    try:
        origin = PredictionOrigin.parse(read_origin(path))
    except ImageError:
        return False
    if origin is None:  # of an older clipes
        return True
    written = path.stat().st_mtime_ns
    same, _ = same_picture(image, origin.image, origin.bytes, written)
    return same and origin.model == made_with


def predict_any_size(
    image: UInt8Array, predictor: Predictor, crf: CrfParams | None
) -> tuple[UInt8Array, bool]:
    """Return the mask of an image (H, W, 3), and whether it was made on a smaller copy."""
    size = (image.shape[0], image.shape[1])
    work = workable_size(
        size, predictor.labels, crf=crf is not None, bytes_per_label=BYTES_PER_LABEL
    )
    mask = predict_mask(shrunk(image, work), predictor, crf)
    if work == size:
        return mask, False
    return np.asarray(cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)), True


def predict_mask(image: UInt8Array, predictor: Predictor, crf: CrfParams | None) -> UInt8Array:
    """Return the mask of an image (H, W, 3): (H, W) uint8."""
    probs = predictor(image)
    if crf is not None:
        probs = dense_crf(probs, image, crf)
    mask: UInt8Array = probs.argmax(0).astype(np.uint8)
    return mask
