"""Files whose name means that they are complete, and the names that are allowed."""

from __future__ import annotations

import io
import json
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt

from clipes.claim import temporary_sibling
from clipes.errors import ArtifactError, DatasetError, WriteError

BAD_ARRAY = (MemoryError, OverflowError, SyntaxError, TypeError, tokenize.TokenError)
"""What ``np.load`` raises, beside ValueError, on headers that lie or are no Python literals."""

MAX_ID_BYTES = 200
"""Longest id: with a suffix and the name of a temporary file it must fit the usual 255 bytes."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its place when the block ends well.

    Missing parent folders are created. If the block raises, the temporary file is removed and what
    was at ``path`` stays as it was. The name of the sibling starts with a dot, so ``list_files``
    never shows it, not even when a killed process left it behind (``clipes.claim`` removes it).

    Args:
        path: The file to write.

    Yields:
        The path to write to, an empty file in the folder of ``path``.

    Raises:
        WriteError: The folder or the file cannot be written (permissions, full disk).

    """
    temporary = temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}",
            "check the folder's permissions and the free space",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically.

    Raises:
        WriteError: The file cannot be written.

    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    """Write plain data to ``path`` as indented JSON with a final newline, atomically.

    Raises:
        WriteError: The file cannot be written.
        TypeError: ``value`` holds something that is not plain data.
        ValueError: ``value`` holds a number that JSON has no notation for (nan, infinity).

    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], *, compress: bool) -> None:
    """Write an .npz file, atomically; the same arrays make the same bytes.

    Raises:
        WriteError: The file cannot be written.
    """
    # By way of memory: a zip file that cannot be finished complains when it is forgotten.
    buffer = io.BytesIO()
    save: Callable[..., None] = np.savez_compressed if compress else np.savez
    save(buffer, **arrays)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())  # a view, too, would complain when forgotten


def read_arrays(path: Path, largest: int) -> dict[str, npt.NDArray[Any]]:
    """Read every array of an .npz file that is not trusted.

    Args:
        path: The file.
        largest: Bytes that its arrays may take together once unpacked.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no archive of plain arrays, is damaged, or is larger than ``largest``.
    """
    try:
        # Opened here because np.load leaves a file open that is no archive.
        with path.open("rb") as raw:
            with zipfile.ZipFile(raw) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > largest:
                raise ValueError(f"it unpacks to {size} bytes, more than {largest}")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                return dict(file)
    except (
        zipfile.BadZipFile,
        EOFError,
        zlib.error,
        NotImplementedError,  # a compression that zipfile does not know
        RuntimeError,  # an encrypted entry
        *BAD_ARRAY,
    ) as error:
        raise ValueError(f"no readable .npz archive ({error})") from error


def list_files(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files right in ``folder``, sorted by name, hidden and unfinished ones left out.

    Args:
        folder: Where to look; a folder that does not exist holds no files.
        suffixes: Lower-case suffixes wanted, such as ``.png``, in any case on disk; none for all.

    Raises:
        ArtifactError: The folder may not be read.
    """
    try:
        with os.scandir(folder) as entries:
            # The listing itself mostly tells files from folders: no question per file.
            names = sorted(e.name for e in entries if not e.name.startswith(".") and _is_file(e))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ArtifactError(f"cannot list {folder}: {error}", "check its permissions") from error
    paths = [folder / name for name in names]
    return [path for path in paths if not suffixes or path.suffix.lower() in suffixes]


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return True  # a link that leads to itself: whoever reads it will say what is wrong


def check_id(value: str) -> str:
    """Return ``value`` if it is a plain name that can safely become part of a file name.

    Args:
        value: The id of an image.

    Raises:
        DatasetError: It is blank, longer than 200 bytes, starts with a dot, or holds a path
            separator, a drive, ``..`` or a character that cannot be printed.

    """
    plain = (
        value.strip() != ""
        and value.isprintable()
        and len(value.encode()) <= MAX_ID_BYTES
        and not value.startswith(".")
        and ".." not in value
        # Windows' rules are the stricter ones: both slashes separate, and "c:" is a drive.
        and PureWindowsPath(value).name == value
    )
    if not plain:
        raise DatasetError(
            f"{value[:60]!r} cannot be an image id",
            "an id is a plain file name without extension: no separators, no '..'",
        )
    return value
