"""Pictures in tiles: what is averaged, read and written adds up to what would be without them."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipes.config import CrfParams
from clipes.disk import large
from clipes.disk.images import (
    MAX_PIXELS,
    ORIGIN,
    read_confidence,
    read_header,
    read_image,
    read_mask,
    read_origin,
    voc_palette,
    write_confidence,
    write_mask,
)
from clipes.disk.large import LargePicture
from clipes.disk.png import write_rows
from clipes.errors import ImageError
from clipes.masks.mosaic import LargeLabel, Tiles, averaged, tile_side
from clipes.masks.pseudo import part_probs, pseudo_label, upsample, upsample_part
from clipes.seg.label import label_image, label_tiles
from clipes.types import CamMaps


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 70), width=st.integers(1, 70), side=st.integers(4, 40))
def test_tiles_that_agree_are_averaged_to_what_they_say(height: int, width: int, side: int) -> None:
    whole = np.random.default_rng(0).random((2, height, width), dtype=np.float32)
    tiles = Tiles.of((height, width), side)
    together, times = np.zeros_like(whole), np.zeros((height, width), int)
    for window, part in averaged(tiles, (whole[:, r, c].copy() for r, c in tiles), 2, None):
        together[:, window[0], window[1]] = part
        times[window] += 1
    assert (times == 1).all()
    np.testing.assert_allclose(together, whole, atol=1e-6)
    weights = np.zeros((height, width), np.float32)
    for window, weight in zip(tiles, tiles.weights(), strict=True):
        weights[window] += weight
    np.testing.assert_allclose(weights, 1, atol=1e-6)


def test_where_tiles_differ_each_counts_by_how_far_its_edge_is() -> None:
    tiles = Tiles.of((1, 20), 12)  # 0 to 12 and 8 to 20
    found = [np.full((1, 1, 12), value, np.float32) for value in (0, 1)]
    parts = [part[0, 0] for _, part in averaged(tiles, found, 1, None)]
    np.testing.assert_allclose(
        np.concatenate(parts), [0] * 8 + [0.2, 0.4, 0.6, 0.8] + [1] * 8, atol=1e-6
    )


def test_tiles_are_for_what_is_beyond_the_limit_or_asked_for() -> None:
    assert tile_side((10_000, 12_000), None, 2048) == 0
    assert tile_side((10_000, 12_001), None, 2048) == 2048
    assert tile_side((10_000, 12_001), None, 2048, 1000) == 1000
    assert tile_side((100, 400), 400, 2048) == 0
    assert tile_side((100, 401), 400, 2048) == 400
    assert MAX_PIXELS == 120_000_000


def scene() -> tuple[np.ndarray, CamMaps]:
    rng = np.random.default_rng(3)
    image = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    maps = rng.random((2, 5, 7), dtype=np.float32)
    return image, CamMaps(np.array([3, 7]), maps, (96, 128))


def test_parts_of_maps_are_those_of_the_whole() -> None:
    _, cams = scene()
    full = upsample(cams.maps, cams.size)
    rows, columns = slice(13, 60), slice(90, 128)
    part = upsample_part(cams.maps, cams.size, rows, columns)
    np.testing.assert_allclose(part, full[:, rows, columns], atol=1e-6)
    whole = upsample_part(cams.maps, cams.size, slice(0, 96), slice(0, 128))
    np.testing.assert_array_equal(whole, full)


def refined(image: np.ndarray, cams: CamMaps, side: int, folder: Path) -> tuple[bytes, bytes]:
    tiles, made = Tiles.of(cams.size, side), LargeLabel(cams.size, folder)
    found = (
        part_probs(image[rows, columns], cams, rows, columns, CrfParams())
        for rows, columns in tiles
    )
    made.fill(averaged(tiles, found, 3, folder), cams.labels)
    made.write_mask(folder / "mask.png", origin="me")
    made.write_confidence(folder / "confidence.png", origin="me")
    return read_mask(folder / "mask.png"), read_confidence(folder / "confidence.png")


def test_refine_of_one_tile_is_refine(tmp_path: Path) -> None:
    image, cams = scene()
    mask, confidence = refined(image, cams, 128, tmp_path)
    pseudo = pseudo_label(image, cams, CrfParams())
    write_confidence(tmp_path / "usual.png", pseudo.confidence)
    np.testing.assert_array_equal(mask, pseudo.mask)
    np.testing.assert_array_equal(confidence, read_confidence(tmp_path / "usual.png"))
    assert read_origin(tmp_path / "mask.png") == read_origin(tmp_path / "confidence.png") == "me"
    cut, _ = refined(image, cams, 100, tmp_path)
    assert 0.9 < (cut == pseudo.mask).mean() < 1


class Answer:
    """A predictor that tells red from the rest."""

    labels = 2

    def __call__(self, image: np.ndarray, present: object = None) -> np.ndarray:
        red = image[..., 0] / np.float32(255)
        return np.stack([1 - red, red])


@pytest.mark.parametrize("crf", [None, CrfParams()])
def test_predict_of_one_tile_is_predict(tmp_path: Path, crf: CrfParams | None) -> None:
    image, _ = scene()
    Image.fromarray(image).save(tmp_path / "a.png")
    picture = LargePicture(tmp_path / "a.png", tmp_path)
    steps: list[tuple[int, int]] = []
    for side in (128, 50):
        made = label_tiles(picture, side, Answer(), crf, tmp_path, lambda *step: steps.append(step))
        made.write_mask(tmp_path / f"{side}.png")
    usual, _ = label_image(image, Answer(), crf)
    np.testing.assert_array_equal(read_mask(tmp_path / "128.png"), usual.mask)
    assert (read_mask(tmp_path / "50.png") == usual.mask).mean() > (0.9 if crf else 0.9999)
    assert steps[:2] == [(0, 1), (1, 1)]
    assert steps[-1][0] == steps[-1][1] > 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".png"] == []


@pytest.mark.parametrize("bits", [8, 16])
def test_rows_make_the_same_picture(tmp_path: Path, bits: int) -> None:
    rng = np.random.default_rng(0)
    if bits == 8:
        mask = rng.integers(0, 256, (23, 31)).astype(np.uint8)
        write_rows(
            tmp_path / "a.png", (23, 31), (mask[:9], mask[9:]), palette=voc_palette().tobytes()
        )
        write_mask(tmp_path / "b.png", mask)
        np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), mask)
    else:
        steps = rng.integers(0, 1 << 16, (23, 31)).astype(np.uint16)
        rows = (steps[:9], steps[9:])
        write_rows(tmp_path / "a.png", (23, 31), rows, bits=16, text=(ORIGIN, '{"a":1}'))
        write_confidence(tmp_path / "b.png", steps / 65535, origin='{"a":1}')
        assert read_origin(tmp_path / "a.png") == '{"a":1}'
        np.testing.assert_array_equal(
            read_confidence(tmp_path / "a.png"), read_confidence(tmp_path / "b.png")
        )
    with Image.open(tmp_path / "a.png") as ours, Image.open(tmp_path / "b.png") as pillows:
        assert (ours.mode, ours.getpalette()) == (pillows.mode, pillows.getpalette())
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(pillows))


def noise(mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, bands)).astype(np.uint8)
    return Image.fromarray(pixels if bands > 1 else pixels[..., 0], mode)


def whole(picture: LargePicture) -> np.ndarray:
    return picture.window(slice(None), slice(None))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_pictures_are_upright(tmp_path: Path, orientation: int) -> None:
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = orientation
    noise().save(path, exif=exif)
    picture = LargePicture(path, tmp_path)
    usual = read_image(path)
    assert picture.size == usual.shape[:2]
    np.testing.assert_array_equal(whole(picture), usual)
    np.testing.assert_array_equal(picture.window(slice(3, 9), slice(5, 30)), usual[3:9, 5:30])


TIFFS = {
    "raw": {},
    "lzw": {"compression": "tiff_lzw"},
    "deflate": {"compression": "tiff_adobe_deflate", "tiffinfo": {317: 2}},
    "packbits": {"compression": "packbits"},
    "jpeg": {"compression": "jpeg", "quality": 90},
    "turned": {"compression": "tiff_lzw", "tiffinfo": {274: 6}},
}


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK"])
def test_tiff_is_decoded_strip_by_strip(
    tmp_path: Path, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "jpeg" and mode == "RGBA":
        pytest.skip("no such TIFF")
    options = dict(TIFFS[kind])
    info = {**options.pop("tiffinfo", {}), 278: 8}
    noise(mode).save(tmp_path / "a.tif", tiffinfo=info, **options)
    monkeypatch.setattr(large, "_rows", None)  # not decoded whole
    usual = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(whole(LargePicture(tmp_path / "a.tif", tmp_path)), usual)
    assert read_header(tmp_path / "a.tif") == (usual.shape[:2], kind == "turned")


def tiled_tiff(path: Path, pixels: np.ndarray, side: int) -> None:
    """Write a TIFF of deflated tiles, which Pillow reads and does not write."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % side), (0, -width % side), (0, 0)))
    parts = [
        zlib.compress(padded[top : top + side, left : left + side].tobytes())
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    def head(offset: int) -> bytes:
        tags = ImageFileDirectory_v2()
        sizes = [len(part) for part in parts]
        tags[256], tags[257], tags[258], tags[259] = width, height, (8, 8, 8), 8
        tags[262], tags[277], tags[284], tags[322], tags[323] = 2, 3, 1, side, side
        tags.tagtype[324] = tags.tagtype[325] = 4
        tags[324] = tuple(offset + sum(sizes[:index]) for index in range(len(sizes)))
        tags[325] = tuple(sizes)
        return b"II\x2a\0\x08\0\0\0" + tags.tobytes(8)

    path.write_bytes(head(len(head(0))) + b"".join(parts))


def test_tiff_is_decoded_tile_by_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.asarray(noise())
    tiled_tiff(tmp_path / "a.tif", pixels, 16)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), pixels)
    monkeypatch.setattr(large, "_rows", None)
    np.testing.assert_array_equal(whole(LargePicture(tmp_path / "a.tif", tmp_path)), pixels)


