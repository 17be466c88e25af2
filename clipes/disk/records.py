"""Plain data, such as JSON holds, read into frozen dataclasses that say what it has to be.

Types are strict: a list is read for a tuple and a whole number for a float, but no text for a
number and no ``true`` for 1. Keys that a dataclass does not know are passed over, and keys that are
missing get its defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from clipes.disk.files import read_json
from clipes.errors import ArtifactError

_T = TypeVar("_T")

_LARGEST = 1 << 24  # bytes


def read_record(
    path: Path, kind: type[_T], what: str, remedy: str, *, largest: int = _LARGEST
) -> _T:
    """Read a JSON file that is not trusted.

    Args:
        path: The file.
        kind: A frozen dataclass, whose fields may be dataclasses, tuples, mappings, unions, ....
        what: What the file is, for the error, such as ``the ranking``.
        remedy: What to do if it is none.
        largest: Bytes that it may have.

    Raises:
        ArtifactError: It cannot be read, is larger, or is no ``kind``.
    """
    source = f"cannot read {what} {path}"
    try:
        value = read_json(path, largest)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{source}: {error}", remedy) from error
    return parse_record(value, kind, source, remedy)


def parse_record(value: object, kind: type[_T], source: str, remedy: str) -> _T:
    """Return plain data that is not trusted as a dataclass.

    Args:
        value: The data.
        kind: As for ``read_record``. What no JSON can hold must already be of a field's type.
        source: What the error begins with: where the data is.
        remedy: What to do if it is none.

    Raises:
        ArtifactError: It is no ``kind``; says which part of it (``$`` is the whole) and why.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason = str(error).replace("`", "'")
        raise ArtifactError(f"{source}: {reason}", remedy) from error
