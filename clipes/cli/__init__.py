"""The command line. Every command is a few lines: read options, call a stage, say how it went.

torch and everything else that is slow to import is imported inside the commands.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipes import __version__
from clipes.choices import (
    CrfBackend,
    DatasetKind,
    Fusion,
    Precision,
    PresetName,
    RefineBackend,
)
from clipes.cli.bench import bench
from clipes.cli.data import check, masks, tag
from clipes.cli.doctor import doctor
from clipes.cli.export import export
from clipes.cli.options import (
    RUNS,
    DatasetOption,
    DeviceOption,
    DifficultOption,
    FusionOption,
    ModelOption,
    OutOption,
    PromptsOption,
    RootOption,
    RunArgument,
    ShardOption,
    SplitOption,
    TagThresholdOption,
    TemplateOption,
    TextFeaturesOption,
    WeightsOption,
    command_line,
    finish,
    listener,
    open_run,
    say_failure,
    this_part,
)
from clipes.cli.prompts import prompts_app
from clipes.cli.seg import predict, train_seg
from clipes.cli.streams import robust_streams
from clipes.config import BOX_THRESHOLDS, CamParams
from clipes.errors import BackendError, ClipesError, UsageError, WriteError

if TYPE_CHECKING:
    from clipes.types import Failure

_LAMBDAS = "; ".join(
    [f"{CamParams().box_threshold}", *(f"{kind}: {own}" for kind, own in BOX_THRESHOLDS.items())]
)
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_STOPPED = 128  # as shells have it, the exit code is this and the signal's number

app = typer.Typer(
    name="clipes",
    help="Pseudo-masks from image-level labels with a frozen CLIP.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
weights_app = typer.Typer(help="CLIP weights: fetch, list, locate.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")
app.add_typer(prompts_app, name="prompts")
app.command("check")(check)
app.command("tag")(tag)
app.command("masks")(masks)
app.command("train-seg")(train_seg)
app.command("predict")(predict)
app.command("bench")(bench)
app.command("export")(export)
app.command("doctor")(doctor)


@app.command()
def cam(
    dataset: DatasetOption,
    root: RootOption = None,
    split: SplitOption = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV, JSON (COCO's too), txt, npz or npy with each image's labels, instead of "
            "annotations; auto guesses them, see 'clipes tag'."
        ),
    ] = None,
    difficult: DifficultOption = True,
    tag_threshold: TagThresholdOption = None,
    preset: Annotated[PresetName, typer.Option(help="Settings.")] = PresetName.default,
    weights: WeightsOption = "auto",
    model: ModelOption = "ViT-B-16",
    text_features: TextFeaturesOption = None,
    prompts: PromptsOption = None,
    fusion: FusionOption = Fusion.sentence,
    template: TemplateOption = None,
    box_threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help=f"lambda of the affinity's boxes. (default: {_LAMBDAS})"),
    ] = None,
    out: OutOption = None,
    shard: ShardOption = None,
    device: DeviceOption = "auto",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images, or batches, at once. (default: one per core, for a GPU up to 16)"
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images given to CLIP together. (default: 1; GPU: 32)"),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="Of CLIP's matrix products; auto: bf16 where that is faster, else fp32."),
    ] = Precision.fp32,
    keep_looks: Annotated[
        bool,
        typer.Option(
            help="When labels or pictures changed, make only their maps again: keep what the "
            "classes look like as it was learnt before."
        ),
    ] = False,
) -> None:
    """Images and their labels to activation maps: the only stage that needs CLIP.

    Example: clipes cam --dataset voc --root data/VOC2012 --split train
    """
    from clipes.artifacts import Run
    from clipes.config import TagParams, get_preset
    from clipes.stages.cam import CamRequest, ClipRequest, DataRequest, Resources
    from clipes.stages.cam import cam as cam_stage

    run = Run(out or RUNS / dataset.value)
    request = CamRequest(
        DataRequest(
            dataset.value,
            root=root,
            split=split,
            labels=labels,
            prompts=prompts,
            difficult=difficult,
            tags=TagParams() if tag_threshold is None else TagParams(tag_threshold),
        ),
        ClipRequest(
            weights,
            model,
            text_features=text_features,
            fusion=fusion,
            template=template,
            rankings=(run.root, RUNS / dataset.value),
            device=device,
            precision=precision.value,
        ),
        get_preset(preset.value).for_dataset(dataset.value, box_threshold),
        keep_looks=keep_looks,
        command=command_line(),
    )
    how = Resources(this_part(shard), workers, batch)
    outcome = cam_stage(request, run, how, listener())
    finish("maps", run, outcome.summary, outcome.unusable)


@app.command()
def refine(
    run: RunArgument = None,
    root: RootOption = None,
    preset: Annotated[
        PresetName | None, typer.Option(help="Settings of the CRF. (default: as in cam)")
    ] = None,
    crf: Annotated[
        CrfBackend,
        typer.Option(help="CRF implementation; pydensecrf, the authors' own, is an extra."),
    ] = CrfBackend.numba,
    backend: Annotated[
        RefineBackend,
        typer.Option(
            help="What to run on: loky (processes of this machine), threading (this process), or a "
            "ray or dask cluster: that of RAY_ADDRESS or DASK_SCHEDULER_ADDRESS, else a local one."
        ),
    ] = RefineBackend.loky,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Images at once. (default: one per core)"),
    ] = None,
    shard: ShardOption = None,
) -> None:
    """Maps and images to pseudo-masks and confidence maps, with a dense CRF.

    Example: clipes refine runs/voc --workers 8
    """
    from clipes.stages.refine import RefineRequest, RefineResources
    from clipes.stages.refine import refine as refine_stage

    folder = open_run(run)
    request = RefineRequest(root, preset and preset.value, crf.value, command_line())
    how = RefineResources(this_part(shard), workers, backend.value)
    outcome = refine_stage(request, folder, how, listener())
    finish("masks", folder, outcome.summary, outcome.unusable)


@app.command(name="eval")
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
) -> None:
    """Score every stage that has output, per class; or any folder of masks.

    Example: clipes eval runs/voc --exponents 0.75,1,1.5 --json scores.json
    """
    from clipes.artifacts import Run
    from clipes.console import print_changes, print_scores, progress_bar, say
    from clipes.files import write_json
    from clipes.stages.baseline import compare, find_baseline, require
    from clipes.stages.evaluate import evaluate_folder, evaluate_run, scores_to_json

    powers = _numbers(exponents)
    with progress_bar("eval") as progress:
        if target is None or Run(target).exists():
            folder = open_run(target)
            name = folder.root.resolve().name
            scored = evaluate_run(folder, root, gt, powers, progress=progress, say=say)
            try:
                write_json(folder.root / "scores.json", scores_to_json(scored))
            except (
                WriteError
            ) as error:  # a finished run may be read-only, and is scored all the same
                say(f"the scores are not kept: {error}")
        else:
            name = target.resolve().name
            scored = evaluate_folder(target, gt, prompts or "voc", progress=progress, say=say)
    if json_file is not None:
        write_json(json_file, scores_to_json(scored))
    print_scores(scored, per_class=per_class)
    if baseline is None:
        return
    file = find_baseline(baseline, name)
    if file is None:
        say(f"no baseline {name}.json in {baseline}")
        return
    changes = compare(scored, file)
    print_changes(changes, tolerance)
    require(changes, tolerance)


@app.command()
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
) -> None:
    """Write one HTML page of a run: scores, curves, pictures, and which masks need a person.

    The queue is also in report/review.csv, for scripts.

    Example: clipes report runs/voc
    """
    from clipes.console import progress_bar, say
    from clipes.stages.report import make_report

    failures: list[Failure] = []
    with progress_bar("report") as progress:
        page = make_report(
            open_run(run),
            root,
            large=pictures,
            thumbnails=thumbnails,
            workers=workers,
            progress=progress,
            say=say,
            report=failures.append,
        )
    for failure in failures:
        say_failure(failure)
    typer.echo(page)
    if failures:
        raise typer.Exit(1)


@app.command()
def demo(
    weights: WeightsOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Run folder. (default: runs/examples)")] = None,
) -> None:
    """Run every stage on the bundled examples, print mIoU and write a report to look at.

    Example: clipes demo
    """
    cam(DatasetKind.examples, weights=weights, out=out)
    folder = out or RUNS / "examples"
    refine(folder)
    evaluate(folder)
    report(folder)


@weights_app.command("fetch")
def weights_fetch(
    source: Annotated[str, typer.Argument(help="auto, openai, registry or a tag.")] = "auto",
    model: ModelOption = "ViT-B-16",
) -> None:
    """Get weights into the cache and print their path.

    Example: clipes weights fetch registry
    """
    typer.echo(_resolved(source, model).path)


@weights_app.command("path")
def weights_path(
    source: Annotated[str, typer.Argument(help="auto, openai, registry or a tag.")] = "auto",
    model: ModelOption = "ViT-B-16",
) -> None:
    """Print the path of cached weights; nothing is fetched.

    Example: clipes weights path
    """
    from clipes.errors import WeightsError
    from clipes.weights import find

    found = find(source, model)
    if found is None:
        raise WeightsError(
            f"weights '{source}' of {model} are not in the cache",
            f"run 'clipes weights fetch {source}'",
        )
    typer.echo(found.path)


@weights_app.command("list")
def weights_list() -> None:
    """List the weights in the cache: name, size, path.

    Example: clipes weights list
    """
    from clipes.console import say
    from clipes.weights import cache_dir, cached

    entries = cached()
    for entry in entries:
        size = entry.path.stat().st_size / 1e6
        typer.echo(f"{entry.model}\t{entry.name}\t{size:.0f} MB\t{entry.path}")
    if not entries:
        say(f"no weights in {cache_dir()}; 'clipes weights fetch' gets some")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"clipes {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exits with 0 all done, 1 something failed, 2 usage, 130 interrupted, 143 terminated.
    """
    with robust_streams():
        _run(arguments)


