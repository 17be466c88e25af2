"""Stage 3: pseudo-masks and confidence to a trained segmenter and its predictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clipes.choices import Loss
from clipes.config import AnySegmenterPreset, FrozenPreset, WeakClipPreset
from clipes.datasets import Dataset
from clipes.datasets.base import recorded_split
from clipes.disk.files import sha256_of
from clipes.errors import ArtifactError, RunConflictError, SplitError
from clipes.listener import Listener, ignore
from clipes.masks.values import value_count
from clipes.run.folder import Run
from clipes.run.loop import Shard, Summary
from clipes.run.origin import digest
from clipes.run.record import TrainFacts, TrainSettings
from clipes.run.reopen import left_out, reopen, reopen_all
from clipes.run.tokens import CachedTokens
from clipes.seg.checkpoint import FINAL, Checkpoint, load_checkpoint, saved_iterations
from clipes.seg.data import TrainingPair
from clipes.seg.kinds import predictor_for, recipe_for
from clipes.seg.log import Curve, TensorBoard
from clipes.seg.loss import Guidance
from clipes.seg.parallel import Processes, join_processes
from clipes.seg.recipes import Examples, Model, Recipe
from clipes.seg.train import Step, Trainer, part_size
from clipes.stages.predict import changed_crf, is_done, predict_samples
from clipes.stages.token_source import tokens_of
from clipes.stages.train_examples import (
    Taught,
    check_examples,
    labelled_pairs,
    taught_by,
    training_pairs,
)
from clipes.stages.train_output import STAGE, check_target, forget_training
from clipes.stages.train_request import Sources, TrainRequest
from clipes.stages.train_towers import TrainTowers


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
        request: What is asked for, as it suits the machine.
        tokens: What frozen towers say, for presets that read it; else None.
        recipe: How the model is built, trained and asked.
        classes: Class names in mask order.
        processes: Who trains together.
        pairs: What is learnt from.
        val: The images to predict at the end.
        settings: For run.json: what changes the output.
        taught: What ``pairs`` are, for run.json.
        listener: Who is told how it goes.
    """

    request: TrainRequest
    tokens: CachedTokens | None
    recipe: Recipe[Any, Any]
    classes: tuple[str, ...]
    processes: Processes
    pairs: Sequence[TrainingPair]
    val: Dataset
    settings: TrainSettings
    taught: Taught
    listener: TrainingListener

    @property
    def out(self) -> Run:
        """Where the output goes."""
        return self.request.sources.out

    @property
    def saved(self) -> list[Path]:
        """The checkpoints of the training, oldest first."""
        return saved_iterations(self.out.root / "checkpoints")

    @property
    def final(self) -> Path:
        """The file of the finished training."""
        return self.out.root / "checkpoints" / FINAL


def train_segmenter(request: TrainRequest, listener: TrainingListener) -> Summary | None:
    """Train a segmenter on a run's masks and predict the validation images.

    Args:
        request: What is asked for.
        listener: Who is told how it goes; under torchrun, by the first process, but for images
            that cannot be predicted.

    Returns:
        How the predictions of all processes went; None in those that are not the first.

    Raises:
        ArtifactError: Masks or confidence maps are missing or do not fit, a checkpoint is of
            another model, or the disk is full.
        RunConflictError: The folder was trained with other settings, or on other examples.
        TrainingError: The loss is not finite, or there is next to nothing to learn from.
        UsageError: The options do not go with each other or with the machine.
    """
    with join_processes(request.device) as processes:
        if not processes.first:
            listener = TrainingListener(report=listener.report)
        summary = _train_and_predict(_prepare(request, processes, listener))
        return summary if processes.first else None


def _prepare(request: TrainRequest, processes: Processes, listener: TrainingListener) -> _Job:
    """Find what is learnt from and what is predicted; errors as for ``train_segmenter``."""
    sources, guidance = request.sources, request.guidance
    preset = request.recipe_preset(gpu=processes.device.type == "cuda")
    # On processors that have it: half of a linear layer's time, a third of a convolution's.
    rounded = isinstance(preset, FrozenPreset | WeakClipPreset)
    request = replace(request, options=request.options.on(processes.device, rounded=rounded))
    check_target(sources)
    data = reopen(sources.run, sources.root, sources.split)
    towers = TrainTowers(
        request, preset, data.classes, str(processes.device), processes.count, listener
    )
    tokens = towers.tokens()
    recipe = recipe_for(preset, data.classes, guidance, tokens, towers.teacher(), towers.speaking)
    part_size(recipe, processes.count)
    if recipe.reads_masks:
        pairs = training_pairs(sources, data, guided=guidance.asked, say=listener.say)
    else:
        pairs = labelled_pairs(sources, data, listener)
    val_name, val = _validation(sources, data, listener.say)
    if not recipe.reads_masks:  # confidence is of masks
        request = replace(request, guidance=Guidance())
    settings = _settings(request, preset, data, len(pairs), val_name)
    with listener.progress("look") as progress:
        taught = taught_by(recipe, pairs, sources.run, progress)
    return _Job(
        request,
        tokens,
        recipe,
        data.classes,
        processes,
        pairs,
        val,
        settings,
        taught,
        listener,
    )


