"""From what a segmenter says of an image to a mask and a confidence map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipes.config import CrfParams
from clipes.device import memory_for
from clipes.disk.large import LargePicture
from clipes.maps.gradcam import min_max
from clipes.masks.crf import dense_crf
from clipes.masks.mosaic import LargeLabel, Tiles, averaged
from clipes.masks.pseudo import (
    in_mask_order,
    largest_tile,
    most_probable,
    shrunk,
    upsample,
    with_background,
    workable_size,
)
from clipes.masks.values import value_of
from clipes.seg.predict import BYTES_PER_LABEL
from clipes.seg.recipes import LabelPredictor
from clipes.types import CamMaps, Float32Array, Progress, PseudoLabel, UInt8Array, size_text


@dataclass(frozen=True)
class FirstOpinion:
    """Maps of an image that were there before the segmenter was asked.

    Attributes:
        cams: The maps, of all classes that the image holds.
        share: The segmenter's share in the maps that a mask is made of, in [0, 1]; the rest is
            theirs.
    """

    cams: CamMaps
    share: float


def label_image(
    image: UInt8Array,
    predictor: LabelPredictor,
    crf: CrfParams | None = None,
    present: Sequence[int] | None = None,
    first: FirstOpinion | None = None,
) -> tuple[PseudoLabel, bool]:
    """Ask a segmenter about an image.

    Args:
        image: (H, W, 3) RGB uint8.
        predictor: The segmenter.
        crf: Settings of the dense CRF that comes last; None for none.
        present: The 0-based classes that the image holds; None if that is not known.
        first: What is known of these classes beside; None for the segmenter alone.

    Returns:
        The mask and the probability of the label chosen at each pixel, and whether they were made
        on a smaller copy.
    """
    size = (image.shape[0], image.shape[1])
    work = workable_size(
        size, predictor.labels, crf=crf is not None, bytes_per_label=BYTES_PER_LABEL
    )
    view = shrunk(image, work)
    probs = _asked(predictor, view, present)
    labels = np.arange(predictor.labels - 1)
    if present is not None:
        labels = np.array(sorted(present), np.int64)
        probs = as_maps(probs[[0, *map(value_of, labels.tolist())]], first)
    if crf is not None:
        probs = dense_crf(probs, view, crf)
    return most_probable(probs, labels, size), work != size


def _asked(
    predictor: LabelPredictor, view: UInt8Array, present: Sequence[int] | None = None
) -> Float32Array:
    """Return what a segmenter says.

    Raises:
        BackendError: The GPU has too little memory.
    """
    what = f"an image of {size_text(view.shape[1::-1])} pixels"
    with memory_for(what, "use smaller scales, or --device cpu"):
        return predictor(view, present)


def as_maps(probs: Float32Array, first: FirstOpinion | None = None) -> Float32Array:
    """Return the probabilities of labels that an image is known to hold, each sure somewhere.

    A segmenter that is unsure of a class everywhere would leave it out. As maps of ``cam`` each is
    scaled to [0, 1], and the background is what is left of the surest.

    Args:
        probs: (1 + K, H, W) that sum to 1, background first, classes in mask order.
        first: Averaged with them, class by class; None for nothing.

    Returns:
        The same shape, sums to 1.
    """
    if len(probs) == 1:
        return probs
    maps = min_max(probs[1:])
    if first is not None:
        given = upsample(in_mask_order(first.cams).maps, (maps.shape[1], maps.shape[2]))
        maps = min_max(first.share * maps + (1 - first.share) * given)
    scores = with_background(maps, 1.0)
    scores /= scores.sum(0)
    return scores


def largest_tile_of(predictor: LabelPredictor, crf: CrfParams | None) -> int:
    """Return the side of the largest tile that a segmenter can be asked about.

    Tiles are averaged, which takes as much memory once more as to ask.
    """
    return largest_tile(predictor.labels, crf=crf is not None, bytes_per_label=2 * BYTES_PER_LABEL)


def label_tiles(
    picture: LargePicture,
    side: int,
    predictor: LabelPredictor,
    crf: CrfParams | None,
    folder: Path,
    progress: Progress,
) -> LargeLabel:
    """Ask a segmenter about a picture tile by tile; each is to it what a photo is.

    Args:
        picture: The picture.
        side: Of the tiles, ``largest_tile_of`` at most.
        predictor: The segmenter.
        crf: Settings of the dense CRF that comes last in each tile; None for none.
        folder: Where there is disk.
        progress: Called after each tile.

    Raises:
        WriteError: There is no room.
    """
    tiles, made = Tiles.of(picture.size, side), LargeLabel(picture.size, folder)

    def found() -> Iterator[Float32Array]:
        for done, window in enumerate(tiles):
            progress(done, len(tiles))
            view = picture.window(*window)
            probs = _asked(predictor, view)
            yield probs if crf is None else dense_crf(probs, view, crf)
        progress(len(tiles), len(tiles))

    parts = averaged(tiles, found(), predictor.labels, folder)
    made.fill(parts, np.arange(predictor.labels - 1))
    return made
