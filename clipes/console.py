"""What people see: progress and remarks on stderr, tables of results on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from clipes.types import Progress as ProgressCallback

if TYPE_CHECKING:
    from clipes.stages.evaluate import Scored

_SECONDS_BETWEEN_LINES = 20.0  # where a bar cannot be drawn: a log file, CI


def talk() -> Console:
    """Return the console for everything that is not data: stderr, colour only on a terminal."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print one line on stderr."""
    talk().print(message, markup=False)


@contextmanager
def progress_bar(what: str, *, show_count: bool = True) -> Iterator[ProgressCallback]:
    """Yield a progress callback: a bar with time left on a terminal, else a line now and then.

    Args:
        what: What is going on, in a word or two.
        show_count: Whether ``done/total`` means something to a reader (images do, bytes do not).
    """
    console = talk()
    if not console.is_terminal:
        yield _LineProgress(what)
        return
    count = [MofNCompleteColumn()] if show_count else [TaskProgressColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *count]
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _LineProgress:
    """Progress as lines for a log, at most one every ``_SECONDS_BETWEEN_LINES``."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not done or done >= total or now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        left = (now - self._start) / done * (total - done)
        sys.stderr.write(f"{self._what}: {100 * done // total} %, about {left:.0f} s left\n")


def print_scores(scored: Scored, *, per_class: bool) -> None:
    """Print one row per stage, and one per class, on stdout; values in percent."""
    console = Console(highlight=False)
    summary = Table(title="Scores in %")
    for column in ("stage", "images", "mIoU", "pixel accuracy", "coverage"):
        summary.add_column(column, justify="left" if column == "stage" else "right")
    for stage, scores in scored.stages.items():
        ratios = (scores.miou, scores.pixel_accuracy, scores.coverage)
        summary.add_row(stage, str(scores.images), *(f"{100 * ratio:.2f}" for ratio in ratios))
    console.print(summary)
    if not per_class:
        return
    classes = Table(title="IoU in %, per class")
    classes.add_column("class")
    for stage in scored.stages:
        classes.add_column(stage, justify="right")
    for index, name in enumerate(("background", *scored.classes)):
        values = [scores.iou[index] for scores in scored.stages.values()]
        if any(value is not None for value in values):
            cells = ("-" if value is None else f"{100 * value:.1f}" for value in values)
            classes.add_row(name, *cells)
    console.print(classes)