def test_a_tiff_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.tif", tiffinfo={278: 8})
    data = (tmp_path / "a.tif").read_bytes()
    tiled_tiff(tmp_path / "b.tif", np.asarray(noise()), 16)
    (tmp_path / "b.tif").write_bytes((tmp_path / "b.tif").read_bytes()[:-300])
    (tmp_path / "a.tif").write_bytes(data[:300])
    for name in ("a.tif", "b.tif"):
        with pytest.raises(ImageError, match=r"cannot read|damaged"):
            LargePicture(tmp_path / name, tmp_path)


def test_what_is_decoded_whole_has_a_lower_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise().save(tmp_path / "a.png")
    noise().save(tmp_path / "a.tif", tiffinfo={278: 8})
    monkeypatch.setattr(large, "MAX_WHOLE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"only TIFF is decoded in parts.*; save it as TIFF"):
        LargePicture(tmp_path / "a.png", tmp_path)
    LargePicture(tmp_path / "a.tif", tmp_path)


def test_a_smaller_copy_is_the_mean_of_squares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise().crop((0, 0, 52, 36)).save(tmp_path / "a.png")
    monkeypatch.setattr(large, "_PIXELS_AT_ONCE", 52 * 8)
    small = LargePicture(tmp_path / "a.png", tmp_path).smaller(36 * 52 // 15)
    means = read_image(tmp_path / "a.png").reshape(9, 4, 13, 4, 3).mean((1, 3))
    np.testing.assert_allclose(small, means, atol=0.51)
