"""The page that shows a run, from what is on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from clipes.artifacts import Run
from clipes.errors import ClipesError, DatasetError
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
    if note:
        note = f"{note[0].upper()}{note[1:]}."
    return write_report(
        run.root,
        _items(run, samples, progress, report),
        scored.stages,
        title=f"clipes: {run.root.name}",
        classes=data.classes,
        facts=facts,
        note=note,
        report=report,
    )


def _items(
    run: Run, samples: Sequence[Sample], progress: Progress, report: Callable[[Failure], None]
) -> Iterator[ReportItem]:
    for index, sample in enumerate(samples):
        item = _item(run, sample, report)
        if item is not None:
            yield item
        progress(index + 1, len(samples))


def _item(run: Run, sample: Sample, report: Callable[[Failure], None]) -> ReportItem | None:
    try:
        maps = run.load_cams(sample.id)
        pseudo = run.load_pseudo(sample.id) if run.has_pseudo(sample.id) else None
    except ClipesError as error:
        report(Failure(sample.id, str(error)))
        return None
    return ReportItem(sample.id, sample.image, maps, pseudo, sample.mask)


def _quiet(_done: int, _total: int) -> None:
    """Scoring is a small part of a report: its progress is not shown."""