def _settings(
    request: TrainRequest,
    preset: AnySegmenterPreset,
    data: Dataset,
    examples: int,
    val: str | None,
) -> TrainSettings:
    sources, guidance, options = request.sources, request.guidance, request.options
    relabelled = sources.own.root.name if sources.relabelled else None
    return TrainSettings(
        preset.to_dict(),
        seed=options.seed,
        threshold=guidance.threshold,
        loss=(Loss.soft if guidance.soft else Loss.ce).value,
        amp=options.amp,
        masks=str(sources.masks.absolute()) if sources.masks else relabelled,
        confidence=str(sources.confidence.absolute()) if sources.confidence else None,
        split=recorded_split(data.root, sources.split),
        examples=examples,
        backbone_weights=sources.backbone_weights,
        val=val,
    )


def _train_and_predict(job: _Job) -> Summary:
    request, recipe, listener = job.request, job.recipe, job.listener
    saved, finished = job.saved, job.final.exists()
    fresh = not request.resume or not (saved or finished)
    if not fresh:
        _check_same_training(job)
    if recipe.reads_masks and (fresh or not finished):
        check_examples(job.pairs, job.classes, request.guidance, listener)
    if not fresh and finished:
        listener.say(f"trained before: {job.final}")
        if not _unpredicted(job):
            return Summary(0, len(job.val.samples), ())  # a finished run may be read-only
        record = job.out.train_record() if job.out.exists() else None
        facts = TrainFacts() if record is None else record.facts
        with _claimed(job):
            _begin(job, replace(facts, **asdict(job.taught)), fresh=False)
            return _predict(job, trained=True)
    spec = recipe.spec  # may load towers, which draws random numbers where words are not kept
    torch.manual_seed(request.options.seed)
    model = spec.build().to(job.processes.device)
    if fresh:
        recipe = recipe.initialise(model, request.sources.backbone_weights, listener.say)
    with _claimed(job):
        where = job.processes.count, str(job.processes.device)
        _begin(job, TrainFacts(*where, note=recipe.note, **asdict(job.taught)), fresh=fresh)
        _fit(job, model, recipe, None if fresh else load_checkpoint(saved[-1]))
        if job.processes.first:
            job.out.note_fact(STAGE, "final", sha256_of(job.final))
        return _predict(job, trained=False)


@contextmanager
def _claimed(job: _Job) -> Iterator[None]:
    """Keep others from training in the folder; the first process claims it for its whole group.

    Raises:
        ArtifactError: Another training is at work there; in all processes, which would wait.
    """
    with ExitStack() as stack:
        refused: ArtifactError | None = None
        if job.processes.first:
            try:
                elsewhere = "train into another folder (--out)"
                stack.enter_context(job.out.claim(STAGE, otherwise=elsewhere))
            except ArtifactError as error:
                refused = error
        refused = job.processes.gather(refused)[0]
        if refused is not None:
            raise refused
        yield


def _begin(job: _Job, facts: TrainFacts, *, fresh: bool) -> None:
    """Record the training, once every process has seen what is there."""
    processes = job.processes
    processes.wait()
    if processes.first:
        if fresh:
            forget_training(job.request.sources, job.val)
        job.out.begin(STAGE, job.settings.to_dict(), job.request.command, facts.to_dict())
    processes.wait()


def _fit(job: _Job, model: Model, recipe: Recipe[Any, Any], latest: Checkpoint | None) -> None:
    """Train from the start, or on from a checkpoint.

    Args:
        job: The training.
        model: The model; of a new training with the weights it starts from.
        recipe: The recipe that suits these weights; a checkpoint knows its own.
        latest: Where to go on; None for the start.
    """
    if latest is not None:
        recipe = recipe.resume(latest.training.recipe or {})
    if job.tokens is not None:
        _encode(job, job.tokens)
    if latest is None:
        with job.listener.progress("start") as progress:
            recipe = recipe.start(model, job.pairs, progress)
    trainer = Trainer(model, recipe, job.request.options, job.processes)
    if latest is not None:
        trainer.restore(latest)
        job.listener.say(f"going on after iteration {trainer.iteration}: {latest.path}")
    _train(job, trainer, recipe.examples(job.pairs, job.request.options.seed))


