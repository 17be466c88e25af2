"""Stage 3: pseudo-masks and confidence to a trained segmenter and its predictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clipes.config import CrfParams, SegmenterPreset
from clipes.datasets import Dataset
from clipes.disk.files import list_files, sha256_of, write_json
from clipes.errors import ArtifactError, DatasetError, RunConflictError
from clipes.listener import Listener, ignore
from clipes.masks.folder import find_masks, require_some
from clipes.masks.values import RULE, value_count
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.loop import Shard, Summary
from clipes.run.origin import digest
from clipes.run.record import TrainFacts, TrainSettings
from clipes.run.reopen import left_out, orphans, reopen
from clipes.seg.checkpoint import FINAL, Checkpoint, fill_model, load_checkpoint, saved_iterations
from clipes.seg.data import (
    Tally,
    TrainingPair,
    TrainingSet,
    check_pairs,
    loader_death_as_error,
)
from clipes.seg.deeplab import ModelSpec, Segmenter
from clipes.seg.log import TensorBoard
from clipes.seg.parallel import Processes
from clipes.seg.predict import Predictor, TestSettings
from clipes.seg.train import Step, Trainer, TrainingError, TrainOptions, part_size
from clipes.seg.weights import load_backbone
from clipes.stages.predict import is_done, predict
from clipes.types import Progress

STAGE = "train-seg"

_LEAST_USED, _LEAST_OF_ALL = 0.05, 0.001
"""Shares of the labelled pixels, and of all; with less, the result is an untrained network's."""

_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Sources:
    """What a training learns from.

    Attributes:
        run: The run folder with the pseudo-masks.
        out: Folder for checkpoints and predictions; the run folder itself, or another one.
        root: Where the data set is, if not where run.json says.
        split: Name or path of the list of images to learn from, if not the run's.
        masks: Folder of masks ``<id>.png`` to learn instead of the run's.
        confidence: Folder of confidence maps that goes with ``masks``.
        val: Name or path of the list of images to predict at the end; None looks for ``val``.
        backbone_weights: ``auto``, ``none`` or a file.
    """

    run: Run
    out: Run
    root: Path | None = None
    split: str | None = None
    masks: Path | None = None
    confidence: Path | None = None
    val: str | None = None
    backbone_weights: str = "auto"


@contextmanager
def no_steps() -> Iterator[Callable[[Step], None]]:
    """Follow no training step."""
    yield ignore


@dataclass(frozen=True)
class TrainingListener(Listener):
    """Who is told how a training goes.

    Attributes:
        steps: Opens a progress bar of training steps.
    """

    steps: Callable[[], AbstractContextManager[Callable[[Step], None]]] = no_steps


@dataclass(frozen=True)
class _Job:
    """A training, with everything that is known before a model is made.

    Attributes:
        sources: Where it learns from, and where its output goes.
        preset: Model and recipe.
        options: Seed, loss, precision and so on.
        processes: Who trains together.
        classes: Class names in mask order.
        pairs: What is learnt from.
        val: The images to predict at the end.
        settings: For run.json: what changes the output.
        learnt_from: Digest of the files of ``pairs``.
        listener: Who is told how it goes.
    """

    sources: Sources
    preset: SegmenterPreset
    options: TrainOptions
    processes: Processes
    classes: tuple[str, ...]
    pairs: Sequence[TrainingPair]
    val: Dataset
    settings: TrainSettings
    learnt_from: str
    listener: TrainingListener

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return self.sources.out.root / "checkpoints"

    @property
    def final(self) -> Path:
        """The file of the finished training."""
        return self.folder / FINAL


