"""The commands of the segmenter: train it, and ask it."""

from __future__ import annotations

import math

from clipes.choices import Amp, Loss, SegmenterPresetName
from clipes.cli import seg_options as opts
from clipes.cli.options import (
    DeviceOption,
    DinoOption,
    RootOption,
    RunArgument,
    ShardOption,
    TileOption,
    UseCorrectedOption,
    WeightsOption,
    command_line,
    finish,
    listener,
    open_run,
    say_failure,
    this_part,
)
from clipes.cli.steps import step_bar
from clipes.config import CONFIDENCE_THRESHOLD, RELABEL_SHARE, TOKEN_SPACE
from clipes.errors import UsageError


def train_seg(
    run: RunArgument = None,
    run_folder: opts.RunFolderOption = None,
    cgl: opts.CglOption = True,
    threshold: opts.ThresholdOption = CONFIDENCE_THRESHOLD,
    loss: opts.LossOption = Loss.ce,
    resume: opts.ResumeOption = True,
    out: opts.OutOption = None,
    preset: opts.PresetOption = SegmenterPresetName.auto,
    arch: opts.ArchOption = None,
    backbone: opts.BackboneOption = None,
    backbone_weights: opts.BackboneWeightsOption = "auto",
    output_stride: opts.OutputStrideOption = None,
    split: opts.SplitOption = None,
    masks: opts.MasksOption = None,
    confidence: opts.ConfidenceOption = None,
    relabelled: opts.RelabelledOption = False,
    use_corrected: UseCorrectedOption = True,
    val: opts.ValOption = None,
    root: opts.RootOption = None,
    iterations: opts.IterationsOption = None,
    batch: opts.BatchOption = None,
    accumulate: opts.AccumulateOption = None,
    crop: opts.CropOption = None,
    lr: opts.LrOption = None,
    even_classes: opts.EvenClassesOption = None,
    multi_scale: opts.MultiScaleOption = None,
    freeze_norms: opts.FreezeNormsOption = None,
    crf: opts.CrfOption = None,
    test_scales: opts.TestScalesOption = None,
    flip: opts.FlipOption = None,
    weights: WeightsOption = "auto",
    dino: DinoOption = "auto",
    token_space: opts.TokenSpaceOption = TOKEN_SPACE / 1e9,
    amp: opts.AmpOption = Amp.auto,
    device: DeviceOption = "auto",
    workers: opts.LoadersOption = None,
    save_every: opts.SaveEveryOption = None,
    seed: opts.SeedOption = 0,
) -> None:
    """Masks and confidence to a trained segmenter and its predictions; torchrun -m clipes for more.

    Example: clipes train-seg runs/voc --cgl
    """
    from clipes.cli.console import progress_bar, say
    from clipes.run.folder import Run
    from clipes.seg.loss import Guidance
    from clipes.seg.train import TrainOptions
    from clipes.stages.token_source import TowerRequest
    from clipes.stages.train_request import Changes, Sources, TrainRequest
    from clipes.stages.train_seg import TrainingListener, train_segmenter

    if run is not None and run_folder is not None and run != run_folder:
        raise UsageError(f"two run folders, {run} and --run {run_folder}", "give one")
    source = open_run(run or run_folder)
    target = Run(out) if out else source
    request = TrainRequest(
        Sources(
            source,
            target,
            root,
            split,
            masks,
            confidence,
            relabelled,
            val,
            backbone_weights,
            use_corrected,
        ),
        preset.value,
        Changes(
            arch=arch and arch.value,
            backbone=backbone and backbone.value,
            output_stride=output_stride,
            iterations=iterations,
            batch=batch,
            accumulate=accumulate,
            crop=crop,
            lr=lr,
            freeze_norms=freeze_norms,
            crf=crf,
            test_scales=_scales(test_scales),
            flip=flip,
            multi_scale=multi_scale,
            even_classes=even_classes,
        ),
        Guidance(threshold if cgl else None, loss is Loss.soft),
        TrainOptions(seed, amp.value, save_every, workers=workers),
        TowerRequest(weights, dino),
        _bytes(token_space),
        device,
        resume,
        command_line(),
    )
    told = TrainingListener(say, say_failure, progress_bar, step_bar)
    summary = train_segmenter(request, told)
    if summary is not None:  # else it is the first process that says how all went
        finish("predictions", target, summary, ())


def predict(
    checkpoint: opts.CheckpointArgument,
    images: opts.ImagesArgument,
    out: opts.MasksOutOption,
    scales: opts.ScalesOption = None,
    flip: opts.MirrorOption = None,
    crf: opts.EndWithCrfOption = None,
    window: opts.WindowOption = 1024,
    weights: WeightsOption = "auto",
    dino: DinoOption = "auto",
    device: DeviceOption = "auto",
    tile: TileOption = None,
    shard: ShardOption = None,
) -> None:
    """Masks of any images with a trained segmenter: OUT/<id>.png, VOC colours.

    Masks that it made before stay, files that are none are never written over.

    Example: clipes predict runs/voc/checkpoints/final.pt my-photos --out masks
    """
    from clipes.run.folder import Run
    from clipes.stages.predict import PredictRequest
    from clipes.stages.predict import predict as predict_stage
    from clipes.stages.token_source import TowerRequest

    way = _scales(scales), flip, crf, window
    towers = TowerRequest(weights, dino)
    request = PredictRequest(checkpoint, images, out, *way, device, towers, tile=tile)
    outcome = predict_stage(request, this_part(shard), listener())
    finish("masks", Run(out), outcome.summary, outcome.unusable)


def relabel(
    checkpoint: opts.FromOption,
    run: RunArgument = None,
    root: RootOption = None,
    scales: opts.ScalesOption = None,
    flip: opts.MirrorOption = None,
    crf: opts.LabelCrfOption = True,
    share: opts.ShareOption = RELABEL_SHARE,
    weights: WeightsOption = "auto",
    dino: DinoOption = "auto",
    device: DeviceOption = "auto",
    workers: opts.LabelWorkersOption = None,
    shard: ShardOption = None,
) -> None:
    """A trained segmenter labels the run's images again: RUN/relabelled/pseudo and confidence.

    Classes that an image does not have are left out, and maps of the run have a share in what is
    said of the others (--share). The masks of refine stay as they are;
    'train-seg --relabelled' learns from the new ones, eval and report score both.

    Example: clipes relabel runs/voc --from runs/voc/checkpoints/final.pt
    """
    from clipes.stages.relabel import RelabelRequest
    from clipes.stages.relabel import relabel as relabel_stage
    from clipes.stages.token_source import TowerRequest

    folder = open_run(run)
    request = RelabelRequest(
        checkpoint,
        root,
        _scales(scales),
        flip,
        crf,
        share,
        device,
        TowerRequest(weights, dino),
        command_line(),
        workers,
    )
    outcome = relabel_stage(request, folder, this_part(shard), listener())
    finish("masks", folder.relabelled, outcome.summary, outcome.unusable)


def _bytes(gigabytes: float) -> int:
    if not math.isfinite(gigabytes):
        raise UsageError(f"--token-space {gigabytes} is no number of GB", "give one, such as 1000")
    return int(gigabytes * 1e9)


def _scales(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"'{text}' is not a list of scales", "write 0.75,1,1.25") from error
    if not all(0.05 <= scale <= 8 for scale in scales):
        raise UsageError(f"scales {text} are not all between 0.05 and 8", "write 0.75,1,1.25")
    return scales
