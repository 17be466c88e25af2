from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from clipes.datasets.base import IMAGE_SUFFIXES
from clipes.disk import images
from clipes.disk.images import (
    read_confidence,
    read_image,
    read_mask,
    voc_palette,
    write_confidence,
    write_mask,
)
from clipes.errors import ArtifactError, ImageError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
PIXELS = np.array([[RED, GREEN, BLUE], [WHITE, (0, 0, 0), (9, 90, 200)]], dtype=np.uint8)

a_few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def png(width: int, height: int, bits: int, colour: int) -> bytes:
    """A PNG that is all header: what its size claims is not there."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(body))
    end = b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + crc + end


def encoded(format_: str, **options) -> bytes:
    buffer = io.BytesIO()
    grid = np.arange(24 * 20 * 3, dtype=np.uint32).reshape(24, 20, 3) * 37 % 256
    Image.fromarray(grid.astype(np.uint8)).save(buffer, format=format_, **options)
    return buffer.getvalue()


def by_hand(stored: np.ndarray, orientation: int) -> np.ndarray:
    """What each EXIF value says about where the first stored row and column are shown."""
    if orientation in (5, 6, 7, 8):
        stored = stored.transpose(1, 0, 2)
    rows_down = orientation in (1, 2, 5, 6)
    columns_right = orientation in (1, 4, 5, 8)
    return stored[:: 1 if rows_down else -1, :: 1 if columns_right else -1]


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.jpg", "no-suffix"])
def test_lossless_pictures_keep_their_pixels_whatever_the_suffix(tmp_path, name):
    format_ = {"a.bmp": "BMP", "a.tif": "TIFF"}.get(name, "PNG")
    path = tmp_path / name
    Image.fromarray(PIXELS).save(path, format=format_)
    image = read_image(path)
    assert np.array_equal(image, PIXELS)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert image.flags.c_contiguous


@pytest.mark.skipif(not images.READS_AVIF, reason="this Pillow does not decode AVIF")
def test_avif_is_read_where_pillow_can(tmp_path):
    path = tmp_path / "a.avif"
    Image.new("RGB", (32, 24), RED).save(path)
    image = read_image(path)
    assert image.shape == (24, 32, 3)
    assert np.abs(image.astype(int) - RED).max() <= 8
    assert ".avif" in IMAGE_SUFFIXES
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ImageError, match=r"a\.avif"):
        read_image(path)


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    path = tmp_path / "a.gif"
    frames = [Image.new("RGB", (4, 3), colour) for colour in (RED, BLUE)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert (read_image(path) == RED).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    Image.fromarray(PIXELS).save(path, exif=exif)
    assert np.array_equal(read_image(path), by_hand(PIXELS, orientation))


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[(*RED, 255), (*RED, 0), (0, 0, 0, 51)]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert read_image(tmp_path / "rgba.png").tolist() == [[[255, 0, 0], [255] * 3, [204] * 3]]
    grey = np.array([[(10, 255), (10, 0)]], dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png").tolist() == [[[10] * 3, [255] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    palette.putpalette([*RED, *BLUE])
    palette.save(tmp_path / "p.png", transparency=1)
    assert read_image(tmp_path / "p.png").tolist() == [[list(RED), list(WHITE)]]


def test_grey_palette_and_bilevel_become_rgb(tmp_path):
    grey = Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint8))
    grey.save(tmp_path / "l.png")
    assert read_image(tmp_path / "l.png").tolist() == [[[0] * 3, [7] * 3, [255] * 3]]
    grey.point(lambda value: 255 * (value > 5)).convert("1").save(tmp_path / "1.png")
    assert read_image(tmp_path / "1.png").tolist() == [[[0] * 3, [255] * 3, [255] * 3]]
    mask = np.array([[0, 1, 15]], dtype=np.uint8)
    write_mask(tmp_path / "p.png", mask)
    assert np.array_equal(read_image(tmp_path / "p.png"), voc_palette()[mask])


def test_16_bit_grey_is_scaled_not_cut(tmp_path):
    deep = np.array([[0, 200, 257, 32896, 65535]], dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert read_image(tmp_path / name)[..., 1].tolist() == [[0, 1, 1, 128, 255]]


def test_cmyk_is_not_inverted(tmp_path):
    path = tmp_path / "cmyk.jpg"
    Image.new("RGB", (16, 16), RED).convert("CMYK").save(path, quality=95)
    assert np.abs(read_image(path).astype(int) - RED).max() < 12


def test_32_bit_pictures_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ImageError, match="32-bit"):
        read_image(tmp_path / "f.tif")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "damaged or no"),
        (encoded("JPEG")[:300], "cannot read|damaged"),
        (encoded("PNG")[:200], "cannot read|damaged"),
        (png(4, 4, 8, 2), "cannot read|damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "damaged or no"),
    ],
    ids=["empty", "html", "cut jpeg", "cut png", "no pixels", "postscript"],
)
def test_what_is_no_picture_is_said_in_one_line(tmp_path, content, message):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ImageError, match="no picture at"):
        read_image(tmp_path / "none.jpg")
    for read in (read_image, read_mask, read_confidence):
        with pytest.raises(ImageError):
            read(tmp_path)


@pytest.mark.parametrize("size", [(12_000, 10_001), (40_000, 40_000)])
def test_too_many_pixels_are_refused_before_decoding(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size, 8, 2))
    with pytest.raises(ImageError, match=r"more than the (120|1000) million allowed; .*shrink"):
        read_image(path)
    path.write_bytes(png(40_000, 40_000, 8, 3))
    with pytest.raises(ImageError, match="more than the 1000 million allowed; shrink"):
        read_mask(path)


def test_the_limit_is_ours_not_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # 6 pixels: a warning, so an error here
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == PIXELS.shape
    monkeypatch.setattr(images, "MAX_PIXELS", 5)
    with pytest.raises(ImageError, match="3 x 2 pixels"):
        read_image(tmp_path / "a.png")


def test_threads_leave_the_warning_filters_alone(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    before = list(warnings.filters)
    threads = [threading.Thread(target=read_image, args=(path,)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


SEEDS = [
    encoded("JPEG"),
    encoded("PNG"),
    encoded("WEBP"),
    encoded("BMP"),
    encoded("TIFF"),
    encoded("GIF"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damage it can live with
@a_few
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    st.integers(1, 10**6),
)
def test_damaged_files_never_raise_anything_else(tmp_path, data, changes, length):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    path = tmp_path / "damaged"
    path.write_bytes(damaged[: 1 + length % len(damaged)])
    for read in (read_image, read_mask, read_confidence):
        with suppress(ImageError):
            assert read(path).size > 0


@a_few
@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_masks_survive_the_disk(tmp_path, mask):
    path = tmp_path / "mask.png"
    write_mask(path, mask)
    assert np.array_equal(read_mask(path), mask)
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette().ravel().tolist()
    assert path.read_bytes()[24] == 8  # bit depth


def test_grey_masks_are_read_as_labels(tmp_path):
    mask = np.array([[0, 1], [20, 255]], dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "grey.png")
    assert np.array_equal(read_mask(tmp_path / "grey.png"), mask)
    narrow = Image.fromarray(np.array([[0, 1, 1]], dtype=np.uint8))
    narrow.putpalette([*RED, *BLUE])
    narrow.save(tmp_path / "narrow.png", bits=1)
    assert read_mask(tmp_path / "narrow.png").tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (PIXELS, "8-bit RGB"),
        (np.zeros((2, 2), np.uint16), "16-bit grey"),
        (np.zeros((2, 2), bool), "1-bit grey"),
        (np.zeros((2, 2, 4), np.uint8), "8-bit RGB with alpha"),
    ],
)
def test_pictures_that_are_no_masks_are_refused(tmp_path, array, kind):
    path = tmp_path / "colours.png"
    Image.fromarray(array).save(path)
    with pytest.raises(ImageError, match=f"holds {kind} pixels, not labels; save masks as"):
        read_mask(path)


def test_a_mask_must_be_png(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(PIXELS[..., 0]).save(path, format="JPEG")
    with pytest.raises(ImageError, match="no PNG"):
        read_mask(path)


@a_few
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        elements=st.floats(0, 1, width=32),
    )
)
def test_confidence_is_within_half_a_step(tmp_path, confidence):
    path = tmp_path / "confidence.png"
    write_confidence(path, confidence)
    back = read_confidence(path)
    assert back.dtype == np.float32
    assert np.abs(back.astype(np.float64) - confidence).max() <= 0.5 / 65535 + 1e-7
    assert path.read_bytes()[24:26] == bytes([16, 0])  # 16-bit grey


def test_confidence_holds_the_exact_steps(tmp_path):
    path = tmp_path / "confidence.png"
    every = np.arange(65536, dtype=np.float64).reshape(256, 256) / 65535
    write_confidence(path, every)
    assert np.array_equal(np.rint(read_confidence(path) * 65535.0), np.rint(every * 65535))
    assert (read_confidence(path) >= 0.95).sum() == (every >= 0.95).sum()


def test_confidence_maps_and_masks_are_not_mixed_up(tmp_path):
    write_mask(tmp_path / "mask.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ImageError, match="not confidence; a confidence map is a 16-bit"):
        read_confidence(tmp_path / "mask.png")
    write_confidence(tmp_path / "confidence.png", np.zeros((2, 2)))
    with pytest.raises(ImageError, match="not labels"):
        read_mask(tmp_path / "confidence.png")


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_confidence_outside_its_range_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        write_confidence(tmp_path / "c.png", np.array([[0.5, value]]))
    assert list(tmp_path.iterdir()) == []


def test_arrays_that_are_no_masks_are_not_written(tmp_path):
    for array in (PIXELS, np.zeros((2, 2), np.int64), np.zeros((0, 3), np.uint8)):
        with pytest.raises(ValueError, match="mask is"):
            write_mask(tmp_path / "m.png", array)
    with pytest.raises(ValueError, match="confidence map is"):
        write_confidence(tmp_path / "c.png", np.zeros(3))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "new" / "mask.png"
    mask = np.ones((3, 3), np.uint8)
    write_mask(path, mask)

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(ArtifactError, match=r"cannot write .*mask\.png.*No space left.*free space"):
        write_mask(path, mask * 2)
    assert [entry.name for entry in path.parent.iterdir()] == ["mask.png"]
    assert np.array_equal(read_mask(path), mask)


def test_the_palette_is_vocs(shared):
    path = next((shared / "data/voc_sample/SegmentationClassAug").glob("*.png"))
    with Image.open(path) as image:
        palette = np.array(image.getpalette()).reshape(-1, 3)
        assert palette[:21].tolist() == voc_palette()[:21].tolist()


def test_vocs_photos_and_masks_have_one_size(shared):
    folder = shared / "data/voc_sample"
    for path in sorted((folder / "SegmentationClassAug").iterdir())[:10]:
        photo = read_image(folder / "JPEGImages" / f"{path.stem}.jpg")
        mask = read_mask(path)
        assert photo.shape[:2] == mask.shape
        assert set(np.unique(mask)) <= {*range(21), 255}
