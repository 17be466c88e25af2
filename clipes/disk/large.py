"""Pictures that memory is not to hold: decoded part by part onto disk, and read in windows.

TIFF keeps strips or tiles that can be decoded one by one, so any number of pixels takes the memory
of one of them. Other formats are decoded whole by Pillow, in four bytes a pixel.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from clipes.disk.images import (
    EXIF_ORIENTATION,
    MAX_PIXELS,
    MAX_TILED_PIXELS,
    ON_ITS_SIDE,
    opened,
    read_image,
    to_rgb,
    upright_size,
)
from clipes.disk.scratch import ScratchArray
from clipes.errors import ImageError
from clipes.types import UInt8Array

MAX_WHOLE_PIXELS = 400_000_000
"""Largest picture of a format other than TIFF: 1.6 GB while it is decoded."""

_PIXELS_AT_ONCE = 1 << 23  # 24 MB as RGB

_Box = tuple[int, int, int, int]

# What says how the pixels of a part of a TIFF are packed; the rest is of no use to a decoder.
_PACKING = (258, 259, 262, 266, 277, 284, 317, 320, 338, 339, 347, 530, 532)
_WIDTH, _LENGTH, _PLANES = 256, 257, 284
_STRIP_ROWS, _STRIP_OFFSETS, _STRIP_BYTES = 278, 273, 279
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325


class LargePicture:
    """A picture of up to ``MAX_TILED_PIXELS``, upright and RGB as ``read_image`` returns others.

    Args:
        path: The file.
        folder: Where its pixels are kept as long as this lives, 3 bytes each; None for where the
            system keeps such files.

    Attributes:
        size: (H, W).

    Raises:
        ImageError: As for ``read_image``; or it is too large for a format that is decoded whole.
        WriteError: There is no room for its pixels.
    """

    def __init__(self, path: Path, folder: Path | None) -> None:
        with opened(path, most=MAX_TILED_PIXELS) as image:
            self.size = upright_size(image)
            self._pixels = ScratchArray(folder, (*self.size, 3), np.uint8)
            by_pillow = image.format == "TIFF" and not _has_parts(image)
            turn = 1 if by_pillow else image.getexif().get(EXIF_ORIENTATION, 1)
            stored = _as_stored(self._pixels.values, turn)
            for (left, top, right, bottom), part in decoded(image, path):
                stored[top:bottom, left:right] = part
                self._pixels.release()

    def window(self, rows: slice, columns: slice) -> UInt8Array:
        """Return (h, w, 3) RGB of a part."""
        part: UInt8Array = self._pixels.values[rows, columns].copy()
        self._pixels.release()
        return part

    def smaller(self, most: int) -> UInt8Array:
        """Return a copy (h, w, 3) of at most ``most`` pixels, each the mean of a square."""
        factor = int(np.ceil(np.sqrt(self.size[0] * self.size[1] / most)))
        height, width = (max(1, length // factor) for length in self.size)
        rows = max(1, _PIXELS_AT_ONCE // (self.size[1] * factor))
        parts = []
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            part = self.window(slice(top * factor, bottom * factor), slice(None))
            parts.append(cv2.resize(part, (width, bottom - top), interpolation=cv2.INTER_AREA))
        return np.concatenate(parts).astype(np.uint8, copy=False)


def decoded_size(path: Path) -> tuple[int, int]:
    """Return (H, W) of a picture of up to ``MAX_TILED_PIXELS``, having decoded all of it.

    Raises:
        ImageError: It cannot be worked on.
    """
    with opened(path, most=MAX_TILED_PIXELS) as image:
        size = upright_size(image)
        if size[0] * size[1] > MAX_PIXELS:
            for _ in decoded(image, path):
                pass
            return size
    height, width, _ = read_image(path).shape
    return height, width


def decoded(image: Image.Image, path: Path) -> Iterator[tuple[_Box, UInt8Array]]:
    """Yield the parts of a picture that was opened, as they are stored: not turned upright.

    Args:
        image: As ``opened`` yields it.
        path: Its file.

    Yields:
        (left, top, right, bottom) and (h, w, 3) RGB.

    Raises:
        ImageError: It cannot be decoded, or is too large for a format that is decoded whole.
    """
    parts = _tiff_parts(image, path) if _has_parts(image) else _rows(image, path)
    for box, part in parts:
        yield box, np.asarray(to_rgb(part, str(path)), np.uint8)


def _rows(image: Image.Image, path: Path) -> Iterator[tuple[_Box, Image.Image]]:
    width, height = image.size
    if width * height > MAX_WHOLE_PIXELS:
        raise ImageError(
            f"{path} has {width} x {height} pixels, and only TIFF is decoded in parts: more than "
            f"{MAX_WHOLE_PIXELS // 1_000_000} million take too much memory",
            "save it as TIFF in strips or tiles",
        )
    at_once = max(1, _PIXELS_AT_ONCE // width)
    for top in range(0, height, at_once):
        box = (0, top, width, min(top + at_once, height))
        yield box, image.crop(box)


def _has_parts(image: Image.Image) -> bool:
    """Tell whether strips or tiles of a TIFF can be decoded alone, each of a bearable size."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    tags = image.tag_v2
    width, height = _part_size(image)
    listed = _TILE_OFFSETS in tags or _STRIP_OFFSETS in tags
    return listed and tags.get(_PLANES, 1) == 1 and 0 < width * height <= MAX_PIXELS


