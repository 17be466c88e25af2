"""The page that shows a run, from what is on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from clipes.artifacts import Run
from clipes.errors import DatasetError
from clipes.report import ReportItem, write_report
from clipes.stages.evaluate import Scored, evaluate_run
from clipes.stages.reopen import reopen
from clipes.types import Failure, Progress, Sample


def make_report(
    run: Run,
    root: Path | None,
    *,
    progress: Progress,
    say: Callable[[str], None],
    report: Callable[[Failure], None],
) -> Path:
    """Write ``report/index.html`` of a run and return its path.

    Args:
        run: The run folder.
        root: Where the data set is, if not where run.json says.
        progress: Called after each image.
        say: Told what is left out.
        report: Called with each image that cannot be shown.

    Raises:
        ArtifactError: The run has no maps, or the page cannot be written.
    """
    settings = run.stage("cam")["settings"]
    data = reopen(run, root)
    present = set(run.ids("cams"))
    samples = [sample for sample in data.samples if sample.id in present]
    try:
        scored = evaluate_run(run, root, None, [1.0], progress=_quiet, say=say)
    except DatasetError as error:
        say(f"no scores: {error}")
        scored = Scored(data.classes, {})
    facts = {
        "data set": data.name,
        "images": str(len(samples)),
        "weights": str(settings["weights"]["name"]),
        "preset": str(settings["preset"]["name"]),
    }
    note = str(settings["text"]["note"])
    return write_report(
        run.root,
        _items(run, samples, progress),
        scored.stages,
        title=f"clipes: {run.root.name}",
        classes=data.classes,
        facts=facts,
        note=note,
        report=report,
    )


def _items(run: Run, samples: Sequence[Sample], progress: Progress) -> Iterator[ReportItem]:
    for index, sample in enumerate(samples):
        pseudo = run.load_pseudo(sample.id) if run.has_pseudo(sample.id) else None
        yield ReportItem(sample.id, sample.image, run.load_cams(sample.id), pseudo, sample.mask)
        progress(index + 1, len(samples))


def _quiet(_done: int, _total: int) -> None:
    """Scoring is a small part of a report: its progress is not shown."""
