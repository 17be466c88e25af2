"""The commands of the segmenter: train it, and ask it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipes.choices import Amp, Arch, Loss, SegmenterBackbone, SegmenterPresetName
from clipes.cli.options import (
    DeviceOption,
    RunArgument,
    command_line,
    finish,
    open_run,
    say_failure,
    this_part,
)
from clipes.config import CONFIDENCE_THRESHOLD, OUTPUT_STRIDES
from clipes.errors import UsageError

if TYPE_CHECKING:
    from clipes.config import SegmenterPreset
    from clipes.seg.train import Step


_SECONDS_BETWEEN_LINES = 20.0  # where a bar cannot be drawn


def train_seg(
    run: RunArgument = None,
    run_folder: Annotated[
        Path | None,
        typer.Option(
            "--run-folder", "--run", help="The same as RUN. (torchrun takes --run for its own.)"
        ),
    ] = None,
    cgl: Annotated[
        bool, typer.Option("--cgl/--no-cgl", help="Leave out pixels of low confidence.")
    ] = True,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="mu: the confidence that --cgl asks for.")
    ] = CONFIDENCE_THRESHOLD,
    loss: Annotated[
        Loss, typer.Option(help="soft: each pixel counts by its confidence.")
    ] = Loss.ce,
    resume: Annotated[
        bool, typer.Option(help="Go on from the latest checkpoint, or start over.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the output. (default: the run folder)")
    ] = None,
    preset: Annotated[
        SegmenterPresetName, typer.Option(help="Recipe. auto: clip-es-* on a GPU, small on a CPU.")
    ] = SegmenterPresetName.auto,
    arch: Annotated[Arch | None, typer.Option(help="Head. (default: the preset's)")] = None,
    backbone: Annotated[
        SegmenterBackbone | None, typer.Option(help="Backbone. (default: the preset's)")
    ] = None,
    backbone_weights: Annotated[
        str, typer.Option(help="auto (torchvision's ImageNet weights), none, or a file.")
    ] = "auto",
    output_stride: Annotated[
        int | None, typer.Option(help="8, 16 or 32. (default: the preset's)")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="List of images to learn from. (default: the run's)")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder of masks to learn. (default: the run's)")
    ] = None,
    confidence: Annotated[
        Path | None, typer.Option(help="Folder of confidence maps that goes with --masks.")
    ] = None,
    val: Annotated[
        str | None, typer.Option(help="List of images to predict at the end. (default: val)")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder of the data set. (default: as in cam)")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Updates.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per update, in all.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Parts an update's images are put through in.")
    ] = None,
    crop: Annotated[int | None, typer.Option(min=8, help="Side of the views, in pixels.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Rate of the backbone.")] = None,
    multi_scale: Annotated[
        bool | None, typer.Option(help="Train at scales 1, .75, .5 and on their maximum.")
    ] = None,
    freeze_norms: Annotated[
        bool | None, typer.Option(help="Keep the backbone's batch normalisation.")
    ] = None,
    crf: Annotated[bool | None, typer.Option(help="End predictions with the dense CRF.")] = None,
    test_scales: Annotated[
        str | None, typer.Option(help="Scales that predictions average, by comma.")
    ] = None,
    flip: Annotated[
        bool | None, typer.Option(help="Predictions average in the mirror image.")
    ] = None,
    amp: Annotated[Amp, typer.Option(help="Precision of the network.")] = Amp.auto,
    device: DeviceOption = "auto",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Loader processes. (default: 4 for a GPU, else 0)")
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Iterations between checkpoints.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and views.")] = 0,
) -> None:
    """Masks and confidence to a trained DeepLab and its predictions; torchrun -m clipes for more.

    Example: clipes train-seg runs/voc --cgl
    """
    from clipes.cli.console import progress_bar, say
    from clipes.config import TRAIN_SCALES, choose_segmenter_preset
    from clipes.run.folder import Run
    from clipes.seg.parallel import join_processes
    from clipes.seg.train import TrainOptions, choose_precision
    from clipes.stages.train_seg import Sources, TrainingListener, train_segmenter

    if run is not None and run_folder is not None and run != run_folder:
        raise UsageError(f"two run folders, {run} and --run {run_folder}", "give one")
    source = open_run(run or run_folder)
    with join_processes(device) as processes:
        dataset = source.cam_record().settings.dataset
        cuda = processes.device.type == "cuda"
        recipe = choose_segmenter_preset(preset, dataset, gpu=cuda)
        recipe = _changed(
            recipe,
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
            test_scales=test_scales and _scales(test_scales),
            flip=flip,
            train_scales=None if multi_scale is None else TRAIN_SCALES if multi_scale else (1.0,),
        )
        summary = train_segmenter(
            Sources(
                source,
                Run(out) if out else source,
                root=root,
                split=split,
                masks=masks,
                confidence=confidence,
                val=val,
                backbone_weights=backbone_weights,
            ),
            recipe,
            TrainOptions(
                seed=seed,
                threshold=threshold if cgl else None,
                loss=loss.value,
                amp=choose_precision(amp.value, processes.device),
                save_every=save_every,
                workers=(4 if cuda else 0) if workers is None else workers,
            ),
            processes,
            resume=resume,
            command=command_line(),
            listener=TrainingListener(say, say_failure, progress_bar, _step_bar)
            if processes.first
            else TrainingListener(report=say_failure),
        )
        first = processes.first
    if first:
        finish("predictions", Run(out) if out else source, summary, ())


def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that train-seg wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the masks.")],
    scales: Annotated[
        str | None, typer.Option(help="Scales to average, by comma. (default: the training's)")
    ] = None,
    flip: Annotated[
        bool | None, typer.Option(help="Average in the mirror image. (default: the training's)")
    ] = None,
    crf: Annotated[
        bool | None, typer.Option(help="End with the dense CRF. (default: the training's)")
    ] = None,
    window: Annotated[
        int, typer.Option(min=64, help="Largest side, in pixels, that is taken in at once.")
    ] = 1024,
    device: DeviceOption = "auto",
) -> None:
    """Masks of any images with a trained segmenter: OUT/<id>.png, VOC colours.

    Under torchrun or SLURM each rank takes its part.

    Example: clipes predict runs/voc/checkpoints/final.pt my-photos --out masks
    """
    from clipes.cli.console import progress_bar, say
    from clipes.config import CrfParams
    from clipes.device import choose_device
    from clipes.processes import local_rank
    from clipes.run.folder import Run
    from clipes.seg.checkpoint import load_checkpoint
    from clipes.seg.predict import Predictor, TestSettings
    from clipes.stages.predict import find_images
    from clipes.stages.predict import predict as predict_stage

    saved = load_checkpoint(checkpoint)
    settings = TestSettings(
        tuple(saved.test["scales"]) if scales is None else _scales(scales),
        saved.test["flip"] if flip is None else flip,
        window,
    )
    found = find_images(images, out)
    for remark in found.remarks:
        say(remark)
    part = this_part(None)
    mine = dict(list(found.images.items())[part.index :: part.count])
    model = saved.build().to(choose_device(device, local_rank()))
    with progress_bar("predict") as progress:
        summary = predict_stage(
            mine,
            Predictor(model, settings),
            out,
            crf=CrfParams() if (saved.test["crf"] if crf is None else crf) else None,
            progress=progress,
            report=say_failure,
        )
    finish("masks", Run(out), summary, found.failures)


def _changed(recipe: SegmenterPreset, **options: Any) -> SegmenterPreset:  # noqa: ANN401
    """Return a preset with the options that were given."""
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("output_stride", OUTPUT_STRIDES[0]) not in OUTPUT_STRIDES:
        raise UsageError(f"an output stride of {given['output_stride']}", "choose 8, 16 or 32")
    return replace(recipe, **given)


def _scales(text: str) -> tuple[float, ...]:
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"'{text}' is not a list of scales", "write 0.75,1,1.25") from error
    if not all(0.05 <= scale <= 8 for scale in scales):
        raise UsageError(f"scales {text} are not all between 0.05 and 8", "write 0.75,1,1.25")
    return scales


@contextmanager
def _step_bar() -> Iterator[Callable[[Step], None]]:
    """Yield what shows training steps: a bar with loss and rate, or a line now and then."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from clipes.cli.console import talk

    console = talk()
    if not console.is_terminal:
        yield _StepLines()
        return
    columns: list[ProgressColumn] = [
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
    ]
    columns += [TextColumn("left"), TimeRemainingColumn()]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=None, state="")
        yield lambda step: bar.update(
            task, completed=step.iteration, total=step.total, state=_state(step)
        )


class _StepLines:
    """Steps as lines for a log, at most one every ``_SECONDS_BETWEEN_LINES``."""

    def __init__(self) -> None:
        self._start = self._printed = time.monotonic()
        self._first: int | None = None

    def __call__(self, step: Step) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = step.iteration, now
        last = step.iteration == step.total
        if not last and now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        made = step.iteration - self._first
        left = (now - self._start) / made * (step.total - step.iteration) if made else 0
        ending = f", about {left:.0f} s left" if made and not last else ""
        sys.stderr.write(f"train: {step.iteration}/{step.total}, {_state(step)}{ending}\n")


def _state(step: Step) -> str:
    return f"loss {step.loss:.3f}, lr {step.lr:.2g}, {100 * step.kept:.0f} % of pixels"
