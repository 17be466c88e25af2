"""Callbacks for tests of what reports its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


def quiet(_: object) -> None:
    """Hear a remark and say nothing."""


@contextmanager
def no_progress(*_: object, **__: object) -> Iterator[Callable[[int, int], None]]:
    """Open a progress bar nobody sees."""
    yield lambda _done, _total: None