def _part_size(image: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    tags = image.tag_v2
    if _TILE_OFFSETS in tags:
        return int(tags.get(_TILE_WIDTH, 0)), int(tags.get(_TILE_LENGTH, 0))
    width, height = int(tags[_WIDTH]), int(tags[_LENGTH])
    return width, min(int(tags.get(_STRIP_ROWS, height)), height)


def _tiff_parts(image: Image.Image, path: Path) -> Iterator[tuple[_Box, Image.Image]]:
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    tags, (part_width, part_height) = image.tag_v2, _part_size(image)
    tiled = _TILE_OFFSETS in tags
    offsets = tags[_TILE_OFFSETS if tiled else _STRIP_OFFSETS]
    sizes = tags[_TILE_BYTES if tiled else _STRIP_BYTES]
    width, height = int(tags[_WIDTH]), int(tags[_LENGTH])
    with path.open("rb") as file:
        index = 0
        for top in range(0, height, part_height):
            for left in range(0, width, part_width):
                box = (left, top, min(left + part_width, width), min(top + part_height, height))
                shape = (part_width, part_height if tiled else box[3] - top)
                part = _tiff_of(tags, shape, _bytes(file, offsets[index], sizes[index], path))
                yield box, part.crop((0, 0, box[2] - left, box[3] - top))
                index += 1


def _bytes(file: IO[bytes], offset: int, size: int, path: Path) -> bytes:
    file.seek(offset)
    found = file.read(size)
    if len(found) < size:
        raise ImageError(f"cannot read {path}: it breaks off", "replace or remove the file")
    return found


def _tiff_of(
    tags: TiffImagePlugin.ImageFileDirectory_v2, size: tuple[int, int], data: bytes
) -> Image.Image:
    """Return a strip or tile as a picture: the same data in a TIFF of one strip."""
    head = b"MM\0\x2a\0\0\0\0" if tags.prefix == b"MM" else b"II\x2a\0\0\0\0\0"
    own = TiffImagePlugin.ImageFileDirectory_v2(head)
    for tag in _PACKING:
        if tag in tags:
            own.tagtype[tag] = tags.tagtype[tag]
            own[tag] = tags[tag]
    own[_WIDTH], own[_LENGTH], own[_STRIP_ROWS] = size[0], size[1], size[1]
    own[_STRIP_OFFSETS], own[_STRIP_BYTES] = 0, len(data)  # Pillow adds where the header ends
    file = io.BytesIO()
    own.save(file)
    file.write(data)
    file.seek(0)
    return TiffImagePlugin.TiffImageFile(file)


def _as_stored(upright: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Return a view of an upright picture whose rows and columns lie as those of its file do."""
    if orientation in ON_ITS_SIDE:
        upright = upright.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    return upright[::rows, ::columns]
