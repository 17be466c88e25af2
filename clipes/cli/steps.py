"""Training steps at the terminal: a bar, or a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipes.seg.train import Step

_SECONDS_BETWEEN_LINES = 20.0  # where a bar cannot be drawn


@contextmanager
def step_bar() -> Iterator[Callable[[Step], None]]:
    """Yield what shows training steps: a bar with loss and rate, or a line now and then."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from clipes.cli.console import talk

    console = talk()
    if not console.is_terminal:
        yield _StepLines()
        return
    columns: list[ProgressColumn] = [
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
    ]
    columns += [TextColumn("left"), TimeRemainingColumn()]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=None, state="")
        yield lambda step: bar.update(
            task, completed=step.iteration, total=step.total, state=_state(step)
        )


class _StepLines:
    """Steps as lines for a log, at most one every ``_SECONDS_BETWEEN_LINES``."""

    def __init__(self) -> None:
        self._start = self._printed = time.monotonic()
        self._first: int | None = None

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = step.iteration, now
        last = step.iteration == step.total
        if not last and now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        made = step.iteration - self._first
        left = (now - self._start) / made * (step.total - step.iteration) if made else 0
        ending = f", about {left:.0f} s left" if made and not last else ""
        sys.stderr.write(f"train: {step.iteration}/{step.total}, {_state(step)}{ending}\n")


def _state(step: Step) -> str:
    return f"loss {step.loss:.3f}, lr {step.lr:.2g}, {100 * step.kept:.0f} % of pixels"
