"""``clipes eval`` and ``report``: how good the masks of a run are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipes.cli.options import (
    PromptsOption,
    RootOption,
    RunArgument,
    UseCorrectedOption,
    listener,
    open_run,
)
from clipes.errors import UsageError

if TYPE_CHECKING:
    from clipes.stages.evaluate import Scored


def evaluate(
    target: Annotated[
        Path | None,
        typer.Argument(help="Run folder, or folder of masks. (default: the latest run)"),
    ] = None,
    gt: Annotated[
        Path | None, typer.Option(help="Folder of ground-truth masks. (default: the data set's)")
    ] = None,
    root: RootOption = None,
    prompts: PromptsOption = None,
    exponents: Annotated[
        str, typer.Option(help="Background exponents to score the maps with, by comma.")
    ] = "1",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the scores to this file.")
    ] = None,
    per_class: Annotated[bool, typer.Option(help="Print IoU per class.")] = True,
    baseline: Annotated[
        Path | None,
        typer.Option(help="Scores to hold these against: a --json file, or a folder of RUN.json."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Points of mIoU that a stage may fall below it.")
    ] = 0.5,
    use_corrected: UseCorrectedOption = True,
) -> None:
    """Score every stage that has output, per class; or any folder of masks.

    Example: clipes eval runs/voc --exponents 0.75,1,1.5 --json scores.json
    """
    from clipes.cli.console import print_scores, say
    from clipes.disk.files import write_json
    from clipes.run.folder import Run
    from clipes.stages.evaluate import (
        evaluate_folder,
        evaluate_run,
        keep_scores,
        scores_to_json,
    )

    powers = _numbers(exponents)
    if target is not None and not Run(target).exists():
        folder = target
        _refuse(
            {"--root": root, "--exponents": powers != [1], "--no-use-corrected": not use_corrected},
            f"{target}, which is no run folder",
        )
        scored = evaluate_folder(target, gt, prompts, listener())
    else:
        run = open_run(target)
        folder = run.root
        _refuse({"--prompts": prompts}, f"the run {folder}, which has its classes")
        scored = evaluate_run(run, root, gt, powers, listener(), use_corrected=use_corrected)
        keep_scores(scored, run, say)
    if json_file is not None:
        write_json(json_file, scores_to_json(scored))
    print_scores(scored, per_class=per_class)
    if baseline is not None:
        _hold(scored, baseline, folder.resolve().name, tolerance)


def _refuse(given: Mapping[str, object], where: str) -> None:
    """Refuse options that mean nothing to what is scored, each with whether it is given.

    Raises:
        UsageError: One is.
    """
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} means nothing to {where}", "drop it")


def _hold(scored: Scored, baseline: Path, name: str, tolerance: float) -> None:
    """Print how scores moved against a baseline, and fail if they fell."""
    from clipes.cli.console import print_changes, say
    from clipes.stages.baseline import compare, find_baseline, require

    file = find_baseline(baseline, name)
    if file is None:
        say(f"no baseline {name}.json in {baseline}")
        return
    changes = compare(scored, file)
    print_changes(changes, tolerance)
    require(changes, tolerance)


def report(
    run: RunArgument = None,
    root: RootOption = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="Most images shown large: about 100 kB each.")
    ] = 200,
    thumbnails: Annotated[
        int, typer.Option(min=0, help="Most images with a thumbnail: about 5 kB each.")
    ] = 2000,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Images at once. (default: one per core)")
    ] = None,
    use_corrected: UseCorrectedOption = True,
) -> None:
    """Write one HTML page of a run: scores, curves, pictures, and which masks need a person.

    The queue is also in report/review.csv, for scripts.

    Example: clipes report runs/voc
    """
    from clipes.stages.report import ReportRequest, make_report

    request = ReportRequest(root, pictures, thumbnails, workers, use_corrected)
    page, failures = make_report(request, open_run(run), listener())
    typer.echo(page)
    if failures:
        raise typer.Exit(1)


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"'{text}' is not a list of numbers", "write 0.75,1,1.5") from error
    if not all(0 < number < 100 for number in numbers):
        raise UsageError(f"exponents {text} are not all above 0 and below 100")
    return numbers