def _run(arguments: Sequence[str] | None) -> None:
    try:
        try:
            with _stopped_by_signals():
                app(arguments, prog_name="clipes")
        finally:
            sys.stdout.flush()
    except ClipesError as error:
        typer.secho(f"clipes: {error}", fg=_colour(), err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except SystemExit as stop:
        if isinstance(stop.code, int) and stop.code - _STOPPED in _STOPPING:
            typer.echo("clipes: stopped; the same command continues where it was", err=True)
            with suppress(OSError):
                sys.stdout.flush()
            # Threads may be at work still: to take the interpreter apart under them is to crash.
            os._exit(stop.code)
        raise


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let Ctrl-C, a scheduler or a shutdown end the block where it is, cleaning up on the way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        sys.unraisablehook = _pass_over  # what was cut short complains when it is forgotten
        raise SystemExit(_STOPPED + number)

    # Who starts a process may let it ignore them, as shells do in the background.
    heeded = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    # Compiled code may turn the SystemExit into a SystemError; torch raises RuntimeErrors about
    # loader processes that were told to stop, too, which are BackendErrors by now.
    except (SystemError, RuntimeError, BackendError) as error:
        if not received:
            raise
        raise SystemExit(_STOPPED + received[0]) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_over(_: object) -> None:
    """Say nothing of errors in destructors."""


def _colour() -> str | None:
    return "red" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else None


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"'{text}' is not a list of numbers", "write 0.75,1,1.5") from error
    if not all(0 < number < 100 for number in numbers):
        raise UsageError(f"exponents {text} are not all above 0 and below 100")
    return numbers


def _resolved(source: str, model: str) -> Any:  # noqa: ANN401  (its type costs an import)
    from clipes.console import progress_bar, say
    from clipes.weights import resolve

    with progress_bar("weights", show_count=False) as progress:
        return resolve(source, model, say=say, progress=progress)
