"""Scores of every stage that has output, against ground truth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from clipes.artifacts import Run
from clipes.config import CONFIDENCE_THRESHOLD
from clipes.errors import ClipesError
from clipes.images import read_mask
from clipes.metrics import ConfusionMatrix, Scores
from clipes.pseudo import label_pixels, upsample, with_background
from clipes.types import IGNORE, CamMaps, Progress, PseudoLabel, UInt8Array


def score_masks(
    folder: Path, truths: Mapping[str, Path], n_classes: int, progress: Progress
) -> Scores:
    """Score the masks ``folder/<id>.png``.

    Args:
        folder: Masks, 8-bit PNG.
        truths: Ground-truth mask of each id to score.
        n_classes: Number of classes without background.
        progress: Called after each image.

    Raises:
        ClipesError: A mask cannot be read or does not fit its ground truth.
    """
    return _score(
        ((id_, {"": read_mask(folder / f"{id_}.png")}) for id_ in truths),
        truths,
        n_classes,
        progress,
    )[""]


def score_maps(
    run: Run,
    truths: Mapping[str, Path],
    n_classes: int,
    exponents: Sequence[float],
    progress: Progress,
) -> dict[str, Scores]:
    """Score the masks that the maps make without a CRF, by background exponent.

    Arguments and errors as for ``score_masks``.
    """

    def masks() -> Iterator[tuple[str, dict[str, UInt8Array]]]:
        for id_ in truths:
            cams = run.load_cams(id_)
            yield id_, dict(_cam_masks(cams, exponents))

    return _score(masks(), truths, n_classes, progress)


def score_pseudo(
    run: Run, truths: Mapping[str, Path], n_classes: int, progress: Progress
) -> dict[str, Scores]:
    """Score the pseudo-masks, whole and where their confidence reaches the threshold.

    Arguments and errors as for ``score_masks``.
    """
    kept = f"CRF, confidence >= {CONFIDENCE_THRESHOLD}"

    def masks() -> Iterator[tuple[str, dict[str, UInt8Array]]]:
        for id_ in truths:
            pseudo = run.load_pseudo(id_)
            yield id_, {"CRF": pseudo.mask, kept: confident(pseudo)}

    return _score(masks(), truths, n_classes, progress)


def confident(pseudo: PseudoLabel, threshold: float = CONFIDENCE_THRESHOLD) -> UInt8Array:
    """Return the (H, W) mask with ``IGNORE`` where the confidence is below ``threshold``."""
    kept: UInt8Array = np.where(pseudo.confidence >= threshold, pseudo.mask, IGNORE)
    return kept.astype(np.uint8)


def _cam_masks(cams: CamMaps, exponents: Sequence[float]) -> Iterator[tuple[str, UInt8Array]]:
    full = upsample(cams.maps, cams.size)
    for exponent in exponents:
        scores = with_background(full, exponent)
        yield f"CAM, background exponent {exponent:g}", label_pixels(scores, cams.labels)


def _score(
    masks: Iterable[tuple[str, Mapping[str, UInt8Array]]],
    truths: Mapping[str, Path],
    n_classes: int,
    progress: Progress,
) -> dict[str, Scores]:
    """Stream (id, {name: mask}) pairs into one confusion matrix per name."""
    matrices: dict[str, ConfusionMatrix] = {}
    progress(0, len(truths))
    for index, (id_, named) in enumerate(masks):
        truth = read_mask(truths[id_])
        for name, mask in named.items():
            matrix = matrices.setdefault(name, ConfusionMatrix(n_classes + 1))
            try:
                matrix.update(truth, mask)
            except ClipesError as error:
                raise type(error)(f"{id_} ({name}): {error.what}", error.remedy) from error
        progress(index + 1, len(truths))
    return {name: matrix.scores() for name, matrix in matrices.items()}
