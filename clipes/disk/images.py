"""Pictures, masks and confidence maps on disk.

Photos come in every mode and state; ``read_image`` turns what can be understood into one form and
says in one line why it refuses the rest. Masks and confidence maps are PNGs of one exact kind each,
and anything else is refused rather than converted: a mask that went through a conversion holds
colours, not labels.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError, features
from PIL.PngImagePlugin import PngInfo

from clipes.disk.files import atomic_write
from clipes.errors import ImageError
from clipes.types import Float32Array, FloatArray, UInt8Array

MAX_PIXELS = 120_000_000
"""Largest picture that is decoded at once (360 MB as RGB); above phone cameras' 108 MP."""

MAX_TILED_PIXELS = 1_000_000_000
"""Largest picture that is worked on in tiles (``clipes.disk.large``), and largest mask."""

_PIXELS_AT_ONCE = 1 << 22  # lest a large map in float64 takes gigabytes
READS_AVIF = "avif" in features.modules and bool(features.check_module("avif"))
"""Whether the installed Pillow decodes AVIF: since 11.3 it can be built to."""

_PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", *(("AVIF",) if READS_AVIF else ()))

# Pillow documents no common base for what its decoders raise on damaged files; these were seen, or
# follow from what they are written with.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    NotImplementedError,
    MemoryError,
    struct.error,
    zlib.error,
)

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ON_ITS_SIDE = (5, 6, 7, 8)

ORIGIN = "clipes origin"
"""Keyword of the text chunk in which a PNG says what it was made from."""

_PNG_HEADER = struct.Struct(">8x4x4sIIBB")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KINDS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}


def read_image(path: str | Path) -> UInt8Array:
    """Read a photo as it is meant to be looked at.

    The EXIF orientation is applied (the images of VOC and COCO carry none, so their masks keep
    fitting), transparent parts are laid on white, 16-bit grey is scaled to 8 bits, and grey,
    palette and CMYK pictures become RGB. Of an animation, the first frame is read. The format is
    told by the content, not by the suffix.

    Args:
        path: A JPEG, PNG, WebP, BMP, TIFF or GIF file, or AVIF if ``READS_AVIF``.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ImageError: The file is missing, empty, truncated, no picture, of a mode whose range is
            unknown (32-bit), or has more than ``MAX_PIXELS`` pixels.
    """
    with opened(Path(path)) as image:
        return to_pixels(image, str(path))


def to_pixels(image: Image.Image, name: str = "the picture") -> UInt8Array:
    """Return the pixels of a picture in memory as ``read_image`` does those of a file.

    Args:
        image: Of any mode; it need not be decoded yet.
        name: What to call it in a message.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ImageError: It cannot be decoded, has no pixels or more than ``MAX_PIXELS``, or is of a mode
            whose range is unknown.
    """
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise _too_large(name, width, height) if width * height else _no_pixels(name)
    try:
        image.load()
        upright = UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION, 1))
        rgb = to_rgb(image, name)
        return np.array(rgb if upright is None else rgb.transpose(upright), dtype=np.uint8)
    except DECODE_ERRORS as error:
        raise _unreadable(name, error) from error


