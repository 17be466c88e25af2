"""Which of several ways to do the same is fastest on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

_ROUNDS = 6


def best_times(ways: Sequence[Callable[[], object]]) -> list[float]:
    """Return the shortest of a few times in seconds of each way.

    They are timed in turns, and the best of each counts: other processes disturb all alike.
    """
    rounds = [[_seconds(way) for way in ways] for _ in range(_ROUNDS)]
    return [min(column) for column in zip(*rounds, strict=True)]


def _seconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start
