"""What an export wrote and what that was made from, kept beside it in ``export.json``.

A file is done if it was made from what there is now, whatever its date. Only files that are still
as the export wrote them are written over or removed: polygons and masks of an export are what
people correct by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from clipes.disk.files import remove_file, sha256_of, write_json
from clipes.disk.records import parse_record, read_record
from clipes.errors import ArtifactError, WriteError
from clipes.run.folder import check_same

RECORD = "export.json"
"""What says how a folder was written, so that nothing else is mixed into it."""

_LARGEST = 1 << 26  # bytes; an image takes 300
_REMEDY = "delete the folder, or choose another --out"
_PERMISSIONS = "check its permissions"
_UNFINISHED = ""  # what a file holds that was about to be written
_JOURNAL = ".export.jsonl"  # what was begun and written since the record was; hidden from tools


@dataclass(frozen=True)
class _Entry:
    """The files of one image.

    Attributes:
        made_from: Digest of what they were made from; empty while they are being written.
        files: What each of them holds, by its path below the folder; see ``_content``.
    """

    made_from: str
    files: dict[str, str]


@dataclass(frozen=True)
class _Record:
    """What ``export.json`` holds, as far as it is read again."""

    settings: dict[str, Any]
    made: dict[str, _Entry] | None = None


class Written:
    """The files that an export wrote for single images.

    Args:
        folder: Where they are.
        settings: How they are written, as plain data.
        command: The command line.
        defaults: Settings that an older clipes did not know, and so did not record.

    Raises:
        RunConflictError: The folder was written with other settings.
        ArtifactError: Its record is damaged, or it holds something else.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, object],
        command: str,
        defaults: Mapping[str, object],
    ) -> None:
        self._folder = folder
        self._settings = json.loads(json.dumps(settings))  # tuples are lists, as in the file
        self._command, self._defaults = command, defaults
        self._made = self._read()

    @property
    def ids(self) -> tuple[str, ...]:
        """The images that have, or may have, files."""
        return tuple(self._made)

    def is_done(self, image_id: str, made_from: str, files: Sequence[Path]) -> bool:
        """Tell whether all files of an image are there and were made from what is there now.

        A link whose target is gone is not there.
        """
        entry = self._made.get(image_id)
        return (
            entry is not None
            and entry.made_from == made_from
            and all(path.exists() for path in files)
        )

    def begin(self, image_id: str, files: Sequence[Path]) -> None:
        """Note that the files of an image are written now.

        If the process is killed meanwhile, they are known as the export's own, and are written
        again. Those of other images are known as they are: what someone does to them is seen.

        Raises:
            WriteError: It cannot be noted.
        """
        if files:
            names = {*map(self._name, files), *self._files(image_id)}
            self._note(image_id, _Entry("", dict.fromkeys(sorted(names), _UNFINISHED)))

    def edited(self, image_id: str, files: Iterable[Path] = ()) -> Path | None:
        """Return a file of an image that is no longer as it was written; None if all are.

        Args:
            image_id: The image.
            files: Its files, if it may have others than those that were written before.
        """
        known = self._files(image_id)
        for path in (*(self._folder / name for name in known), *files):
            recorded = known.get(self._name(path))
            if recorded != _UNFINISHED and _content(path) not in ("", recorded):
                return path
        return None

    def keep(self, image_id: str, made_from: str, files: Sequence[Path]) -> None:
        """Note that the files of an image are written; remove those it had under other names.

        Raises:
            WriteError: One cannot be removed, or it cannot be noted.
        """
        if files:
            now = {self._name(path): _content(path) for path in files}
            for name in self._files(image_id).keys() - now.keys():
                remove_file(self._folder / name, _PERMISSIONS)
            self._note(image_id, _Entry(made_from, now))

    def remove(self, image_id: str) -> bool:
        """Remove the files of an image, all or none; tell whether there were any.

        Files that someone edited stay; ``edited`` tells.

        Raises:
            WriteError: A file cannot be removed.
        """
        if self.edited(image_id):
            return False
        names = self._files(image_id)
        there = [self._folder / name for name in names if _content(self._folder / name)]
        for path in there:
            remove_file(path, _PERMISSIONS)
        self._made.pop(image_id, None)
        return bool(there)

    def save(self) -> None:
        """Write the record.

        Raises:
            WriteError: It cannot be written.
        """
        made = {image_id: asdict(entry) for image_id, entry in self._made.items()}
        record = {"command": self._command, "settings": self._settings, "made": made}
        write_json(self._folder / RECORD, record)
        remove_file(self._folder / _JOURNAL, _PERMISSIONS)

    def _note(self, image_id: str, entry: _Entry) -> None:
        """Set what is known of an image, beside the record: that is long where there are many."""
        self._made[image_id] = entry
        path = self._folder / _JOURNAL
        try:
            with path.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps({image_id: asdict(entry)}) + "\n")
        except OSError as error:
            raise WriteError(f"cannot write {path}: {error}", _PERMISSIONS) from error

    def _read(self) -> dict[str, _Entry]:
        path = self._folder / RECORD
        if not path.exists():
            if self._folder.is_dir() and any(
                not one.name.startswith(".") for one in self._folder.iterdir()
            ):
                # A data set has the same folders as some formats: its masks are no one else's.
                raise ArtifactError(
                    f"{self._folder} holds files that 'clipes export' did not write",
                    "choose an empty --out",
                )
            return {}
        record = read_record(path, _Record, "the record of an export", _REMEDY, largest=_LARGEST)
        before = {**self._defaults, **record.settings}
        check_same(self._folder, "export", before, self._settings)
        if record.made is None:
            raise ArtifactError(f"{path} does not say which files the export wrote", _REMEDY)
        return record.made | self._noted()

    def _noted(self) -> dict[str, _Entry]:
        """Return what an export that was killed noted after it wrote the record."""
        path = self._folder / _JOURNAL
        made: dict[str, _Entry] = {}
        try:
            lines = path.read_bytes().splitlines() if path.exists() else []
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error}", _PERMISSIONS) from error
        for line in lines:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue  # cut off as the machine went down: what it was about had not begun
            made |= parse_record(value, dict[str, _Entry], f"cannot read {path}", _REMEDY)
        return made

    def _files(self, image_id: str) -> dict[str, str]:
        """Return the recorded files of an image; none outside the folder, whatever is recorded."""
        entry = self._made.get(image_id)
        return {} if entry is None else {k: v for k, v in entry.files.items() if _is_below(k)}

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _content(path: Path) -> str:
    """Return the sha256 of a file, or where a link leads; empty if there is neither."""
    try:
        if path.is_symlink():
            return f"-> {path.readlink()}"
        return sha256_of(path)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error}", _PERMISSIONS) from error


def _is_below(name: str) -> bool:
    """Tell whether a recorded path leads to something below the folder."""
    return ".." not in PurePosixPath(name).parts and not PureWindowsPath(name).anchor
