"""Files whose name means that they are complete, and the names that are allowed."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt

from clipes.disk.claim import temporary_sibling
from clipes.errors import ArtifactError, DatasetError, WriteError

BAD_ARRAY = (MemoryError, OverflowError, SyntaxError, TypeError, tokenize.TokenError)
"""What ``np.load`` raises, beside ValueError, on headers that lie or are no Python literals."""

MAX_WALKED = 5_000_000
"""Most files that are looked through below one folder: lest a wrong path walks a whole disk."""

_BAD_ARCHIVE = (
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    NotImplementedError,  # a compression that zipfile does not know
    RuntimeError,  # an encrypted entry
    *BAD_ARRAY,
)
_LARGEST_TEXT = 1 << 16  # bytes

MAX_ID_BYTES = 200
"""Longest id: with a suffix and the name of a temporary file it must fit the usual 255 bytes."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its place when the block ends well.

    Missing parent folders are created. If the block raises, the temporary file is removed and what
    was at ``path`` stays as it was. The name of the sibling starts with a dot, so ``list_files``
    never shows it, not even one that a killed process left; ``clipes.disk.claim`` removes those.

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


def read_json(path: Path, largest: int) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """Read a JSON file that is not trusted.

    Args:
        path: The file.
        largest: Bytes that it may have.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no JSON in UTF-8, is larger than ``largest``, nests deeper than Python
            can follow, or holds a number that is not finite.
    """
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest} bytes")
    try:
        return json.loads(content.decode("utf-8"), parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def room_on_disk(folder: Path, limit: int) -> int:
    """Return how many bytes may be kept in a folder for later: others want the disk, too.

    Args:
        folder: Where they go.
        limit: Most bytes; a quarter of the free disk, if that is less.
    """
    return min(limit, shutil.disk_usage(folder).free // 4)


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
    except _BAD_ARCHIVE as error:
        raise ValueError(f"no readable .npz archive ({error})") from error


def read_text_array(path: Path, name: str) -> str:
    """Return a text that lies as array ``name`` in an .npz file; empty if there is none.

    Only that array is read.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is no archive of plain arrays, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return ""
            if archive.getinfo(f"{name}.npy").file_size > _LARGEST_TEXT:
                raise ValueError(f"its text '{name}' is larger than {_LARGEST_TEXT} bytes")
            content = io.BytesIO(archive.read(f"{name}.npy"))
        text = np.load(content, allow_pickle=False)
    except _BAD_ARCHIVE as error:
        raise ValueError(f"no readable .npz archive ({error})") from error
    return str(text) if text.shape == () and text.dtype.kind == "U" else ""


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def remove_file(path: Path, remedy: str) -> None:
    """Remove a file if it is there.

    Raises:
        WriteError: It cannot be removed; it says ``remedy``.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"cannot remove {path}: {error.strerror}", remedy) from error


def list_files(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files right in ``folder``, sorted by name, hidden and unfinished ones left out.

    Args:
        folder: Where to look; a folder that does not exist holds no files.
        suffixes: Lower-case suffixes wanted, such as ``.png``, in any case on disk; none for all.

    Raises:
        ArtifactError: The folder may not be read.
    """
    # The listing itself mostly tells files from folders: no question per file.
    paths = [folder / entry.name for entry in _entries(folder) if _is_file(entry)]
    return [path for path in paths if not suffixes or path.suffix.lower() in suffixes]


def walk_files(
    folder: Path, *, skip: Collection[str] = (), made: Collection[str] = (), deepest: int = 64
) -> tuple[list[str], list[str]]:
    """Return the files in and below ``folder``: those of a folder by name, then its sub-folders'.

    Hidden files and folders are left out. Links to folders are followed right in ``folder`` only,
    where data sets are put together of them; deeper ones could lead anywhere, and in circles.

    Args:
        folder: Where to start; a folder that does not exist holds no files.
        skip: Names of folders that are left out, wherever they lie.
        made: Names of files that mark a folder below ``folder`` to be left out.
        deepest: How many folders may lie between ``folder`` and a file.

    Returns:
        Paths from ``folder`` on, with ``/``, of files; and of links to folders not followed.

    Raises:
        ArtifactError: A folder may not be read, or they hold more than ``MAX_WALKED`` files.
    """
    files: list[str] = []
    links: list[str] = []
    todo = [""]
    while todo:
        below = todo.pop()
        entries = _entries(folder / below)
        if below and any(entry.name in made for entry in entries):
            continue
        # Links whose target is gone count as files: whoever reads them will say what is wrong.
        files += [f"{below}{e.name}" for e in entries if _is_file(e) or _is_broken(e)]
        if len(files) > MAX_WALKED:
            raise ArtifactError(
                f"{folder} holds more than {MAX_WALKED} files", "name the folder of the images"
            )
        folders = [e for e in entries if e.name not in skip and not _is_file(e) and e.is_dir()]
        kept = [e for e in folders if not e.is_symlink() or (not below and _leads_on(e, folder))]
        links += [f"{below}{e.name}" for e in folders if e not in kept]
        if below.count("/") < deepest:
            todo += [f"{below}{e.name}/" for e in reversed(kept)]
    return files, links


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder and is not hidden, by name; nothing if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ArtifactError(f"cannot list {folder}: {error}", "check its permissions") from error


def _leads_on(link: os.DirEntry[str], folder: Path) -> bool:
    """Tell whether a link to a folder leads elsewhere than back to where it lies."""
    return not folder.resolve().is_relative_to(Path(link.path).resolve())


def _is_broken(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not entry.is_dir()


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
    wrong = _why_no_id(value)
    if wrong:
        raise DatasetError(
            f"{value[:60]!r} cannot be an image id: it {wrong}",
            "an id is a plain file name without extension: no separators, no '..'",
        )
    return value


def _why_no_id(value: str) -> str:
    """Return what keeps ``value`` from being a plain name, empty if nothing does."""
    if not value.strip():
        return "is blank"
    strange = next((place for place, mark in enumerate(value) if not mark.isprintable()), None)
    if strange is not None:
        return f"holds {value[strange]!r} as character {strange + 1}, which cannot be printed"
    if len(value.encode()) > MAX_ID_BYTES:
        return f"is longer than {MAX_ID_BYTES} bytes"
    if value.startswith("."):
        return "starts with a dot"
    if ".." in value:
        return "holds '..'"
    # Windows' rules are the stricter ones: both slashes separate, and "c:" is a drive.
    if PureWindowsPath(value).name != value:
        return "holds a separator or a drive"
    return ""
