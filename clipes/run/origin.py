"""What a file was made from, so that it is made again when that changes, and only then.

Maps, masks and confidence maps carry their origin: one line of JSON, the same bytes for the same
inputs. It lies in the file itself (an array ``origin`` beside the maps, a text chunk of the PNGs),
so that it is complete or absent together with it, whatever kills a process.

The picture is told by the sha256 of its file. To read every picture again at every command would
take minutes for ten thousand of them: one whose size is the same and that was not touched since
the maps were written (``st_ctime``, which a program cannot set) is taken for the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from clipes.disk.files import sha256_of
from clipes.disk.images import read_image, read_origin
from clipes.disk.large import LargePicture
from clipes.disk.records import parse_record
from clipes.errors import ArtifactError, ImageError
from clipes.types import UInt8Array

_T = TypeVar("_T")
_O = TypeVar("_O", bound="_Origin")

_COARSE = 2_000_000_000  # ns; some file systems know times to two seconds only


def digest(value: object) -> str:
    """Return the sha256 of plain data.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(_line(value).encode()).hexdigest()


def maps_settings(settings: Mapping[str, Any]) -> str:
    """Return the digest of what changes maps among the settings that run.json records of ``cam``.

    Where images come from does not, nor what the dense CRF is told.
    """

    def part(name: str, key: str) -> object:
        section = settings.get(name)
        return section.get(key) if isinstance(section, Mapping) else None

    return digest(
        {
            "cam": part("preset", "cam"),
            "precision": settings.get("precision"),
            "weights": part("weights", "sha256"),
            "text": part("text", "sha256"),
            **{name: settings[name] for name in ("towers", "tile") if settings.get(name)},
        }
    )


@dataclass(frozen=True)
class Picture:
    """The file of a picture as it was at one moment.

    Attributes:
        sha256: Of its bytes.
        size: Their number.
        touched: When it, or a link to it, was last changed in any way, in nanoseconds.
    """

    sha256: str
    size: int
    touched: int

    @classmethod
    def of(cls, path: Path) -> Picture:
        """Read a file.

        Raises:
            OSError: It cannot be read.
        """
        size, touched = _state(path)
        return cls(sha256_of(path), size, touched)

    def is_still(self, path: Path) -> bool:
        """Tell whether nothing has touched the file since."""
        try:
            return _state(path) == (self.size, self.touched)
        except OSError:
            return False


def read_picture(path: Path) -> tuple[UInt8Array, Picture]:
    """Read a photo, as ``read_image`` does, together with what its file is.

    Raises:
        ImageError: It cannot be read, or something writes to it meanwhile.
    """
    return _told(path, lambda: read_image(path))


def read_large(path: Path, folder: Path | None) -> tuple[LargePicture, Picture]:
    """As ``read_picture``, for a picture that memory is not to hold.

    Args:
        path: The file.
        folder: Where its pixels are kept; None for where the system keeps such files.

    Raises:
        ImageError: As for ``read_picture``.
        WriteError: There is no room for its pixels.
    """
    return _told(path, lambda: LargePicture(path, folder))


def _told(path: Path, read: Callable[[], _T]) -> tuple[_T, Picture]:
    image = read()
    try:
        picture = Picture.of(path)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error}", "check its permissions") from error
    if not picture.is_still(path):
        raise changing(path)
    return image, picture


def changing(path: Path) -> ImageError:
    """Return the error of a picture that was replaced while it was worked on."""
    return ImageError(
        f"{path} was changed while it was worked on", "run the same command again when it is whole"
    )


def same_picture(path: Path, sha256: str, size: int, since: int) -> tuple[bool, bool]:
    """Tell whether a file is still the picture that something was made from.

    Args:
        path: The file.
        sha256: Of the picture that it was.
        size: Its number of bytes.
        since: When that something was written, in nanoseconds.

    Returns:
        Whether it is the same, and whether its bytes had to be read to know. A file that cannot
        be looked at counts as the same: whoever reads it says what is wrong with it.
    """
    try:
        now, touched = _state(path)
        if now != size:
            return False, False
        if touched < since - _COARSE:
            return True, False
        return sha256_of(path) == sha256, True
    except OSError:
        return True, False


