"""What a stage said, kept for tests to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clipes.listener import Listener
from clipes.types import Failure, Progress


class Heard:
    """Keeps what is told: ``said``, ``failures``, and ``steps`` by what they are of."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.failures: list[Failure] = []
        self.steps: dict[str, list[tuple[int, int]]] = {}
        self.listener = Listener(self.said.append, self.failures.append, self._follow)

    @contextmanager
    def _follow(self, what: str, /, *, show_count: bool = True) -> Iterator[Progress]:
        steps = self.steps.setdefault(what, [])
        yield lambda done, total: steps.append((done, total))
