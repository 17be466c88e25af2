"""Folders that one process works on at a time, and what killed processes leave in them."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipes.errors import ArtifactError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks; there, nothing is claimed
    fcntl = None  # type: ignore[assignment]

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(r"\..*-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{12}(\.\w+)?")
_ABANDONED = 24 * 3600.0  # seconds after which another machine's temporary file is left over


def temporary_sibling(path: Path) -> Path:
    """Return a hidden name beside ``path`` that says which process made it.

    It keeps the suffix of ``path``, because libraries choose a format by it.
    """
    mark = f"{_HOST}-{os.getpid()}-{secrets.token_hex(6)}"
    return path.with_name(f".{path.stem[:40]}-{mark}{path.suffix}")


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files in ``folder`` whose process is gone; return how many."""
    removed = 0
    for path in folder.glob(".*") if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match and not _may_be_in_use(path, match["host"], int(match["pid"])):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _may_be_in_use(path: Path, host: str, process: int) -> bool:
    if host == _HOST:
        return _is_alive(process)
    try:
        return time.time() - path.stat().st_mtime < _ABANDONED
    except FileNotFoundError:
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def claim(folder: Path, doing: str, *, shared: bool = False) -> Iterator[None]:
    """Keep other processes from the same work while the block runs.

    The claim is an advisory lock of the operating system on the folder itself: it ends with the
    process, however that ends, and leaves nothing behind. Where the file system knows no locks,
    nothing is claimed. Temporary files of processes that were killed are removed.

    Args:
        folder: Where the output goes; created if need be.
        doing: The command, for the message.
        shared: Whether others that share may work too: shards of one run.

    Raises:
        ArtifactError: Another process holds the folder, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ArtifactError(
            f"cannot write to {folder}: {error.strerror}", "check its permissions"
        ) from error
    try:
        if handle is not None and not _lock(handle, shared=shared):
            raise ArtifactError(
                f"another '{doing}' is working in {folder}",
                "wait for it, or let every process do a part with --shard",
            )
        remove_leftovers(folder)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, *, shared: bool) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks, such as some network ones
    return True