def train_segmenter(
    sources: Sources,
    preset: SegmenterPreset,
    options: TrainOptions,
    processes: Processes,
    *,
    resume: bool,
    command: str,
    listener: TrainingListener,
) -> Summary:
    """Train a segmenter on a run's masks and predict the validation images.

    Args:
        sources: What it learns from, and where its output goes.
        preset: Model and recipe.
        options: Seed, loss, precision and so on.
        processes: Who trains together.
        resume: Go on from the latest checkpoint, if there is one; else start over.
        command: The command line, for run.json.
        listener: Who is told how it goes.

    Returns:
        How the predictions of all processes went.

    Raises:
        ArtifactError: Masks or confidence maps are missing or do not fit, a checkpoint is of
            another model, or the disk is full.
        RunConflictError: The folder was trained with other settings, or on other examples.
        TrainingError: The loss is not finite, or there is next to nothing to learn from.
        UsageError: The batch cannot be divided among the processes.
    """
    job = _prepare(sources, preset, options, processes, listener)
    saved = saved_iterations(job.folder)
    fresh = not resume or not (saved or job.final.exists())
    if not fresh:
        _check_same_training(sources.out, job.settings, job.learnt_from)
    if fresh or not job.final.exists():
        _check_examples(job.pairs, job.classes, options, listener)
    if not fresh and job.final.exists() and not _unpredicted(job):
        listener.say(f"trained before: {job.final}")
        return Summary(0, len(job.val.samples), ())  # a finished run may be read-only
    torch.manual_seed(options.seed)
    spec = ModelSpec(preset.arch, preset.backbone, preset.output_stride, job.classes)
    model = Segmenter(spec).to(processes.device)
    freeze = preset.freeze_norms
    if fresh:
        wanted = sources.backbone_weights
        origin = load_backbone(model.backbone, preset.backbone, wanted, say=listener.say)
        freeze = preset.freeze_norms and origin != "none"  # nothing to keep in random weights
    with sources.out.claim(STAGE, shared=processes.count > 1):
        _begin(job, command, fresh=fresh)
        if not fresh and job.final.exists():
            listener.say(f"trained before: {job.final}")
        else:
            _fit(job, model, None if fresh else load_checkpoint(saved[-1]), freeze=freeze)
        fill_model(model, load_checkpoint(job.final))
        return _predict(job, model)


def _prepare(
    sources: Sources,
    preset: SegmenterPreset,
    options: TrainOptions,
    processes: Processes,
    listener: TrainingListener,
) -> _Job:
    """Find what is learnt from and what is predicted; errors as for ``train_segmenter``."""
    _check_target(sources)
    part_size(preset, processes.count)
    data = reopen(sources.run, sources.root, sources.split)
    guided = options.threshold is not None or options.loss == "soft"
    pairs = training_pairs(sources, data, guided=guided, say=listener.say)
    val_name, val = _validation(sources, data, listener.say)
    settings = TrainSettings(
        preset,
        seed=options.seed,
        threshold=options.threshold,
        loss=options.loss,
        amp=options.amp,
        masks=str(sources.masks.absolute()) if sources.masks else None,
        confidence=str(sources.confidence.absolute()) if sources.confidence else None,
        split=sources.split,
        examples=len(pairs),
        backbone_weights=sources.backbone_weights,
        val=val_name,
    )
    with listener.progress("look") as progress:
        learnt_from = pairs_digest(pairs, progress)
    return _Job(
        sources,
        preset,
        options,
        processes,
        data.classes,
        pairs,
        val,
        settings,
        learnt_from,
        listener,
    )


def _begin(job: _Job, command: str, *, fresh: bool) -> None:
    """Record the training, once every process has seen what is there."""
    processes = job.processes
    processes.wait()
    if processes.first:
        if fresh:
            _forget(job.sources)
        facts = TrainFacts(processes.count, str(processes.device), job.learnt_from)
        job.sources.out.begin(STAGE, job.settings.to_dict(), command, facts.to_dict())
    processes.wait()


def _fit(job: _Job, model: Segmenter, latest: Checkpoint | None, *, freeze: bool) -> None:
    """Train from the start, or on from a checkpoint.

    Args:
        job: The training.
        model: The segmenter.
        latest: Where to go on; None for the start.
        freeze: Whether the backbone's normalisation stays, at the start; a checkpoint knows.
    """
    if latest is not None:
        freeze = bool(latest.training.get("freeze_norms"))
    preset = replace(job.preset, freeze_norms=freeze)
    trainer = Trainer(model, preset, job.options, job.processes)
    if latest is not None:
        trainer.restore(latest)
        job.listener.say(f"going on after iteration {trainer.iteration}: {latest.path}")
    labels = value_count(len(job.classes))
    stream = TrainingSet(job.pairs, labels, job.preset, job.options.seed)
    _train(trainer, stream, job.sources.out, job.listener, log=job.processes.first)


def _made_with(job: _Job) -> str:
    """Return the digest of the segmenter, and of how it is asked."""
    preset = job.preset
    return digest([sha256_of(job.final), preset.test_scales, preset.flip, preset.crf])


def _unpredicted(job: _Job) -> bool:
    """Tell whether an image to predict has no prediction of the finished segmenter."""
    folder, made_with = job.sources.out.root / "predictions", _made_with(job)
    return any(
        not is_done(folder / f"{sample.id}.png", sample.image, made_with)
        for sample in job.val.samples
    )


