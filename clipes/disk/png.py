"""PNGs written a few rows at a time, for masks and confidence maps that memory is not to hold."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from clipes.disk.files import atomic_write

_GREY, _PALETTE = 0, 3  # colour types of the PNG specification, section 11.2.2
_UP = 2  # a filter, section 9.2: a byte less the one above, which in smooth maps is near 0
_LEVEL = 4  # of zlib: 200 megapixels of confidence are noise below, and take long above


def write_rows(
    path: Path,
    size: tuple[int, int],
    parts: Iterable[npt.NDArray[np.uint8] | npt.NDArray[np.uint16]],
    *,
    bits: int = 8,
    palette: bytes = b"",
    text: tuple[str, str] | None = None,
) -> None:
    """Write a palette or grey PNG, atomically.

    Args:
        path: The file to write.
        size: (H, W).
        parts: Rows from top to bottom, (h, W) each, together H.
        bits: 8 for uint8, 16 for uint16.
        palette: 768 bytes of RGB; empty for grey.
        text: Keyword and value of a text chunk.

    Raises:
        WriteError: The file cannot be written.
    """
    packer, above = zlib.compressobj(_LEVEL), np.zeros((1, size[1] * bits // 8), np.uint8)
    kind = _PALETTE if palette else _GREY
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        _chunk(file, b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], bits, kind, 0, 0, 0))
        if palette:
            _chunk(file, b"PLTE", palette)
        if text is not None:
            _chunk(file, b"tEXt", "\0".join(text).encode("latin-1"))
        for part in parts:
            rows = np.ascontiguousarray(part, f">u{bits // 8}").view(np.uint8)
            filtered = np.full((len(rows), rows.shape[1] + 1), _UP, np.uint8)
            np.subtract(rows, np.concatenate([above, rows[:-1]]), out=filtered[:, 1:])
            above = rows[-1:]
            _chunk(file, b"IDAT", packer.compress(filtered.data))
        _chunk(file, b"IDAT", packer.flush())
        _chunk(file, b"IEND", b"")


def _chunk(file: IO[bytes], name: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + name + data)
    file.write(struct.pack(">I", zlib.crc32(name + data)))
