"""How a stage is followed while it works; it knows nothing of terminals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from clipes.types import Failure, Progress


class OpenProgress(Protocol):
    """Opens a progress bar."""

    def __call__(
        self, what: str, /, *, show_count: bool = True
    ) -> AbstractContextManager[Progress]:
        """Return a block in which progress on ``what`` is followed; see ``console``."""


def ignore(_: object) -> None:
    """Take what is said, and pass over it."""


@contextmanager
def no_progress(what: str, /, *, show_count: bool = True) -> Iterator[Progress]:
    """Follow nothing."""
    yield lambda done, total: None


@dataclass(frozen=True)
class Listener:
    """Who is told how a stage goes.

    Attributes:
        say: Takes remarks, a line each.
        report: Takes each image that cannot be processed.
        progress: Opens a progress bar.
    """

    say: Callable[[str], None] = ignore
    report: Callable[[Failure], None] = ignore
    progress: OpenProgress = no_progress