def read_header(path: str | Path) -> tuple[tuple[int, int], bool]:
    """Tell the size of a photo as ``read_image`` returns it, without decoding it.

    Args:
        path: As for ``read_image``.

    Returns:
        (H, W), and whether the EXIF orientation turns or mirrors the picture that is stored.

    Raises:
        ImageError: As ``read_image``, as far as the start of the file tells.
    """
    with opened(Path(path)) as image:
        return upright_size(image), image.getexif().get(EXIF_ORIENTATION, 1) in UPRIGHT


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (H, W) as ``read_image`` returns it, of a picture that is not decoded yet."""
    width, height = image.size
    turned = image.getexif().get(EXIF_ORIENTATION, 1) in ON_ITS_SIDE
    # Of a TIFF, Pillow says its size upright before it turns it.
    return (width, height) if turned and image.format != "TIFF" else (height, width)


def read_mask(path: str | Path) -> UInt8Array:
    """Read a mask of labels: palette indices or 8-bit grey values, never colours.

    Args:
        path: A PNG, with a palette or 8-bit grey.

    Returns:
        (H, W) uint8; 0 background, 1..C classes, 255 not labelled.

    Raises:
        ImageError: The file is missing, damaged, or another kind of picture.
    """
    path = Path(path)
    kind, bits = _png_kind(path)
    if kind != "palette" and (kind, bits) != ("grey", 8):
        raise ImageError(
            f"{path} holds {bits}-bit {kind} pixels, not labels",
            "save masks as palette or 8-bit grey PNG that holds label numbers, not colours",
        )
    with opened(path, ("PNG",), most=MAX_TILED_PIXELS) as image:
        return np.array(image, dtype=np.uint8)


def write_mask(path: str | Path, mask: UInt8Array, *, origin: str = "", grey: bool = False) -> None:
    """Write a mask as 8-bit palette PNG with VOC's colours, atomically.

    Args:
        path: The file to write, ending in ``.png``.
        mask: (H, W) uint8.
        origin: What it was made from, for ``read_origin``; empty for nothing.
        grey: Write 8-bit grey instead, for readers that turn palettes into colours.

    Raises:
        WriteError: The file cannot be written.
        ValueError: ``mask`` has another shape or type.
    """
    if mask.ndim != 2 or mask.size == 0 or mask.dtype != np.uint8:
        raise ValueError(f"a mask is (H, W) uint8, this is {mask.shape} {mask.dtype}")
    image = Image.fromarray(mask)
    if not grey:
        image.putpalette(voc_palette().tobytes())
    with atomic_write(Path(path)) as temporary:
        image.save(temporary, format="PNG", pnginfo=_origin_chunk(origin))


def read_origin(path: str | Path) -> str:
    """Return what a mask or confidence map says that it was made from; empty if it does not.

    Only the head of the file is read.

    Raises:
        ImageError: The file is missing, damaged, or another kind of picture.
    """
    with opened(Path(path), ("PNG",), most=MAX_TILED_PIXELS) as image:
        return str(image.info.get(ORIGIN, ""))


def read_confidence(path: str | Path) -> Float32Array:
    """Read a confidence map written by ``write_confidence``.

    Args:
        path: A 16-bit grey PNG.

    Returns:
        (H, W) float32 in [0, 1], in steps of 1/65535.

    Raises:
        ImageError: The file is missing, damaged, or another kind of picture.
    """
    path = Path(path)
    kind, bits = _png_kind(path)
    if (kind, bits) != ("grey", 16):
        raise ImageError(
            f"{path} holds {bits}-bit {kind} pixels, not confidence",
            "a confidence map is a 16-bit grey PNG; make it again with 'clipes refine'",
        )
    with opened(path, ("PNG",), most=MAX_TILED_PIXELS) as image:
        return np.asarray(image).astype(np.float32) / np.float32(65535)


def write_confidence(path: str | Path, confidence: FloatArray, *, origin: str = "") -> None:
    """Write a confidence map as 16-bit grey PNG holding round(65535 * p), atomically.

    Args:
        path: The file to write, ending in ``.png``.
        confidence: (H, W) float in [0, 1].
        origin: As for ``write_mask``.

    Raises:
        WriteError: The file cannot be written.
        ValueError: ``confidence`` has another shape, or values outside [0, 1].
    """
    if confidence.ndim != 2 or confidence.size == 0:
        raise ValueError(f"a confidence map is (H, W), this is {confidence.shape}")
    low, high = float(confidence.min()), float(confidence.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"confidence must lie in [0, 1], this spans {low} to {high}")
    steps = np.empty(confidence.shape, np.uint16)
    height, width = confidence.shape
    at_once = max(1, _PIXELS_AT_ONCE // width)
    for top in range(0, height, at_once):
        rows = slice(top, top + at_once)
        steps[rows] = np.rint(confidence[rows] * np.float64(65535))
    with atomic_write(Path(path)) as temporary:
        Image.fromarray(steps).save(temporary, format="PNG", pnginfo=_origin_chunk(origin))


def _origin_chunk(origin: str) -> PngInfo | None:
    """Return a text chunk, which programs that show or edit pictures pass over."""
    if not origin:
        return None
    chunk = PngInfo()
    chunk.add_text(ORIGIN, origin)
    return chunk


def voc_palette() -> UInt8Array:
    """Return the colours of VOC's masks.

    Three bits of the label at a time go to red, green and blue, filling each from its highest bit.

    Returns:
        (256, 3) uint8, RGB.

    >>> voc_palette()[[0, 1, 15, 255]].tolist()
    [[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]
    """
    labels = np.arange(256)[:, None]
    colours = np.zeros((256, 3), dtype=np.int64)
    for step in range(8):
        bits = labels >> (3 * step + np.arange(3)) & 1
        colours |= bits << (7 - step)
    return colours.astype(np.uint8)


@contextmanager
def opened(
    path: Path, formats: tuple[str, ...] = _PHOTO_FORMATS, *, most: int = 0
) -> Iterator[Image.Image]:
    """Open a picture without decoding it, and name what goes wrong inside the block.

    Args:
        path: The file.
        formats: Pillow's names of those that are tried.
        most: Most pixels that it may have; 0 for ``MAX_PIXELS``.

    Raises:
        ImageError: As for ``read_image``.
    """
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise ImageError(f"{path} is empty (0 bytes)", "replace or remove the file")
            image = _identified(file, formats)
            width, height = image.size
            if width * height > (most or MAX_PIXELS):
                raise _too_large(str(path), width, height)
            yield image
    except FileNotFoundError as error:
        raise ImageError(f"no picture at {path}", "check the file name") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path} is damaged or no {', '.join(formats)} picture",
            "convert it, or replace or remove the file",
        ) from error
    except DECODE_ERRORS as error:
        raise _unreadable(str(path), error) from error


def _identified(file: IO[bytes], formats: tuple[str, ...]) -> ImageFile.ImageFile:
    """As ``Image.open``, whose own limit of pixels is another, and belongs to all threads."""
    Image.init()
    file.seek(0)
    prefix = file.read(16)
    for name in formats:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            file.seek(0)
            with suppress(SyntaxError, IndexError, TypeError, struct.error):
                return factory(file, "")
    raise UnidentifiedImageError(f"none of {', '.join(formats)}")


def _unreadable(name: str, error: BaseException) -> ImageError:
    reason = str(error) or type(error).__name__
    return ImageError(f"cannot read {name}: {reason}", "replace or remove the file")


def _no_pixels(name: str) -> ImageError:
    return ImageError(f"{name} has no pixels", "give a picture of at least 1 x 1")


def _too_large(name: str, width: int, height: int) -> ImageError:
    allowed, remedy = MAX_PIXELS, "only cam, refine and predict work in tiles; shrink the picture"
    if width * height > MAX_TILED_PIXELS:
        allowed, remedy = MAX_TILED_PIXELS, "shrink the picture"
    return ImageError(
        f"{name} has {width} x {height} pixels, more than the {allowed // 1_000_000} million "
        "allowed",
        remedy,
    )


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Return a picture, or a part of one, as RGB on white; see ``read_image``.

    Raises:
        ImageError: Its mode has no range that is known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey: npt.NDArray[Any] = np.asarray(image)
        return Image.fromarray(((grey.astype(np.int64) + 128) // 257).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{name} has 32-bit pixels, whose range is not known", "convert it to an 8-bit PNG"
        )
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, "white")
        return Image.alpha_composite(white, pixels).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _png_kind(path: Path) -> tuple[str, int]:
    """Return the colour type and bit depth that the header of a PNG states."""
    try:
        with path.open("rb") as file:
            header = file.read(_PNG_HEADER.size)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error}", "check the file name") from error
    if len(header) < _PNG_HEADER.size or not header.startswith(_PNG_SIGNATURE):
        raise ImageError(f"{path} is no PNG", "save it as PNG, or remove the file")
    chunk, _, _, bits, colour = _PNG_HEADER.unpack(header)
    if chunk != b"IHDR" or colour not in _PNG_KINDS:
        raise ImageError(f"{path} is a damaged PNG", "replace or remove the file")
    return _PNG_KINDS[colour], bits
