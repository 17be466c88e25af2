"""Sharpness of a prompt, the number templates are chosen by (paper section 3.2).

A sharp prompt lets one object of an image take all the score, and the others get no map of their
own; a good one treats the objects of an image alike. With s_ij the score of class j in image i::

    S = sum_i Var_j(s_ij) / sum_i Mean_j(s_ij)        over the classes j present in image i

Lower is better. It is a ratio of sums, not a mean of ratios: an image in which CLIP sees little
counts little. What the paper leaves open is decided as follows, and the reference has no code for
it.

- Scores are those of the original CLIP classification: the CLS feature of the whole image against
  one vector per class, softmax over *all* classes of the vocabulary. Over the present ones alone
  the mean would always be 1/K, and dividing by it would say nothing. Background words take no part:
  they belong to the activation maps.
- The variance is the population's (divide by K): an image with one class then has variance 0 and
  adds to the denominator only, where the sample variance would be undefined.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipes.types import FloatArray


def class_scores(images: FloatArray, classes: FloatArray, logit_scale: float) -> FloatArray:
    """Classify images as CLIP does.

    Args:
        images: (n, E) unit image features.
        classes: (C, E) unit text features.
        logit_scale: Factor on the cosines.

    Returns:
        (n, C) float64 probabilities, rows sum to 1.
    """
    logits = logit_scale * (images @ classes.T).astype(np.float64)
    scores: FloatArray = np.exp(logits - logits.max(1, keepdims=True))
    scores /= scores.sum(1, keepdims=True)
    return scores


def sharpness(scores: FloatArray, present: npt.NDArray[np.bool_]) -> float:
    """Return S, from 0 (classes of an image always score alike) up to less than 1.

    Args:
        scores: (n, C) in [0, 1].
        present: (n, C), at least one class in every image.
    """
    count = present.sum(1)
    mean = (scores * present).sum(1) / count
    variance = (np.square(scores - mean[:, None]) * present).sum(1) / count
    return float(variance.sum() / mean.sum())
