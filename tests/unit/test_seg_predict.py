"""Prediction: windows that cover, and averages that do what they say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipes.masks.mosaic import windows
from clipes.seg.augment import normalise
from clipes.seg.deeplab import DeepLab, DeepLabSpec
from clipes.seg.predict import Predictor
from clipes.seg.recipes import TestSettings

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


class Pointwise(nn.Module):
    """A segmenter that sees one pixel at a time, so that windows cannot matter."""

    spec = DeepLabSpec("deeplabv2", "resnet18", 8, ("a", "b"))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert max(images.shape[2:]) <= 1024
        return self.layer(images)


@given(length=st.integers(1, 3000), side=st.integers(4, 700))
def test_windows_cover_and_overlap(length: int, side: int) -> None:
    parts = list(windows(length, side))
    assert parts[0].start == 0
    assert parts[-1].stop == length
    assert all(part.stop - part.start == min(side, length) for part in parts)
    for one, other in itertools.pairwise(parts):
        assert one.stop - other.start >= side // 4


@pytest.mark.parametrize("window", [16, 37, 64])
def test_windows_give_what_the_whole_gives(window: int) -> None:
    model = Pointwise()
    whole = Predictor(model, TestSettings())(IMAGE)
    parts = Predictor(model, TestSettings(window=window))(IMAGE)
    assert whole.shape == (3, 50, 70)
    np.testing.assert_allclose(whole.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


@pytest.mark.parametrize("window", [16, 64])
def test_classes_known_to_be_absent_leave_their_share_to_the_rest(window: int) -> None:
    predictor = Predictor(Pointwise(), TestSettings(window=window))
    free, told = predictor(IMAGE), predictor(IMAGE, present=[1])
    assert not told[1].any()
    np.testing.assert_allclose(told[[0, 2]], free[[0, 2]] / free[[0, 2]].sum(0), atol=1e-5)


def test_a_mirror_image_gets_the_mirrored_answer() -> None:
    torch.manual_seed(0)
    model = DeepLab(DeepLabSpec("deeplabv2", "resnet18", 8, ("a", "b")))
    predictor = Predictor(model, TestSettings((1.0, 0.5), flip=True))
    probs = predictor(IMAGE)
    mirrored = predictor(np.ascontiguousarray(IMAGE[:, ::-1]))
    np.testing.assert_allclose(mirrored[:, :, ::-1], probs, atol=1e-5)
    plain = Predictor(model, TestSettings((1.0, 0.5)))(IMAGE)
    assert np.abs(plain - probs).max() > 1e-4


def test_scales_are_averaged() -> None:
    model = Pointwise()
    both = Predictor(model, TestSettings((1.0, 0.5)))(IMAGE)
    alone = [Predictor(model, TestSettings((scale,)))(IMAGE) for scale in (1.0, 0.5)]
    np.testing.assert_allclose(both, (alone[0] + alone[1]) / 2, atol=1e-5)


def test_the_probabilities_are_the_networks() -> None:
    torch.manual_seed(0)
    model = DeepLab(DeepLabSpec("deeplabv3", "resnet18", 16, ("a", "b"))).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(normalise(IMAGE))[None])
        full = nn.functional.interpolate(logits, size=(50, 70), mode="bilinear")
    expected = full.softmax(1)[0].numpy()
    np.testing.assert_allclose(Predictor(model, TestSettings())(IMAGE), expected, atol=1e-6)


def test_one_pixel_is_an_image() -> None:
    probs = Predictor(Pointwise(), TestSettings((0.5, 1.0, 2.0), flip=True))(IMAGE[:1, :1])
    assert probs.shape == (3, 1, 1)
    assert probs.sum() == pytest.approx(1)