def mark_seen(path: Path, when: int) -> None:
    """Date a file at the moment when the pictures it was made from were found to be the same.

    So a data set that was moved is read once, not at every command. Files that cannot be dated
    stay as they are, and the pictures are read again next time.

    Args:
        path: The file.
        when: Before the first picture was looked at, in nanoseconds.
    """
    with suppress(OSError):
        os.utime(path, ns=(when, when))


class _Origin:
    """What is kept as a line of JSON in the file that it tells of; subclasses are dataclasses."""

    def text(self: Any) -> str:
        """Return it as the line that is kept in the file."""
        return _line(asdict(self))

    @classmethod
    def parse(cls: type[_T], text: str) -> _T | None:
        """Read such a line; None for any other text, as in files of clipes before 0.1."""
        try:
            return parse_record(json.loads(text), cls, "", "")
        except (ValueError, RecursionError, ArtifactError):
            return None

    @classmethod
    def of_file(cls: type[_O], path: Path) -> _O | None:
        """Return what a PNG says; None if it says no such thing, is absent, or damaged."""
        try:
            return cls.parse(read_origin(path))
        except ImageError:  # whoever reads it says what is wrong
            return None


@dataclass(frozen=True)
class _OfPicture(_Origin):
    """The origin of what was made from a picture.

    Attributes:
        image: sha256 of the picture's file.
        bytes: Its size.
    """

    image: str
    bytes: int

    def is_still(self, path: Path, made: Path, written: int) -> bool:
        """Tell whether the picture is what it was, and note on what was made that it was looked at.

        Args:
            path: The picture.
            made: What was made from it.
            written: When that was, as for ``same_picture``.
        """
        now = time.time_ns()
        same, was_read = same_picture(path, self.image, self.bytes, written)
        if same and was_read:
            mark_seen(made, now)
        return same


@dataclass(frozen=True)
class MapsOrigin(_OfPicture):
    """What the maps of an image were made from.

    Attributes:
        labels: 0-based classes, ascending.
        settings: Digest of the settings, the tower and the class vectors: ``maps_settings``.
        looks: Digest of what the classes look like; empty where each image stands on its own.
    """

    labels: tuple[int, ...]
    settings: str
    looks: str


@dataclass(frozen=True)
class MaskOrigin(_Origin):
    """What the mask and the confidence map of an image were made from.

    Attributes:
        maps: Digest of the origin of the maps.
        settings: Digest of the settings of ``refine``.
    """

    maps: str
    settings: str

    @classmethod
    def of(cls, maps: str, settings: Mapping[str, Any]) -> MaskOrigin:
        """Return the origin of what is made from maps of the origin ``maps`` (its line)."""
        return cls(digest(maps), digest(settings))


@dataclass(frozen=True)
class PredictionOrigin(_OfPicture):
    """What a segmenter's mask of an image was made from.

    Attributes:
        model: Digest of the segmenter and of how it was asked.
    """

    model: str


@dataclass(frozen=True)
class RelabelOrigin(_OfPicture):
    """What a segmenter's mask and confidence map of a run's image were made from.

    Attributes:
        labels: 0-based classes that were allowed, ascending.
        checkpoint: sha256 of the segmenter's file.
        settings: Digest of the settings of ``relabel``.
        maps: Digest of the origin of the maps that had a share in them; empty where none had.
    """

    labels: tuple[int, ...]
    checkpoint: str
    settings: str
    maps: str = ""


@dataclass(frozen=True)
class CorrectionOrigin(_OfPicture):
    """Who corrected the mask of an image.

    Attributes:
        by: A person's name.
        when: When it was imported, ISO 8601 in UTC.
        tool: The format it came in.
    """

    by: str
    when: str
    tool: str


@dataclass(frozen=True)
class TokensOrigin(_OfPicture):
    """What the kept tokens of an image were made from.

    Attributes:
        tokens: Their ``TokenSource.fingerprints``.
    """

    tokens: Mapping[str, str]


def _line(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _state(path: Path) -> tuple[int, int]:
    """Return the size of a file and when it was last touched; a link counts with its target."""
    target, link = path.stat(), path.lstat()
    times = [target.st_ctime_ns, link.st_ctime_ns]
    if os.name == "nt":  # where st_ctime is when the file was made
        times += [target.st_mtime_ns, link.st_mtime_ns]
    return target.st_size, max(times)
