"""The command line. Every command is a few lines: read options, call a stage, say how it went.

torch and everything else that is slow to import is imported inside the commands.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipes import __version__
from clipes.errors import ClipesError, UsageError

if TYPE_CHECKING:
    from clipes.artifacts import Run
    from clipes.runner import Summary
    from clipes.types import Failure

RUNS = Path("runs")
"""Where run folders go by default: ``runs/<dataset>``."""

_INTERRUPTED = 130  # typer's exit code after Ctrl-C

app = typer.Typer(
    name="clipes",
    help="Pseudo-masks from image-level labels with a frozen CLIP.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
weights_app = typer.Typer(help="CLIP weights: fetch, list, locate.", no_args_is_help=True)
prompts_app = typer.Typer(help="The text side: words and vectors.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")
app.add_typer(prompts_app, name="prompts")


class DatasetKind(str, Enum):
    """Kinds of data sets, as the command line names them."""

    voc = "voc"
    folder = "folder"
    examples = "examples"


class PresetName(str, Enum):
    """Presets, as the command line names them."""

    reference = "reference"
    default = "default"
    fast = "fast"


class CrfBackend(str, Enum):
    """Implementations of the dense CRF."""

    numba = "numba"
    pydensecrf = "pydensecrf"


DatasetOption = Annotated[DatasetKind, typer.Option("--dataset", "-d", help="Kind of data set.")]
RootOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the data set. [default: $CLIPES_DATA, else datasets/]"),
]
SplitOption = Annotated[
    str | None, typer.Option(help="Name of a list of images, or the path of one. [voc: train]")
]
LabelsOption = Annotated[
    Path | None,
    typer.Option(help="CSV, JSON or txt with each image's labels, instead of annotations."),
]
WeightsOption = Annotated[
    str, typer.Option(help="auto, openai, registry, a file, or an open_clip tag.")
]
ModelOption = Annotated[str, typer.Option(help="open_clip name of a ViT.")]
PromptsOption = Annotated[
    str | None, typer.Option(help="TOML file with classes, synonyms, background words.")
]
RunArgument = Annotated[
    Path | None, typer.Argument(help="Run folder. [default: the latest below runs/]")
]


@app.command()
def cam(
    dataset: DatasetOption,
    root: RootOption = None,
    split: SplitOption = None,
    labels: LabelsOption = None,
    preset: Annotated[PresetName, typer.Option(help="Settings.")] = PresetName.default,
    weights: WeightsOption = "auto",
    model: ModelOption = "ViT-B-16",
    text_features: Annotated[
        Path | None, typer.Option(help=".npz with class and background vectors.")
    ] = None,
    prompts: PromptsOption = None,
    box_threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="lambda of the affinity's boxes. [default: 0.4]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/DATASET]")] = None,
    shard: Annotated[str, typer.Option(help="Do only the i-th of n parts, from 0: i/n.")] = "0/1",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Images and their labels to activation maps: the only stage that needs CLIP.

    Example: clipes cam --dataset voc --root data/VOC2012 --split train
    """
    from clipes.artifacts import Run
    from clipes.config import get_preset
    from clipes.console import progress_bar, say
    from clipes.runner import Shard
    from clipes.stages.cam import CamMaker, make_cams
    from clipes.stages.features import fingerprint
    from clipes.stages.setup import load_clip, open_labelled

    part = Shard.parse(shard)
    settings = get_preset(preset.value)
    if box_threshold is not None:
        settings = settings.with_box_threshold(box_threshold)
    vocabulary, data = open_labelled(
        dataset.value, root=root, split=split, labels=labels, prompts=prompts
    )
    clip = load_clip(
        weights,
        model,
        vocabulary,
        text_features=text_features,
        fp16_positions=settings.cam.fp16_positions,
        device=device,
        say=say,
        progress=progress_bar,
    )
    run = Run(out or RUNS / dataset.value)
    run.begin(
        "cam",
        settings={
            "dataset": data.name,
            "split": split,
            "labels": str(labels) if labels else None,
            "classes": data.classes,
            "preset": settings.to_dict(),
            "weights": {"name": clip.weights.name, "sha256": clip.weights.sha256},
            "text": {"sha256": fingerprint(clip.text), "note": clip.text.note},
        },
        command=_command_line(),
        facts={"root": str(data.root.absolute()), "device": str(clip.backbone.device)},
    )
    maker = CamMaker(clip.backbone, clip.text, settings.cam)
    with progress_bar("cam") as progress:
        summary = make_cams(
            part.of(data.samples), maker, run, progress=progress, report=_say_failure
        )
    _finish("maps", run, summary, data.failures)