def _encode(job: _Job, tokens: CachedTokens) -> None:
    """Keep the tokens of this process' share of the examples, as far as there is room."""
    processes, listener = job.processes, job.listener
    mine = job.pairs[processes.rank :: processes.count]
    room, without = True, 0
    with listener.progress("tokens") as progress:
        for index, pair in enumerate(mine):
            kept = tokens.has(pair.id, pair.image)
            if room and not kept:  # once there is none, to encode ahead is for nothing
                kept = tokens.keep(pair.id, pair.image)
                room = kept or tokens.has_room
            without += not kept
            progress(index + 1, len(mine))
    if without:
        space = f"{job.request.token_space / 1e9:g} GB"
        listener.say(
            f"no room to keep the tokens of {without} of {len(mine)} images (--token-space "
            f"{space}, and what the disk has left): they are made anew each time"
        )
    processes.wait()


def _made_with(job: _Job) -> str:
    """Return the digest of the segmenter, and of how it is asked."""
    test = job.recipe.test
    crf = changed_crf(job.recipe.made.crf_of(test))
    return digest([sha256_of(job.final), test.scales, test.flip, test.crf, *crf])


def _unpredicted(job: _Job) -> bool:
    """Tell whether an image to predict has no prediction of the finished segmenter."""
    folder, made_with = job.out.root / "predictions", _made_with(job)
    return any(
        not is_done(folder / f"{sample.id}.png", sample.image, made_with)
        for sample in job.val.samples
    )


def _finished(job: _Job) -> Model:
    """Return the trained model.

    Raises:
        ArtifactError: The file is damaged, or of another training.
    """
    checkpoint = load_checkpoint(job.final)
    spec = checkpoint.spec
    if (spec.kind, spec.classes) != (job.recipe.made.kind, job.classes):
        raise ArtifactError(
            f"{job.final} is of another training: {spec.name} with {len(spec.classes)} classes",
            "put back that of this one, or train anew with --no-resume",
        )
    return checkpoint.build().to(job.processes.device)


def _predict(job: _Job, *, trained: bool) -> Summary:
    """Predict this process' share of the validation images; return how all shares went.

    Args:
        job: The training.
        trained: Whether it was finished before: then what it learnt from need not be here.
    """
    recipe, processes, request, model = job.recipe, job.processes, job.request, _finished(job)
    if trained or job.tokens is None:
        source = tokens_of(model.spec, request.towers, str(processes.device), job.listener)
    else:
        source = job.tokens.source
    mine = predict_samples(
        Shard(processes.rank, processes.count).of(job.val.samples),
        predictor_for(model, recipe.test, source),
        job.out.root / "predictions",
        crf=model.spec.crf_of(recipe.test),
        made_with=_made_with(job),
        listener=job.listener,
    )
    summaries = processes.gather(mine)
    return Summary(
        sum(summary.done for summary in summaries),
        sum(summary.skipped for summary in summaries),
        tuple(failure for summary in summaries for failure in summary.failures),
        sum((Counter(summary.remarks) for summary in summaries), Counter()),
    )


def _check_same_training(job: _Job) -> None:
    """Refuse to go on with other settings, or with examples that are no longer what they were."""
    out = job.out
    record = out.train_record() if out.exists() else None
    if record is None or not record.facts.learnt_from:
        return  # of an older clipes: ``begin`` compares the settings and the number of examples
    same_number = replace(job.settings, examples=record.settings.examples)
    out.check_settings(STAGE, same_number.to_dict())
    if job.final.exists() and record.facts.final not in ("", sha256_of(job.final)):
        raise ArtifactError(
            f"{job.final} is not the file that this training wrote",
            "put that back, or train anew with --no-resume",
        )
    before = asdict(record.facts)  # what an older clipes did not know is empty
    if any(before[name] not in ("", now) for name, now in asdict(job.taught).items()):
        raise RunConflictError(
            "pictures, labels, masks, confidence maps or words that "
            f"{out.root / 'checkpoints'} learnt from have changed since",
            "train anew with --no-resume, or into another folder (--out)",
        )


def _train(job: _Job, trainer: Trainer, examples: Examples) -> None:
    """Train to the end; the first process keeps a log."""
    folder, log = job.out.root, job.processes.first
    labels, say = value_count(len(job.classes)), job.listener.say
    board = TensorBoard(folder / "tensorboard", trainer.iteration, say) if log else None
    curve = Curve(folder, labels, trainer.iteration, say) if log else None
    with job.listener.steps() as show:

        def on_step(step: Step) -> None:
            show(step)
            if board is not None:
                board.write(step)
            if curve is not None:
                curve.write(step)

        trainer.run(examples, folder / "checkpoints", on_step)
    if board is not None:
        board.close()


def _validation(
    sources: Sources, data: Dataset, say: Callable[[str], None]
) -> tuple[str | None, Dataset]:
    """Return the images to predict, and the name of their list; None for those trained on."""
    name = "val" if sources.val is None else sources.val
    try:
        val = reopen_all(sources.run, sources.root, name)
    except SplitError:
        if sources.val is not None:
            raise
        say(
            "no list of validation images 'val' (--val names another): predicting those learnt from"
        )
        return None, data
    if remark := left_out(val):
        say(f"to predict, {remark}")
    return recorded_split(val.root, name), val
