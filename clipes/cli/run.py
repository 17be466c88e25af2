"""``clipes run`` and ``demo``: every stage in a row, for people."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipes.choices import DatasetKind, PresetName
from clipes.cli import seg_options as seg
from clipes.cli.options import (
    RUNS,
    CamLabelsOption,
    CamWorkersOption,
    DatasetOption,
    DeviceOption,
    DinoOption,
    KeepLooksOption,
    OutOption,
    PresetOption,
    PromptsOption,
    RootOption,
    SplitOption,
    TextFeaturesOption,
    TileOption,
    WeightsOption,
    command_line,
    listener,
    this_part,
)
from clipes.errors import UsageError

if TYPE_CHECKING:
    from clipes.stages.run import FolderResult


def run(
    dataset: DatasetOption,
    root: RootOption = None,
    split: SplitOption = None,
    labels: CamLabelsOption = None,
    prompts: PromptsOption = None,
    preset: PresetOption = PresetName.default,
    weights: WeightsOption = "auto",
    dino: DinoOption = "auto",
    text_features: TextFeaturesOption = None,
    out: OutOption = None,
    device: DeviceOption = "auto",
    workers: CamWorkersOption = None,
    train: Annotated[bool, typer.Option("--train", help="Train a segmenter, too.")] = False,
    iterations: seg.IterationsOption = None,
    resume: seg.ResumeOption = True,
    predict_on: Annotated[
        Path | None,
        typer.Option(help="With --train: folder of more photos, without labels, to mask."),
    ] = None,
    keep_looks: KeepLooksOption = False,
    tile: TileOption = None,
) -> None:
    """Labelled photos to masks and a page to look at: cam, refine, report, in one go.

    Where there is ground truth, all is scored. With --train, train-seg and predict come before.
    Every stage by itself has more options, works in the same run folder, and goes on from there.

    Example: clipes run --dataset folder --root my-photos
    """
    from clipes.cli.console import print_scores
    from clipes.config import get_preset, kind_of
    from clipes.run.folder import Run
    from clipes.stages.cam import CamRequest, ClipRequest, DataRequest
    from clipes.stages.run import RunRequest, make_run

    if this_part(None).count > 1:
        raise UsageError(
            "'clipes run' is one process, and this is one of several",
            "start the stages one by one: cam, refine, report",
        )
    kind = dataset.value
    maps = CamRequest(
        DataRequest(kind, root, split, labels, prompts),
        ClipRequest(weights, text_features=text_features, device=device, dino=dino),
        get_preset(preset.value).for_dataset(kind_of(kind, prompts)),
        keep_looks,
        command=command_line(),
        tile=tile,
    )
    request = RunRequest(maps, workers, train, iterations, resume, predict_on)
    result = make_run(request, Run(out or RUNS / kind), listener())
    if result.scored is not None:
        print_scores(result.scored, per_class=True)
    _show_the_way(result)
    if result.failures:
        raise typer.Exit(1)


def demo(
    weights: WeightsOption = "auto",
    out: Annotated[Path | None, typer.Option(help="Run folder. (default: runs/examples)")] = None,
) -> None:
    """Run the stages on the bundled examples, print mIoU and write a report to look at.

    Example: clipes demo
    """
    run(DatasetKind.examples, weights=weights, out=out)


def _show_the_way(result: FolderResult) -> None:
    """Print what to open next, a line each."""
    folder = os.fspath(result.run.root)
    command = ["clipes", "export", folder, "--format", "coco"]
    if result.segmenter is not None:
        checkpoint = os.fspath(result.segmenter)
        command = ["clipes", "predict", checkpoint, "MORE-PHOTOS", "--out", "masks"]
    typer.echo(f"report: {result.report}")
    typer.echo(f"masks:  {result.run.root / 'pseudo'}")
    if result.predicted is not None:
        typer.echo(f"more:   {result.predicted}")
    typer.echo(f"next:   {shlex.join(command)}")