@app.command()
def refine(
    run: RunArgument = None,
    root: RootOption = None,
    preset: Annotated[
        PresetName | None, typer.Option(help="Settings of the CRF. [default: as in cam]")
    ] = None,
    crf: Annotated[CrfBackend, typer.Option(help="CRF implementation.")] = CrfBackend.numba,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. [default: one per core]")
    ] = None,
    shard: Annotated[str, typer.Option(help="Do only the i-th of n parts, from 0: i/n.")] = "0/1",
) -> None:
    """Maps and images to pseudo-masks and confidence maps, with a dense CRF.

    Example: clipes refine runs/voc --workers 8
    """
    from dataclasses import asdict

    from joblib import cpu_count

    from clipes.config import get_preset
    from clipes.console import progress_bar
    from clipes.runner import Shard
    from clipes.stages.refine import refine as refine_stage
    from clipes.stages.reopen import preset_of, reopen

    part = Shard.parse(shard)
    folder = _run(run)
    data = reopen(folder, root)
    settings = preset_of(folder) if preset is None else get_preset(preset.value)
    folder.begin(
        "refine",
        settings={
            "crf": asdict(settings.crf),
            "background_exponent": settings.background_exponent,
            "backend": crf.value,
        },
        command=_command_line(),
    )
    with progress_bar("refine") as progress:
        summary = refine_stage(
            part.of(data.samples),
            folder,
            settings.crf,
            background_exponent=settings.background_exponent,
            crf_backend=crf.value,
            workers=workers or cpu_count(),
            progress=progress,
            report=_say_failure,
        )
    _finish("masks", folder, summary, data.failures)


@app.command(name="eval")
def evaluate(
    target: Annotated[
        Path | None,
        typer.Argument(help="Run folder, or folder of masks. [default: the latest run]"),
    ] = None,
    gt: Annotated[
        Path | None, typer.Option(help="Folder of ground-truth masks. [default: the data set's]")
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
) -> None:
    """MIoU of every stage that has output, per class; or of any folder of masks.

    Example: clipes eval runs/voc --exponents 0.75,1,1.5 --json scores.json
    """
    from clipes.artifacts import Run
    from clipes.console import print_scores, progress_bar, say
    from clipes.files import write_json
    from clipes.stages.evaluate import evaluate_folder, evaluate_run, scores_to_json

    powers = _numbers(exponents)
    with progress_bar("eval") as progress:
        if target is None or Run(target).exists():
            folder = _run(target)
            scored = evaluate_run(folder, root, gt, powers, progress=progress, say=say)
            write_json(folder.root / "scores.json", scores_to_json(scored))
        else:
            scored = evaluate_folder(target, gt, prompts or "voc", progress=progress, say=say)
    if json_file is not None:
        write_json(json_file, scores_to_json(scored))
    print_scores(scored, per_class=per_class)


@app.command()
def report(
    run: RunArgument = None,
    root: RootOption = None,
) -> None:
    """Write one HTML page that shows images, maps, masks, confidence and scores of a run.

    Example: clipes report runs/voc
    """
    from clipes.console import progress_bar, say
    from clipes.stages.report import make_report

    with progress_bar("report") as progress:
        page = make_report(_run(run), root, progress=progress, say=say, report=_say_failure)
    typer.echo(page)


@app.command()
def demo(
    weights: WeightsOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Run folder. [default: runs/examples]")] = None,
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


@prompts_app.command("show")
def prompts_show(
    prompts: Annotated[str, typer.Argument(help="A shipped vocabulary or a TOML file.")] = "voc",
) -> None:
    """Print what CLIP reads for every class and background word.

    Example: clipes prompts show voc
    """
    from clipes.vocabulary import load_vocabulary

    vocabulary = load_vocabulary(prompts)
    names = [*vocabulary.classes, *(f"({word})" for word in vocabulary.background)]
    for name, prompt in zip(names, vocabulary.prompts(), strict=True):
        typer.echo(f"{name}\t{prompt}")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"clipes {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: exit 0 all done, 1 something failed, 2 usage, 130 interrupted."""
    try:
        app(arguments, prog_name="clipes")
    except ClipesError as error:
        typer.secho(f"clipes: {error}", fg=_colour(), err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            typer.echo("clipes: stopped; the same command continues where it was", err=True)
        raise


def _colour() -> str | None:
    return "red" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else None


def _command_line() -> str:
    return shlex.join(["clipes", *sys.argv[1:]])


def _run(path: Path | None) -> Run:
    from clipes.artifacts import Run, latest_run
    from clipes.console import say

    if path is not None:
        return Run(path)
    run = latest_run(RUNS)
    say(f"run: {run.root}")
    return run


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


def _say_failure(failure: Failure) -> None:
    from clipes.console import say

    say(f"skipping {failure.id}: {failure.reason}")


def _finish(what: str, run: Run, summary: Summary, unusable: Sequence[Failure]) -> None:
    """Print where the output is; say how the stage went; exit 1 if an image failed."""
    from clipes.console import say

    for failure in unusable:
        _say_failure(failure)
    failed = len(summary.failures) + len(unusable)
    say(f"{what}: {summary.done} made, {summary.skipped} there before, {failed} failed")
    typer.echo(run.root)
    if failed:
        raise typer.Exit(1)
