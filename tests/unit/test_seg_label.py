"""From a segmenter's answer to a mask, where it is known what an image holds."""

from __future__ import annotations

import numpy as np
import pytest

from clipes.seg.label import as_maps, label_image
from clipes.seg.recipes import LabelPredictor
from clipes.types import Float32Array, UInt8Array

SIZE = (6, 8)


class Answer(LabelPredictor):
    """A segmenter that says the same of every image: background, and class 1 rather than 0."""

    labels = 3

    def __init__(self, probs: Float32Array) -> None:
        self._probs = probs

    def __call__(self, image: UInt8Array) -> Float32Array:
        """Return it."""
        return self._probs.copy()


@pytest.fixture
def probs() -> Float32Array:
    rng = np.random.default_rng(0)
    scores = rng.random((3, *SIZE)) * np.array([1.0, 0.01, 0.5])[:, None, None]
    return (scores / scores.sum(0)).astype(np.float32)


def test_a_class_that_an_image_holds_is_sure_somewhere(probs: Float32Array) -> None:
    image = np.zeros((*SIZE, 3), np.uint8)
    free, _ = label_image(image, Answer(probs))
    assert set(np.unique(free.mask)) == {0, 2}
    told, _ = label_image(image, Answer(probs), present=[0])
    share = probs[1] / (probs[0] + probs[1])
    share = (share - share.min()) / (share - share.min()).max()
    np.testing.assert_array_equal(told.mask, share > 0.5)
    np.testing.assert_allclose(told.confidence, np.maximum(share, 1 - share), atol=1e-4)


def test_each_class_reaches_one_and_the_background_has_the_rest(probs: Float32Array) -> None:
    got = as_maps(probs)
    maps = probs[1:] - probs[1:].min((1, 2), keepdims=True)
    maps /= maps.max((1, 2), keepdims=True)
    scores = np.concatenate([1 - maps.max(0, keepdims=True), maps])
    np.testing.assert_allclose(got, scores / scores.sum(0), atol=1e-4)
    assert len(as_maps(probs[:1] / probs[:1])) == 1, "nothing but background"
