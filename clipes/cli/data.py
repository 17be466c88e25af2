"""The commands that look at a data set or complete it: check, tag, masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from clipes.choices import Fusion
from clipes.cli.options import (
    RUNS,
    DatasetOption,
    DescriptionsOption,
    DeviceOption,
    DifficultOption,
    DinoOption,
    FusionOption,
    LabelsOption,
    ModelOption,
    OutOption,
    PromptsOption,
    RootOption,
    SplitOption,
    TagThresholdOption,
    TemplateOption,
    TextFeaturesOption,
    WeightsOption,
    command_line,
    conclude,
    finish,
    listener,
    tag_settings,
)
from clipes.config import AUTO_LABELS


def check(
    dataset: DatasetOption,
    root: RootOption = None,
    split: SplitOption = None,
    labels: LabelsOption = None,
    prompts: PromptsOption = None,
    difficult: DifficultOption = True,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads. (default: one per core)")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything found as JSON, not a table.")
    ] = False,
) -> None:
    """Look through a data set before an hour is spent on it; exit 1 if anything would fail.

    Example: clipes check --dataset voc --root data/VOC2012
    """
    from clipes.cli.console import print_findings, say
    from clipes.stages.cam import DataRequest
    from clipes.stages.check import check as check_stage
    from clipes.stages.check import open_checked

    request = DataRequest(dataset.value, root, split, labels, prompts, difficult)
    findings = check_stage(open_checked(request), listener(), workers=workers)
    if as_json:
        typer.echo(json.dumps(findings.to_json(), indent=2, ensure_ascii=False))
    else:
        print_findings(findings)
    failing = {problem.id for problem in findings.problems if problem.kind.stops}
    say(
        f"check: {findings.images} images, {findings.masks} masks in {findings.root}; "
        f"{len(failing)} would fail"
    )
    if failing:
        raise typer.Exit(1)


def tag(
    dataset: DatasetOption,
    root: RootOption = None,
    split: SplitOption = None,
    weights: WeightsOption = "auto",
    model: ModelOption = "ViT-B-16",
    text_features: TextFeaturesOption = None,
    prompts: PromptsOption = None,
    fusion: FusionOption = Fusion.sentence,
    template: TemplateOption = None,
    tag_threshold: TagThresholdOption = None,
    dino: DinoOption = "auto",
    out: OutOption = None,
    device: DeviceOption = "auto",
    descriptions: DescriptionsOption = None,
) -> None:
    """Guess labels for images that have none, into a file to look through: RUN/labels.csv.

    'clipes cam --labels auto' with the same options uses them, corrected or not.

    Example: clipes tag --dataset folder --root my-photos --prompts voc
    """
    from clipes.run.folder import Run
    from clipes.stages.cam import ClipRequest, DataRequest
    from clipes.stages.tag import tag_images

    run = Run(out or RUNS / dataset.value)
    tags = tag_settings(tag_threshold)
    data = DataRequest(dataset.value, root, split, Path(AUTO_LABELS), prompts, tags=tags)
    rankings = (run.root, RUNS / dataset.value)
    clip = ClipRequest(
        weights,
        model,
        text_features,
        fusion,
        template,
        rankings,
        device,
        descriptions=descriptions,
        dino=dino,
    )
    outcome = tag_images(data, clip, run, listener(), command=command_line())
    finish("tags", run, outcome.summary, outcome.unusable)


def masks(
    root: RootOption = None,
    split: SplitOption = None,
) -> None:
    """Draw the ground-truth masks of COCO from its annotations, for eval.

    They go where the data set is, into SegmentationClass. Crowds become 255, and of overlapping
    objects the smaller lies above.

    Example: clipes masks --root data/coco --split val
    """
    from clipes.stages.coco_masks import draw_coco_masks

    folder, summary = draw_coco_masks(root, split, listener())
    conclude("masks", folder, summary, "drawn")
