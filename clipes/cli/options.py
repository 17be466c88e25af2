"""Options and small talk that several commands share."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipes.choices import DatasetKind, Descriptions, Fusion, PresetName
from clipes.config import SMALLEST_TILE, TagParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clipes.listener import Listener
    from clipes.run.folder import Run
    from clipes.run.loop import Shard, Summary
    from clipes.types import Failure

RUNS = Path("runs")
"""Where run folders go by default: ``runs/<dataset>``."""


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Return what a shell offers where these values are usual, but others are possible."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


DatasetOption = Annotated[DatasetKind, typer.Option("--dataset", "-d", help="Kind of data set.")]
RootOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the data set. (default: $CLIPES_DATA, else datasets/)"),
]
SplitOption = Annotated[
    str | None,
    typer.Option(help="Name of a list of images, or the path of one. (voc, coco: train)"),
]
LabelsOption = Annotated[
    Path | None,
    typer.Option(
        help="CSV, JSON (COCO's too), txt, npz or npy with each image's labels, instead of "
        "annotations."
    ),
]
CamLabelsOption = Annotated[
    Path | None,
    typer.Option(
        help="CSV, JSON (COCO's too), txt, npz or npy with each image's labels, instead of "
        "annotations; auto guesses them, see 'clipes tag'."
    ),
]
PresetOption = Annotated[PresetName, typer.Option(help="Settings.")]
CamWorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Images, or batches, at once. (default: one per core, for a GPU up to 16)"
    ),
]
DifficultOption = Annotated[
    bool,
    typer.Option("--difficult/--no-difficult", help="Whether VOC's difficult objects count."),
]
TagThresholdOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help=f"Probability from which a class is a tag. (default: {TagParams().threshold})",
    ),
]
WeightsOption = Annotated[
    str,
    typer.Option(
        help="auto, openai, registry, a file, or an open_clip tag.",
        autocompletion=one_of("auto", "openai", "registry"),
    ),
]
DinoOption = Annotated[
    str,
    typer.Option(
        help="Weights of the second tower: auto, official, registry or a file.",
        autocompletion=one_of("auto", "official", "registry"),
    ),
]
ModelOption = Annotated[str, typer.Option(help="open_clip name of a ViT.")]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        help="TOML file with classes, synonyms, background words.",
        autocompletion=one_of(DatasetKind.voc, DatasetKind.coco),
    ),
]
FusionOption = Annotated[
    Fusion,
    typer.Option(help="Where synonyms become one: prompt, vector, or map (mean or maximum)."),
]
DescriptionsOption = Annotated[
    Descriptions | None,
    typer.Option(
        help="Also read the vocabulary's descriptions: mean of the vectors, or largest score. "
        "(default: names alone)"
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        help="Sentence with {}, a file of them to average, or best (of 'clipes prompts rank'). "
        "(default: the vocabulary's)"
    ),
]
RunArgument = Annotated[
    Path | None,
    typer.Argument(help="Run folder. (default: the one below runs/ last worked in)"),
]


DeviceOption = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda, cuda:1, ...", autocompletion=one_of("auto", "cpu", "cuda")),
]
TextFeaturesOption = Annotated[
    Path | None, typer.Option(help=".npz with class and background vectors.")
]
OutOption = Annotated[Path | None, typer.Option(help="Run folder. (default: runs/DATASET)")]
ShardOption = Annotated[
    str | None,
    typer.Option(
        help="Do only the i-th of n parts, from 0: i/n. (default: torchrun's or SLURM's rank, "
        "else everything)"
    ),
]

KeepLooksOption = Annotated[
    bool,
    typer.Option(
        help="When labels or pictures changed, make only their maps again: keep what the classes "
        "look like, and vectors that were fitted, as they were learnt before."
    ),
]

TileOption = Annotated[
    int | None,
    typer.Option(
        min=SMALLEST_TILE,
        help="Work on larger pictures in tiles of so many pixels a side. (default: only beyond 120 "
        "megapixels)",
    ),
]
UseCorrectedOption = Annotated[
    bool,
    typer.Option(
        "--use-corrected/--no-use-corrected", help="Masks of 'clipes import' before the run's."
    ),
]


def this_part(shard: str | None) -> Shard:
    """Return the part of the images that this process does."""
    from clipes.run.loop import Shard

    return Shard.from_environment(os.environ) if shard is None else Shard.parse(shard)


def command_line() -> str:
    """Return the command as it was typed, for run.json."""
    return shlex.join(["clipes", *sys.argv[1:]])


def say_failure(failure: Failure) -> None:
    """Say in one line which image is skipped, and why."""
    from clipes.cli.console import say

    say(f"skipping {failure.id}: {failure.reason}")


def tag_settings(threshold: float | None) -> TagParams:
    """Return the settings of zero-shot tags."""
    return TagParams() if threshold is None else TagParams(threshold)


def listener() -> Listener:
    """Return who follows a stage: the person at the terminal."""
    from clipes.cli.console import progress_bar, say
    from clipes.listener import Listener

    return Listener(say, say_failure, progress_bar)


def open_run(path: Path | None) -> Run:
    """Return the run folder asked for, or the latest below ``runs/``."""
    from clipes.cli.console import say
    from clipes.run.folder import Run, latest_run

    if path is not None:
        return Run(path)
    run = latest_run(RUNS)
    say(f"run: {run.root}")
    return run


def finish(what: str, run: Run, summary: Summary, unusable: Sequence[Failure]) -> None:
    """Print where the output is; say how the stage went; exit 1 if an image failed."""
    from clipes.cli.console import say

    for failure in unusable:
        say_failure(failure)
    for remark in summary.told():
        say(remark)
    conclude(what, run.root, summary, "made", len(unusable))


def conclude(what: str, folder: Path, summary: Summary, verb: str, unusable: int = 0) -> None:
    """As ``finish``, for output that is no run, and where it was said what failed."""
    from clipes.cli.console import say

    say(f"{what}: {summary.counts(verb, unusable)}")
    typer.echo(folder)
    if summary.failures or unusable:
        raise typer.Exit(1)