def _predict(job: _Job, model: Segmenter) -> Summary:
    """Predict this process' share of the validation images; return how all shares went."""
    preset, processes, listener = job.preset, job.processes, job.listener
    predictor = Predictor(model, TestSettings(preset.test_scales, preset.flip))
    mine = Shard(processes.rank, processes.count).of(job.val.samples)
    with listener.progress("predict") as progress:
        mine_done = predict(
            {sample.id: sample.image for sample in mine},
            predictor,
            job.sources.out.root / "predictions",
            crf=CrfParams() if preset.crf else None,
            made_with=_made_with(job),
            progress=progress,
            report=listener.report,
        )
    summaries = processes.gather(mine_done)
    return Summary(
        sum(summary.done for summary in summaries),
        sum(summary.skipped for summary in summaries),
        tuple(failure for summary in summaries for failure in summary.failures),
        sum((Counter(summary.remarks) for summary in summaries), Counter()),
    )


def training_pairs(
    sources: Sources, data: Dataset, *, guided: bool, say: Callable[[str], None]
) -> list[TrainingPair]:
    """Return the images that have a mask, with the confidence map where it is needed.

    Args:
        sources: Where masks and confidence maps are.
        data: The images.
        guided: Whether the loss uses confidence.
        say: Told how many images have no mask.

    Raises:
        ArtifactError: No image has a mask, one with a mask has no confidence map, or a folder that
            was named is absent.
    """
    run = sources.run
    masks = sources.masks or run.root / "pseudo"
    maps = sources.confidence if sources.masks else sources.confidence or run.root / "confidence"
    if guided and maps is None:
        raise ArtifactError(
            f"the masks of {masks} come without confidence",
            "give --confidence DIR, or train with --no-cgl",
        )
    given = None if sources.masks is None else find_masks(sources.masks, "--masks")
    if guided and sources.confidence is not None:
        find_masks(sources.confidence, "--confidence")
    _say_left_out(sources, data, say)
    current = None if sources.masks else Freshness.of(run, data.classes)
    pairs, stale, missing = [], [], []
    for sample in data.samples:
        mask = masks / f"{sample.id}.png" if given is None else given.get(sample.id)
        if mask is None or not mask.is_file():
            missing.append(sample.id)
            continue
        if current is not None and (reason := current.unusable(sample)):
            stale.append(f"{sample.id}: {reason}")
            continue
        confidence = maps / f"{sample.id}.png" if guided and maps else None
        if confidence is not None and not confidence.is_file():
            raise ArtifactError(
                f"{sample.id} has a mask but no confidence map {confidence}",
                "make both with 'clipes refine', or train with --no-cgl",
            )
        pairs.append(TrainingPair(sample.id, sample.image, mask, confidence))
    if stale:
        say(f"left out: {len(stale)} images, the first is {stale[0]}")
    if not pairs:
        if given is not None and data.samples:
            ids = {sample.id for sample in data.samples}
            require_some(masks, ids, f"an image of {run.root}", data.samples[0].id)
        raise ArtifactError(
            f"no image of {run.root} has a mask in {masks} that is up to date",
            "run 'clipes refine' first, or name another folder with --masks",
        )
    if missing:
        count = f"{len(missing)} of {len(data.samples)} images"
        say(f"{count} have no mask, the first is {missing[0]}")
    return pairs


def _say_left_out(sources: Sources, data: Dataset, say: Callable[[str], None]) -> None:
    """Say which images cannot be learnt from, and which masks of the run belong to none."""
    if remark := left_out(data):
        say(remark)
    # Another list, or other masks, are meant not to be all of the run's.
    own = sources.split is None and sources.masks is None
    if own and (remark := orphans(sources.run, data, "pseudo")):
        say(remark)


def pairs_digest(pairs: Sequence[TrainingPair], progress: Progress) -> str:
    """Return the digest of all files that are learnt from.

    Raises:
        ArtifactError: One cannot be read.
    """
    found = []
    for index, pair in enumerate(pairs):
        files = [pair.image, pair.mask, *([pair.confidence] if pair.confidence else [])]
        try:
            found.append([pair.id, *(sha256_of(file) for file in files)])
        except OSError as error:
            raise ArtifactError(f"cannot read {pair.id}: {error}", "check the file") from error
        progress(index + 1, len(pairs))
    return digest(found)


