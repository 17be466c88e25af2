"""Folders that one process works on at a time, and what killed processes leave in them."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from clipes.errors import ArtifactError, WriteError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks; there, nothing is claimed
    fcntl = None  # type: ignore[assignment]

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_SESSION = secrets.token_hex(3)  # tells this process from an earlier one of the same number
_TEMPORARY = re.compile(
    r"\..*-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<session>[0-9a-f]{6})[0-9a-f]{6}(\.\w+)?"
)
_ABANDONED = 24 * 3600.0  # seconds after which another machine's temporary file is left over

_held: set[int] = set()


def temporary_sibling(path: Path) -> Path:
    """Return a hidden name beside ``path`` that says which process made it.

    It keeps the suffix of ``path``, because libraries choose a format by it.
    """
    mark = f"{_HOST}-{os.getpid()}-{_SESSION}{secrets.token_hex(3)}"
    return path.with_name(f".{path.stem[:40]}-{mark}{path.suffix}")


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files and folders in ``folder`` whose process is gone; return how many.

    What cannot be removed stays: it is in nobody's way.
    """
    removed = 0
    for path in folder.glob(".*") if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match and not _may_be_in_use(path, match):
            with suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed += 1
    return removed


def _may_be_in_use(path: Path, name: re.Match[str]) -> bool:
    process = int(name["pid"])
    if name["host"] != _HOST:
        try:
            return time.time() - path.stat().st_mtime < _ABANDONED
        except FileNotFoundError:
            return False
    if process == os.getpid():  # in containers numbers come back
        return name["session"] == _SESSION
    return _is_alive(process)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


IN_PARTS = "let every process do a part with --shard"
"""What can be done rather than wait for another process, where there is work in parts."""


@contextmanager
def claim(
    folder: Path,
    doing: str,
    *,
    shared: bool = False,
    on_wait: Callable[[], None] | None = None,
    otherwise: str = IN_PARTS,
) -> Iterator[None]:
    """Keep other processes from the same work while the block runs.

    The claim is an advisory lock of the operating system on the folder itself: it ends with the
    process, however that ends, and leaves nothing behind. Where the file system knows no locks,
    nothing is claimed. Temporary files of processes that were killed are removed.

    Args:
        folder: Where the output goes; created if need be.
        doing: The command, for the message.
        shared: Whether others that share may work too: shards of one run.
        on_wait: Called once if another process holds the folder, which is then waited for; None to
            give up instead.
        otherwise: What can be done rather than wait, for the message.

    Raises:
        ArtifactError: Another process holds the folder.
        WriteError: It cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise WriteError(
            f"cannot write to {folder}: {error.strerror}", "check its permissions"
        ) from error
    if handle is not None:
        _close_in_forks()
        _held.add(handle)
    try:
        if handle is not None and not _lock(handle, shared=shared, wait=False):
            if on_wait is None:
                raise ArtifactError(
                    f"another '{doing}' is working in {folder}",
                    f"wait for it, or {otherwise}",
                )
            on_wait()
            _lock(handle, shared=shared, wait=True)
        remove_leftovers(folder)
        yield
    finally:
        if handle is not None:
            _held.discard(handle)
            os.close(handle)


def _lock(handle: int, *, shared: bool, wait: bool) -> bool:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks, such as some network ones
    return True


@cache
def _close_in_forks() -> None:
    """Keep claims from passing to forked processes, which may outlive this one for a while."""
    os.register_at_fork(after_in_child=_drop_claims)


def _drop_claims() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()
