"""Images so large that work on them is bounded: at what size, and how near the full result."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipes.config import CrfParams
from clipes.disk.images import read_confidence, write_confidence
from clipes.masks import pseudo
from clipes.masks.pseudo import pseudo_label, shrunk, workable_size
from clipes.seg.label import label_image
from clipes.types import CamMaps


@given(
    height=st.integers(1, 60_000),
    width=st.integers(1, 60_000),
    labels=st.integers(2, 255),
    crf=st.booleans(),
)
def test_the_size_fits_and_keeps_the_form(height: int, width: int, labels: int, crf: bool) -> None:
    h, w = workable_size((height, width), labels, crf=crf, bytes_per_label=12)
    needed = labels * 12 + (450 + labels * 14 if crf else 0)
    assert 1 <= h <= height
    assert 1 <= w <= width
    assert h * w * needed <= 2**31
    if height * width * needed <= 2**31:
        assert (h, w) == (height, width)
    elif min(h, w) > 100:
        assert h / w == pytest.approx(height / width, rel=0.03)


def test_voc_and_coco_are_worked_on_as_they_are() -> None:
    for size, labels in (((500, 500), 21), ((640, 640), 81), ((640, 640), 255)):
        assert workable_size(size, labels) == size
    assert workable_size((500, 500), 21, bytes_per_label=12) == (500, 500)
    assert workable_size((640, 640), 81, bytes_per_label=12) == (640, 640)


def scene(height: int, width: int) -> tuple[np.ndarray, CamMaps]:
    """Two coloured ellipses and maps that know about where they are."""
    image = np.full((height, width, 3), 40, np.uint8)
    maps = np.zeros((2, height // 16, width // 16), np.float32)
    for index, colour in enumerate(((200, 60, 60), (60, 60, 200))):
        centre = (width * (1 + 2 * index) // 4, height // 2)
        cv2.ellipse(image, centre, (width // 6, height // 4), 0, 0, 360, colour, -1)
        mask = np.zeros((height, width), np.float32)
        cv2.circle(mask, centre, height // 4, 0.9, -1)
        maps[index] = cv2.resize(mask, maps.shape[:0:-1], interpolation=cv2.INTER_AREA)
    return image, CamMaps(np.array([3, 7]), maps, (height, width))


def test_a_mask_of_a_smaller_copy_is_nearly_that_of_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, cams = scene(320, 480)
    whole = pseudo_label(image, cams, CrfParams())
    monkeypatch.setattr(pseudo, "_MEMORY", 40_000 * (450 + 3 * 14))
    assert workable_size((320, 480), 3) == (163, 244)
    small = pseudo_label(image, cams, CrfParams())
    assert small.mask.shape == small.confidence.shape == (320, 480)
    assert small.mask.dtype == np.uint8
    assert small.confidence.dtype == np.float32
    assert set(np.unique(small.mask)) == {0, 4, 8}
    assert (small.mask == whole.mask).mean() > 0.98
    assert 1 / 3 <= small.confidence.min() <= small.confidence.max() <= 1
    assert np.abs(small.confidence - whole.confidence).mean() < 0.02


class Answer:
    """A predictor that tells red from the rest, and remembers what it was asked."""

    labels = 2

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, image: np.ndarray, present: object = None) -> np.ndarray:
        self.sizes.append(image.shape[:2])
        red = (image[..., 0] > 120).astype(np.float32)
        return np.stack([1 - red, red])


def test_predictions_of_large_images_are_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    image, _ = scene(320, 480)
    predictor = Answer()
    whole, shrunk_first = label_image(image, predictor)
    monkeypatch.setattr(pseudo, "_MEMORY", 40_000 * 24)
    small, shrunk_then = label_image(image, predictor)
    assert (shrunk_first, shrunk_then) == (False, True)
    assert predictor.sizes == [(320, 480), (163, 244)]
    assert small.mask.shape == small.confidence.shape == whole.mask.shape
    assert (small.mask == whole.mask).mean() > 0.98


def test_an_image_of_its_own_size_is_not_copied() -> None:
    image, _ = scene(32, 48)
    assert shrunk(image, (32, 48)) is image
    assert shrunk(image, (16, 24)).shape == (16, 24, 3)


def test_confidence_is_written_in_parts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    confidence = np.random.default_rng(0).random((50, 30), dtype=np.float32)
    write_confidence(tmp_path / "a.png", confidence)
    for pixels in (1, 70, 31 * 30):
        monkeypatch.setattr("clipes.disk.images._PIXELS_AT_ONCE", pixels)
        write_confidence(tmp_path / "b.png", confidence)
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    read = read_confidence(tmp_path / "a.png")
    np.testing.assert_allclose(read, confidence, atol=0.5 / 65535 + 1e-7)