def _check_same_training(out: Run, settings: TrainSettings, learnt_from: str) -> None:
    """Refuse to go on with other settings, or with examples that are no longer what they were."""
    record = out.train_record() if out.exists() else None
    if record is None or not record.facts.learnt_from:
        return  # of an older clipes: ``begin`` compares the settings and the number of examples
    same_number = replace(settings, examples=record.settings.examples)
    out.check_settings(STAGE, same_number.to_dict())
    if record.facts.learnt_from != learnt_from:
        raise RunConflictError(
            f"pictures, masks or confidence maps that {out.root / 'checkpoints'} learnt from have "
            "changed since",
            "train anew with --no-resume, or into another folder (--out)",
        )


def _check_examples(
    pairs: Sequence[TrainingPair],
    classes: Sequence[str],
    options: TrainOptions,
    listener: TrainingListener,
) -> None:
    with listener.progress("check") as progress:
        tally = check_pairs(
            pairs,
            value_count(len(classes)),
            progress,
            threshold=options.threshold,
            soft=options.loss == "soft",
        )
    check_enough(tally, classes, options.threshold, say=listener.say)


def check_enough(
    tally: Tally, classes: Sequence[str], threshold: float | None, *, say: Callable[[str], None]
) -> None:
    """Refuse to train on next to nothing.

    Args:
        tally: The pixels there are.
        classes: Class names in mask order.
        threshold: Confidence that a pixel needs to count; None: none.
        say: Told what will not be learnt.

    Raises:
        TrainingError: No pixel has a label, or hardly one of those that do counts.
    """
    if not tally.labelled:
        raise TrainingError(
            f"nothing to learn from: 0 % of {tally.pixels} pixels have a label, all masks are 255",
            RULE,
        )
    used = int(tally.used.sum())
    if used <= _LEAST_USED * tally.labelled or used <= _LEAST_OF_ALL * tally.pixels:
        sure = "" if threshold is None else f" with a confidence of {threshold:g} or more"
        raise TrainingError(
            f"next to nothing to learn from: {100 * used / tally.labelled:.2g} % of the labelled "
            f"pixels ({used} of {tally.labelled}) count{sure}",
            "lower --threshold, train with --no-cgl, or give other confidence maps",
        )
    absent = [name for name, count in zip(classes, tally.used[1:], strict=True) if not count]
    if len(absent) == len(classes):
        say(
            f"only background is left to learn from ({used} of {tally.labelled} labelled pixels "
            "count): every prediction will be background"
        )
    elif absent:
        names = ", ".join(absent[:_NAMES_SHOWN]) + (", ..." if len(absent) > _NAMES_SHOWN else "")
        say(f"no pixel to learn {len(absent)} of {len(classes)} classes from: {names}")


def _train(
    trainer: Trainer, stream: TrainingSet, out: Run, listener: TrainingListener, *, log: bool
) -> None:
    board = TensorBoard(out.root / "tensorboard", listener.say) if log else None
    with listener.steps() as show:

        def on_step(step: Step) -> None:
            show(step)
            if board is not None:
                board.write(step)

        with loader_death_as_error():
            trainer.run(stream, out.root / "checkpoints", on_step)
    if board is not None:
        board.close()


def _validation(
    sources: Sources, data: Dataset, say: Callable[[str], None]
) -> tuple[str | None, Dataset]:
    """Return the images to predict, and the name of their list; None for those trained on."""
    if sources.val is not None:
        return sources.val, reopen(sources.run, sources.root, sources.val)
    try:
        return "val", reopen(sources.run, sources.root, "val")
    except DatasetError:
        say(
            "no list of validation images 'val' (--val names another): predicting those learnt from"
        )
        return None, data


def _check_target(sources: Sources) -> None:
    """Refuse a folder whose scores would be those of other data."""
    run, out = sources.run, sources.out
    if out.root == run.root or not out.exists():
        return
    if out.stage("cam").get("settings") != run.stage("cam").get("settings"):
        raise ArtifactError(
            f"{out.root} is a run of its own, not one of {run.root}", "choose another --out"
        )


def _forget(sources: Sources) -> None:
    """Make room for a training: nothing of an earlier one may be taken for its output.

    A folder other than the run's learns what data its masks came from.
    """
    out = sources.out
    manifest = out.manifest() if out.exists() else sources.run.manifest()
    manifest["stages"].pop(STAGE, None)
    write_json(out.manifest_path, manifest)
    checkpoints, predictions = out.root / "checkpoints", out.root / "predictions"
    for old in [*list_files(checkpoints, ".pt"), *list_files(predictions, ".png")]:
        old.unlink()
