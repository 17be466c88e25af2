"""A trained segmenter's masks of any images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from clipes.config import CrfParams
from clipes.crf import dense_crf
from clipes.datasets.base import IMAGE_SUFFIXES, image_id
from clipes.errors import ClipesError, DatasetError
from clipes.files import list_files
from clipes.images import read_image, write_mask
from clipes.runner import Summary
from clipes.seg.predict import Predictor
from clipes.types import Failure, Progress, UInt8Array


def find_images(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the images named, or right in the folders named, by id.

    Raises:
        DatasetError: A path is not there, a folder holds no image, or two images share a name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            images = list_files(path, *IMAGE_SUFFIXES)
            if not images:
                raise DatasetError(f"no image in {path}", f"it takes {', '.join(IMAGE_SUFFIXES)}")
        elif path.is_file():
            images = [path]
        else:
            raise DatasetError(f"there is no file or folder {path}", "check the path")
        for image in images:
            id_ = image_id(image.name)
            if found.setdefault(id_, image) != image:
                raise DatasetError(
                    f"{found[id_]} and {image} would both become {id_}.png",
                    "rename one, or predict them into different folders",
                )
    return found


def predict(
    images: dict[str, Path],
    predictor: Predictor,
    out: Path,
    *,
    crf: CrfParams | None,
    replace: bool,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Write the mask ``<id>.png`` of every image.

    Args:
        images: Paths by id.
        predictor: The segmenter.
        out: Folder of the masks.
        crf: Settings of the dense CRF at the end, or None for none.
        replace: Whether masks that are there are made again.
        progress: Called after each image.
        report: Called with each image that cannot be processed; the others go on.
    """
    paths = {id_: out / f"{id_}.png" for id_ in images}
    todo = [id_ for id_, path in paths.items() if replace or not path.exists()]
    failures = []
    progress(0, len(todo))
    for index, id_ in enumerate(todo):
        try:
            write_mask(paths[id_], predict_mask(read_image(images[id_]), predictor, crf))
        except ClipesError as error:
            failures.append(Failure(id_, str(error)))
            report(failures[-1])
        progress(index + 1, len(todo))
    return Summary(len(todo) - len(failures), len(images) - len(todo), tuple(failures))


def predict_mask(image: UInt8Array, predictor: Predictor, crf: CrfParams | None) -> UInt8Array:
    """Return the mask of an image (H, W, 3): (H, W) uint8."""
    probs = predictor(image)
    if crf is not None:
        probs = dense_crf(probs, image, crf)
    mask: UInt8Array = probs.argmax(0).astype(np.uint8)
    return mask
