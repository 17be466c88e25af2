"""From a segmenter's answer to a mask, where it is known what an image holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from clipes.errors import BackendError
from clipes.seg.label import FirstOpinion, as_maps, label_image
from clipes.seg.recipes import LabelPredictor
from clipes.types import CamMaps, Float32Array, UInt8Array

SIZE = (6, 8)


class Answer(LabelPredictor):
    """A segmenter that says the same of every image: background, and class 1 rather than 0."""

    labels = 3

    def __init__(self, probs: Float32Array) -> None:
        self._probs = probs

    def __call__(self, image: UInt8Array, present: Sequence[int] | None = None) -> Float32Array:
        """Return it, without absent classes."""
        probs = self._probs.copy()
        if present is not None:
            probs[[1 + k for k in (0, 1) if k not in present]] = 0
        return probs / probs.sum(0)


@pytest.fixture
def probs() -> Float32Array:
    rng = np.random.default_rng(0)
    scores = rng.random((3, *SIZE)) * np.array([1.0, 0.01, 0.5])[:, None, None]
    return (scores / scores.sum(0)).astype(np.float32)


def test_a_gpu_that_is_too_small_is_one_line() -> None:
    class Full:
        labels = 3

        def __call__(self, image: UInt8Array, present: Sequence[int] | None = None) -> Float32Array:
            raise torch.cuda.OutOfMemoryError

    with pytest.raises(
        BackendError, match="too little memory for an image of 8 x 6 pixels; use sm"
    ):
        label_image(np.zeros((6, 8, 3), np.uint8), Full())


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


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_maps_that_were_there_have_their_share(probs: Float32Array, share: float) -> None:
    rng = np.random.default_rng(1)
    given = rng.random((2, *SIZE)).astype(np.float16)
    cams = CamMaps(np.array([1, 0]), given, SIZE)  # not in mask order
    got = as_maps(probs, FirstOpinion(cams, share))

    def scaled(maps: Float32Array) -> Float32Array:
        maps = maps - maps.min((1, 2), keepdims=True)
        return maps / maps.max((1, 2), keepdims=True)

    both = scaled(share * scaled(probs[1:]) + (1 - share) * given[::-1].astype(np.float32))
    scores = np.concatenate([1 - both.max(0, keepdims=True), both])
    np.testing.assert_allclose(got, scores / scores.sum(0), atol=1e-4)
    if share == 1:
        np.testing.assert_allclose(got, as_maps(probs), atol=1e-5)


def test_coarse_maps_are_brought_to_the_size_of_the_image(probs: Float32Array) -> None:
    left = np.zeros((1, 3, 4), np.float16)
    left[:, :, :2] = 1
    even = np.full((3, *SIZE), 1 / 3, np.float32)
    even[1, 0, 0] = 0.34  # hardly anything is said
    first = FirstOpinion(CamMaps(np.array([0]), left, SIZE), 0.01)
    told, _ = label_image(np.zeros((*SIZE, 3), np.uint8), Answer(even), None, [0], first)
    assert (told.mask[:, :3] == 1).all()
    assert (told.mask[:, 5:] == 0).all()
