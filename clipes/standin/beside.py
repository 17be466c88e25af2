"""Vectors of new classes beside vectors that are known, from the few images of a run.

What is known stays as it is: its vectors tell new classes from what stands around them, which a few
images cannot. What is new is fitted as in ``clipes.standin.fit``, with two differences. Whole
images would begin with their surroundings, which a few images may well share; so each begins with
those patches that look like some in the other images of its class and unlike all in the rest. And
the covariance of so few patches is not to be believed, hence the ridge: vectors are all but the
means of claimed patches. All vectors get the run's own common part, and no own part has a share in
it, so that no name is preferred for what all images of the run have in common.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from clipes.standin.fit import (
    EncodedImage,
    FitParams,
    Fitted,
    Pool,
    Turns,
    check_labels,
    fit,
)
from clipes.types import Float32Array, Progress, evenly_spaced
from clipes.words.features import TextFeatures, unit_rows

FEW = FitParams(ridge=3.0, prior=1.0)
"""Settings for some images of each class; see ``benchmarks/words.py``."""


_COMPARED = 4096  # patches of all images together that each patch is compared with, or one of each

_TYPICAL = 0.25  # share of an image's patches that its classes begin with


@torch.inference_mode()
def fit_beside(
    images: Sequence[EncodedImage],
    known: TextFeatures | None,
    *,
    logit_scale: float,
    model: str,
    note: str,
    params: FitParams = FEW,
    progress: Progress,
) -> Fitted:
    """Fit a vector to every name among the labels that has none.

    Args:
        images: Encoded images; their order does not matter.
        known: Vectors that are known; None to fit all.
        logit_scale: Factor on the cosines that the vectors are to be used with.
        model: Name of the model, for the result.
        note: What a reader of results must know, for the result.
        params: Settings.
        progress: Called after each round.

    Returns:
        Vectors of all names among the labels, sorted, and as background words those of ``known``;
        and the number of images of the names that were fitted.

    Raises:
        VocabularyError: All images are labelled alike.
    """
    counts = Counter(name for image in images for name in image.names)
    names = tuple(sorted(counts))
    if known is None:
        return fit(
            images,
            names,
            logit_scale=logit_scale,
            model=model,
            note=note,
            params=params,
            progress=progress,
        )
    new = known.lacks(names)
    if new:
        check_labels(images)
    given = known.for_classes(tuple(name for name in names if name not in new))
    pool, common = Pool.of(images), _mean_direction(known)
    fixed = torch.zeros(len(names), known.class_vectors.shape[1])
    fixed[[name not in new for name in names]] = _own_parts(given.class_vectors, common)
    fitted = torch.tensor([name in new for name in names])
    words = _own_parts(given.background_vectors, common)

    def put_together(own: Tensor) -> Tensor:
        own = params.spread * own[:-1] / own[:-1][fitted].norm(dim=1).mean()
        parts = torch.cat([torch.where(fitted[:, None], own, fixed), words])
        parts = parts - (parts @ pool.common)[:, None] * pool.common
        return F.normalize(pool.common + parts, dim=1)

    row = {name: index for index, name in enumerate(names)}
    labels = [torch.tensor([row[name] for name in image.names]) for image in images]
    turns = Turns(images, labels, len(names), len(names) + 1, logit_scale)
    lent = typical_patches(pool, labels, len(names) + 1)
    rows = unit_rows(turns.fit(pool, lent, put_together, params, progress).numpy())
    text = TextFeatures(
        names, given.background_words, rows[: len(names)], rows[len(names) :], model, note
    )
    return Fitted(text, {name: counts[name] for name in new})


def typical_patches(pool: Pool, labels: Sequence[Tensor], n_names: int) -> tuple[Tensor, Tensor]:
    """Return sums (M, E) and weights (M,) when each image lends its names what is typical of them.

    Args:
        pool: The patches of the images.
        labels: (K,) rows of the names of each image.
        n_names: M.
    """
    sums, weights = torch.zeros(n_names, pool.patches.shape[1]), torch.zeros(n_names)
    shows = torch.zeros(len(labels), n_names, dtype=torch.bool)
    for image, label in enumerate(labels):
        shows[image, label] = True
    unit = F.normalize(pool.patches, dim=1).split(pool.counts)
    each = max(1, _COMPARED // len(unit))
    some = [part[evenly_spaced(len(part), each)] for part in unit]
    others = torch.cat(some)
    owner = torch.arange(len(some)).repeat_interleave(torch.tensor([len(part) for part in some]))
    for image, patches in enumerate(pool.patches.split(pool.counts)):
        cosines = unit[image] @ others.T
        for name in labels[image].tolist():
            same = shows[owner, name]
            typical = _highest(cosines, same & (owner != image)) - _highest(cosines, ~same)
            best = typical.topk(max(1, round(_TYPICAL * len(patches)))).indices
            sums[name] += patches[best].mean(0)
            weights[name] += 1
    return sums, weights


def _highest(cosines: Tensor, among: Tensor) -> Tensor:
    """Return the highest cosine of each row among some columns; 0 if there are none."""
    if not among.any():
        return torch.zeros(len(cosines))
    return cosines[:, among].max(1).values


def _mean_direction(known: TextFeatures) -> Float32Array:
    """Return what all vectors have in common: (E,), of length 1."""
    rows = np.concatenate([known.class_vectors, known.background_vectors])
    mean: Float32Array = unit_rows(rows.mean(0, keepdims=True))[0]
    return mean


def _own_parts(vectors: Float32Array, common: Float32Array) -> Tensor:
    """Return what (n, E) vectors have beside the common part, as long as if that were 1 long."""
    return torch.from_numpy(vectors / (vectors @ common)[:, None] - common)
