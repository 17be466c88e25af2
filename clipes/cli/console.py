"""What people see: progress and remarks on stderr, tables of results on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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
    from clipes.stages.baseline import Change
    from clipes.stages.check import Findings
    from clipes.stages.doctor import Diagnosis
    from clipes.stages.evaluate import Scored

_IDS_SHOWN = 5
_UNUSED_SHOWN = 20
_WIDE = 10_000  # columns
_SECONDS_BETWEEN_LINES = 20.0  # where a bar cannot be drawn: a log file, CI


def talk() -> Console:
    """Return the console for everything that is not data: stderr, colour only on a terminal."""
    return _console(stderr=True, soft_wrap=True)


def _console(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Return a console that prints names as they are, ``[dog]`` and ``:cat:`` too.

    Standard output is data: where it is no terminal, it is wider than any table.
    """
    return Console(
        stderr=stderr,
        width=None if stderr or sys.stdout.isatty() else _WIDE,
        soft_wrap=soft_wrap,
        highlight=False,
        markup=False,
        emoji=False,
    )


def say(message: str) -> None:
    """Print one line on stderr."""
    talk().print(message)


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
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), *count]
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _LineProgress:
    """Progress as lines for a log, at most one every ``_SECONDS_BETWEEN_LINES``."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = self._printed = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:  # what was done before this began took no time
            self._first, self._start = done, now
        made = done - self._first
        if not made or done >= total or now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        left = (now - self._start) / made * (total - done)
        sys.stderr.write(f"{self._what}: {100 * done // total} %, about {left:.0f} s left\n")


def _table(title: str, columns: Iterable[str], left: Collection[str] = ()) -> Table:
    """Return a table without rows; the columns that hold no numbers are on the left."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def print_scores(scored: Scored, *, per_class: bool) -> None:
    """Print one row per stage, and one per class, on stdout; values in percent."""
    console = _console()
    columns = ("stage", "images", "mIoU", "pixel accuracy", "coverage")
    summary = _table("Scores in %", columns, left=("stage",))
    for stage, scores in scored.stages.items():
        ratios = (scores.miou, scores.pixel_accuracy, scores.coverage)
        summary.add_row(stage, str(scores.images), *(f"{100 * ratio:.2f}" for ratio in ratios))
    console.print(summary)
    if not per_class:
        return
    classes = _table("IoU in %, per class", ("class", *scored.stages), left=("class",))
    for index, name in enumerate(("background", *scored.classes)):
        values = [scores.iou[index] for scores in scored.stages.values()]
        if any(value is not None for value in values):
            cells = ("-" if value is None else f"{100 * value:.1f}" for value in values)
            classes.add_row(name, *cells)
    console.print(classes)


def print_changes(changes: Sequence[Change], tolerance: float) -> None:
    """Print each stage's mIoU beside its baseline on stdout, in percent."""
    title = f"mIoU in %, against the baseline (may fall by {tolerance:g})"
    table = _table(title, ("stage", "baseline", "now", "change", ""), left=("stage", ""))
    for change in changes:
        now, moved = "-", "-"
        if change.now is not None:
            now, moved = f"{change.now:.2f}", f"{change.now - change.before:+.2f}"
        verdict = "FELL" if change.fell(tolerance) else "ok"
        table.add_row(change.stage, f"{change.before:.2f}", now, moved, verdict)
    _console().print(table)


def print_findings(findings: Findings) -> None:
    """Print on stdout what images show, how often each kind of problem occurs, and where first."""
    console = _console(soft_wrap=True)
    _print_classes(findings, console)
    kinds = findings.by_kind()
    if not kinds:
        return
    columns = ("problem", "effect", "images", "the first")
    table = _table("Problems", columns, left=("problem", "effect", "the first"))
    for kind, problems in kinds.items():
        ids = [problem.id for problem in problems[:_IDS_SHOWN]]
        more = ["..."] if len(problems) > _IDS_SHOWN else []
        effect = "fails" if kind.stops else "remark"
        table.add_row(kind.value, effect, str(len(problems)), ", ".join([*ids, *more]))
    console.print(table)
    for kind, problems in kinds.items():
        console.print(f"{kind.value}: {problems[0].id}: {problems[0].reason}")


def _print_classes(findings: Findings, console: Console) -> None:
    """Print the number of images of every class, in mask order; those of none in one line."""
    if not findings.classes:
        return
    table = _table("Classes", ("class", "images", ""), left=("class", ""))
    for item in findings.classes:
        if item.images:
            table.add_row(item.name, str(item.images), "rare" if item.rare else "")
    console.print(table)
    unused = [item.name for item in findings.classes if not item.images]
    if unused:
        more = f" and {len(unused) - _UNUSED_SHOWN} more" if len(unused) > _UNUSED_SHOWN else ""
        names = ", ".join(unused[:_UNUSED_SHOWN])
        console.print(f"no image shows: {names}{more}")


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print what ``clipes doctor`` looked at, and which commands would run, on stdout."""
    console = _console(soft_wrap=True)
    for check in diagnosis.checks:
        remedy = f"; {check.remedy}" if check.remedy else ""
        line = f"{check.state.value:8} {check.name}: {check.detail}{remedy}"
        console.print(line)
    console.print()
    for command in diagnosis.lines:
        verdict = f"needs {', '.join(command.missing)}" if command.missing else "would run"
        console.print(f"{command.command}: {verdict}")


def print_bench(result: dict[str, Any]) -> None:
    """Print what ``clipes bench`` measured, on stdout."""
    console = _console()
    for threads, cam in result["cam"].items():
        title = f"CAM stage, {threads} thread(s), per image of 375 x 500, random ViT-B/16"
        columns = ("classes", "literal", "alone", "clipes", "speed-up", "fast", "bytes", "share")
        table = _table(title, columns)
        for classes, seconds in cam["seconds"].items():
            table.add_row(
                classes,
                f"{cam['seconds_literal'][classes]:.2f} s",
                f"{cam['seconds_one_at_a_time'][classes]:.2f} s",
                f"{seconds:.2f} s",
                f"{cam['speedup'][classes]:.2f} x",
                f"{cam['seconds_fast'][classes]:.2f} s",
                str(cam["bytes"][classes]),
                f"{cam['bytes'][classes] / cam['bytes_literal'][classes]:.2%}",
            )
        console.print(table)
        console.print(
            "literal, alone: one image on all threads; clipes: an image on each; fast: that "
            "preset; share: of the reference's bytes"
        )
        stages = ", ".join(
            f"{name} {1e3 * seconds:.0f} ms"
            for name, seconds in cam["stages_at_most_classes"].items()
        )
        console.print(f"at the most classes: {stages}")
        console.print(
            f"encoder: {cam['encoder_gflop']:.0f} GFLOP at {cam['encoder_gflops']:.0f} GFLOP/s, "
            f"{cam['encoder_share_of_peak']:.0%} of the measured GEMM peak of "
            f"{cam['gemm_peak_gflops']:.0f}"
        )
    for labels, crf in result["crf"].items():
        console.print(
            f"CRF, {labels} labels, one core: {crf['speedup']:.1f} x pydensecrf2 "
            f"({1e3 * crf['seconds']:.0f} ms), labels agree for {crf['label_agreement']:.4%}"
        )
