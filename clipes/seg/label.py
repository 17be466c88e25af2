"""From what a segmenter says of an image to a mask and a confidence map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipes.config import CrfParams
from clipes.masks.crf import dense_crf
from clipes.masks.pseudo import most_probable, of_present, shrunk, workable_size
from clipes.seg.predict import BYTES_PER_LABEL
from clipes.seg.recipes import LabelPredictor
from clipes.types import PseudoLabel, UInt8Array


def label_image(
    image: UInt8Array,
    predictor: LabelPredictor,
    crf: CrfParams | None = None,
    present: Sequence[int] | None = None,
) -> tuple[PseudoLabel, bool]:
    """Ask a segmenter about an image.

    Args:
        image: (H, W, 3) RGB uint8.
        predictor: The segmenter.
        crf: Settings of the dense CRF that comes last; None for none.
        present: The 0-based classes that the image may hold; None for all.

    Returns:
        The mask and the probability of the label chosen at each pixel, and whether they were made
        on a smaller copy.
    """
    size = (image.shape[0], image.shape[1])
    work = workable_size(
        size, predictor.labels, crf=crf is not None, bytes_per_label=BYTES_PER_LABEL
    )
    view = shrunk(image, work)
    probs = predictor(view)
    labels = np.arange(predictor.labels - 1)
    if present is not None:
        labels = np.array(sorted(present), np.int64)
        probs = of_present(probs, labels)
    if crf is not None:
        probs = dense_crf(probs, view, crf)
    return most_probable(probs, labels, size), work != size
