"""``clipes cam`` and ``refine``: from images and labels to masks."""

from __future__ import annotations

from typing import Annotated

import typer

from clipes.choices import (
    CrfBackend,
    Fusion,
    Precision,
    PresetName,
    RefineBackend,
)
from clipes.cli.options import (
    RUNS,
    CamLabelsOption,
    CamWorkersOption,
    DatasetOption,
    DescriptionsOption,
    DeviceOption,
    DifficultOption,
    DinoOption,
    FusionOption,
    KeepLooksOption,
    ModelOption,
    OutOption,
    PresetOption,
    PromptsOption,
    RootOption,
    RunArgument,
    ShardOption,
    SplitOption,
    TagThresholdOption,
    TemplateOption,
    TextFeaturesOption,
    TileOption,
    WeightsOption,
    command_line,
    finish,
    listener,
    open_run,
    tag_settings,
    this_part,
)
from clipes.config import BOX_THRESHOLDS, CamParams

_LAMBDAS = "; ".join(
    [f"{CamParams().box_threshold}", *(f"{kind}: {own}" for kind, own in BOX_THRESHOLDS.items())]
)


_Lambda = Annotated[
    float | None,
    typer.Option(min=0, max=1, help=f"lambda of the affinity's boxes. (default: {_LAMBDAS})"),
]
_Batch = Annotated[
    int | None, typer.Option(min=1, help="Images given to CLIP together. (default: 1; GPU: 32)")
]
_Precision = Annotated[
    Precision,
    typer.Option(help="Of CLIP's matrix products; auto: bf16 where that is faster, else fp32."),
]
_LearnCorrected = Annotated[
    bool,
    typer.Option(
        "--use-corrected/--no-use-corrected",
        help="Learn what classes look like from masks of 'clipes import', where there are some.",
    ),
]
_Fit = Annotated[
    bool,
    typer.Option(
        help="Without a text tower, fit vectors of classes that none is known of to these images "
        "and their labels, or stop."
    ),
]


def cam(
    dataset: DatasetOption,
    root: RootOption = None,
    split: SplitOption = None,
    labels: CamLabelsOption = None,
    difficult: DifficultOption = True,
    tag_threshold: TagThresholdOption = None,
    preset: PresetOption = PresetName.default,
    weights: WeightsOption = "auto",
    model: ModelOption = "ViT-B-16",
    text_features: TextFeaturesOption = None,
    prompts: PromptsOption = None,
    fusion: FusionOption = Fusion.sentence,
    template: TemplateOption = None,
    box_threshold: _Lambda = None,
    out: OutOption = None,
    shard: ShardOption = None,
    device: DeviceOption = "auto",
    workers: CamWorkersOption = None,
    batch: _Batch = None,
    precision: _Precision = Precision.fp32,
    dino: DinoOption = "auto",
    keep_looks: KeepLooksOption = False,
    fit: _Fit = True,
    tile: TileOption = None,
    use_corrected: _LearnCorrected = True,
    descriptions: DescriptionsOption = None,
) -> None:
    """Images and their labels to activation maps: the only stage that needs CLIP.

    Example: clipes cam --dataset voc --root data/VOC2012 --split train
    """
    from clipes.config import get_preset, kind_of
    from clipes.run.folder import Run
    from clipes.stages.cam import CamRequest, ClipRequest, DataRequest, Resources
    from clipes.stages.cam import cam as cam_stage

    kind, tags = dataset.value, tag_settings(tag_threshold)
    run = Run(out or RUNS / kind)
    rankings = (run.root, RUNS / kind)
    request = CamRequest(
        DataRequest(kind, root, split, labels, prompts, difficult, tags),
        ClipRequest(
            weights,
            model,
            text_features,
            fusion,
            template,
            rankings,
            device,
            precision.value,
            dino,
            fit,
            descriptions,
        ),
        get_preset(preset.value).for_dataset(kind_of(kind, prompts), box_threshold),
        keep_looks,
        command_line(),
        tile,
        use_corrected,
    )
    outcome = cam_stage(request, run, Resources(this_part(shard), workers, batch), listener())
    finish("maps", run, outcome.summary, outcome.unusable)


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
    tile: TileOption = None,
) -> None:
    """Maps and images to pseudo-masks and confidence maps, with a dense CRF.

    Example: clipes refine runs/voc --workers 8
    """
    from clipes.stages.refine import RefineRequest, RefineResources
    from clipes.stages.refine import refine as refine_stage

    folder = open_run(run)
    request = RefineRequest(root, preset and preset.value, crf.value, command_line(), tile)
    how = RefineResources(this_part(shard), workers, backend.value)
    outcome = refine_stage(request, folder, how, listener())
    finish("masks", folder, outcome.summary, outcome.unusable)
