"""Every stage in a row: a data set to maps, masks and a page, and to a segmenter if asked for.

The stages know nothing of it. What they tell goes through a listener that puts the place in the row
before it, and says once what is wrong with an image, however many stages meet it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clipes.choices import Amp
from clipes.datasets import Dataset
from clipes.errors import ClipesError, DatasetError, UsageError
from clipes.listener import Listener
from clipes.run.folder import Run
from clipes.run.loop import Outcome, Shard, Summary
from clipes.stages import cam, refine
from clipes.stages.cam import CamRequest, Resources, cam_of
from clipes.stages.evaluate import Scored, evaluate_run, keep_scores
from clipes.stages.refine import RefineRequest, RefineResources
from clipes.stages.report import PAGE, ReportRequest, make_report
from clipes.types import Failure, Progress

if TYPE_CHECKING:
    from clipes.seg.train import Step

_CAM, _REFINE, _TRAIN, _PREDICT, _EVAL, _REPORT = (
    cam.STAGE,
    refine.STAGE,
    "train-seg",
    "predict",
    "eval",
    "report",
)


@dataclass(frozen=True)
class RunRequest:
    """All that ``clipes run`` is told.

    Attributes:
        cam: Data, words, weights, settings and tiles; the later stages take theirs from here.
        workers: Images at once; None for what suits each stage and the machine.
        train: Whether a segmenter is trained on the masks.
        iterations: Updates of the training; None for the recipe's.
        resume: Whether a training that was stopped goes on; else it starts over.
        predict_on: Folder of images without labels, which the segmenter makes masks of.
    """

    cam: CamRequest
    workers: int | None = None
    train: bool = False
    iterations: int | None = None
    resume: bool = True
    predict_on: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what needs a segmenter where none is trained."""
        if self.predict_on is not None and not self.train:
            raise UsageError(
                f"no segmenter to predict {self.predict_on} with", "add --train, which makes one"
            )
        if self.iterations is not None and not self.train:
            raise UsageError(
                f"no training to have {self.iterations} iterations", "add --train, or leave it out"
            )

    def stages(self, *, scored: bool) -> tuple[str, ...]:
        """Return the stages in order; ``eval`` only where there is something to score against."""
        asked = {
            _CAM: True,
            _REFINE: True,
            _TRAIN: self.train,
            _PREDICT: self.predict_on is not None,
            _EVAL: scored,
            _REPORT: True,
        }
        return tuple(stage for stage, wanted in asked.items() if wanted)


@dataclass(frozen=True)
class FolderResult:
    """What was made of a folder of images.

    Attributes:
        run: The run folder: ``cams/``, ``pseudo/``, ``confidence/``; ``run.load_pseudo(id)`` reads.
        maps: How the maps went.
        masks: How the masks went.
        failures: Images that could not be used or worked on, each with the first reason.
        report: The page that shows the run.
        scored: Scores in [0, 1] of every stage; None where there is no ground truth.
        segmenter: The checkpoint of the segmenter, if one was trained.
        predicted: Folder of its masks of other images, if that was asked for.
    """

    run: Run
    maps: Summary
    masks: Summary
    failures: tuple[Failure, ...]
    report: Path
    scored: Scored | None = None
    segmenter: Path | None = None
    predicted: Path | None = None


def make_run(request: RunRequest, run: Run, listener: Listener) -> FolderResult:
    """Make maps, masks and the page of a data set, and what else is asked for.

    What is there and up to date stays, as in each stage. A training or a score that fails does not
    keep the page from being written.

    Args:
        request: What is asked for.
        run: The run folder.
        listener: Who is told how it goes; names of progress begin with the place: ``2/3 refine``.

    Raises:
        RunConflictError: The run was made with other settings.
        DatasetError: No image can be used.
        ClipesError: Data set, weights, words or run folder cannot be used, or a stage failed.
    """
    vocabulary, data = request.cam.data.open()
    how = Resources(workers=request.workers)
    maps = partial(cam_of, request.cam, vocabulary, data, run, how)
    return make_run_of(request, data, maps, run, listener)


def make_run_of(
    request: RunRequest,
    data: Dataset,
    make_maps: Callable[[Listener], Outcome],
    run: Run,
    listener: Listener,
    *,
    numbered: bool = True,
) -> FolderResult:
    """As ``make_run``, for a data set that is open.

    Args:
        request: What is asked for.
        data: The data set.
        make_maps: Does what ``cam`` does.
        run: The run folder.
        listener: Who is told how it goes.
        numbered: Whether names of progress begin with the place in the row.
    """
    if request.predict_on is not None and not request.predict_on.exists():  # not after a training
        raise DatasetError(
            f"there is no file or folder {request.predict_on}",
            "check the path given by --predict-on",
        )
    row = _Row(request.stages(scored=_has_truth(data)), listener, numbered=numbered)
    root = request.cam.data.root
    maps = row.ended(_CAM, make_maps(row.listener(_CAM)))
    if not maps.done + maps.skipped:
        raise _nothing(data, [*row.failures.values()])
    crf = RefineRequest(root, command=request.cam.command, tile=request.cam.tile)
    crf_resources = RefineResources(workers=request.workers)
    masks = row.ended(_REFINE, refine.refine(crf, run, crf_resources, row.listener(_REFINE)))
    made = FolderResult(run, maps, masks, (), run.root / "report" / PAGE)
    error: ClipesError | None = None
    try:
        made = _score(request, _train(request, made, row), row)
    except ClipesError as stopped:
        error = stopped
    look = ReportRequest(root, workers=request.workers)
    make_report(look, run, row.listener(_REPORT))
    row.say(_REPORT, str(made.report))
    if error is not None:
        raise error
    return replace(made, failures=tuple(row.failures.values()))


class _Row:
    """The stages in order, and who is told of them.

    Args:
        stages: Their names.
        listener: Who is told.
        numbered: Whether names of progress begin with the place in the row.
    """

    def __init__(self, stages: Sequence[str], listener: Listener, *, numbered: bool) -> None:
        self.stages = stages
        self.failures: dict[str, Failure] = {}
        self._listener = listener
        self._numbered = numbered

    def listener(self, stage: str) -> Listener:
        """Return who follows a stage."""

        def progress(what: str, /, *, show_count: bool = True) -> AbstractContextManager[Progress]:
            name = what
            if self._numbered:
                name = self._place(stage) if what == stage else f"{self._place(stage)}: {what}"
            return self._listener.progress(name, show_count=show_count)

        return Listener(self._listener.say, self._report, progress)

    def say(self, stage: str, remark: str) -> None:
        """Say something of a stage."""
        self._listener.say(f"{self._place(stage)}: {remark}")

    def ended(self, stage: str, outcome: Outcome) -> Summary:
        """Say how a stage went over its images; return its summary."""
        for failure in outcome.unusable:
            self._report(failure)
        summary, unusable = outcome.summary, len(outcome.unusable)
        for remark in summary.told():
            self._listener.say(remark)
        there = summary.done + summary.skipped
        every = there + len(summary.failures) + unusable
        self.say(stage, f"{there} of {every} done: {summary.counts(unusable=unusable)}")
        return summary

    def _place(self, stage: str) -> str:
        return f"{self.stages.index(stage) + 1}/{len(self.stages)} {stage}"

    def _report(self, failure: Failure) -> None:
        # An image without maps cannot have a mask: the first reason is the one that helps.
        if failure.id not in self.failures:
            self.failures[failure.id] = failure
            self._listener.report(failure)


def _nothing(data: Dataset, failures: Sequence[Failure]) -> DatasetError:
    """Return what ends a run of which no image has maps."""
    why = "none has a label"
    if failures:
        first = failures[0]
        why = f"all {len(failures)} failed, the first is {first.id}: {first.reason}"
    return DatasetError(f"no image of {data.root} has maps: {why}")


def _has_truth(data: Dataset) -> bool:
    return any(sample.mask is not None and sample.mask.is_file() for sample in data.samples)


def _train(request: RunRequest, made: FolderResult, row: _Row) -> FolderResult:
    """Train a segmenter on the masks, and let it look at other images, as far as asked for."""
    if not request.train:
        return made
    # Not at the top: they bring torch.
    from clipes.seg.checkpoint import FINAL
    from clipes.seg.train import TrainOptions
    from clipes.stages.predict import PredictRequest, predict
    from clipes.stages.token_source import TowerRequest
    from clipes.stages.train_request import Changes, Sources, TrainRequest
    from clipes.stages.train_seg import TrainingListener, train_segmenter

    run, clip = made.run, request.cam.clip
    towers = TowerRequest(clip.weights, clip.dino)
    training = TrainRequest(
        Sources(run, run, request.cam.data.root),
        changes=Changes(iterations=request.iterations),
        options=TrainOptions(amp=Amp.auto.value),
        towers=towers,
        device=clip.device,
        resume=request.resume,
        command=request.cam.command,
    )
    told = row.listener(_TRAIN)
    steps = partial(_steps, told)
    summary = train_segmenter(
        training, TrainingListener(told.say, told.report, told.progress, steps)
    )
    if summary is not None:  # else another process says how all went
        row.ended(_TRAIN, Outcome(summary, ()))
    checkpoint = run.root / "checkpoints" / FINAL
    made = replace(made, segmenter=checkpoint)
    if request.predict_on is None:
        return made
    out, others = run.root / "predicted", [request.predict_on]
    asked = PredictRequest(
        checkpoint,
        others,
        out,
        device=clip.device,
        towers=towers,
        tile=request.cam.tile,
    )
    row.ended(_PREDICT, predict(asked, Shard(), row.listener(_PREDICT)))
    return replace(made, predicted=out)


@contextmanager
def _steps(listener: Listener) -> Iterator[Callable[[Step], None]]:
    """Follow the steps of a training as any other progress."""
    with listener.progress("train") as progress:
        yield lambda step: progress(step.iteration, step.total)


def _score(request: RunRequest, made: FolderResult, row: _Row) -> FolderResult:
    """Score what was made, where there is ground truth."""
    if _EVAL not in row.stages:
        return made
    listener = row.listener(_EVAL)
    scored = evaluate_run(made.run, request.cam.data.root, None, [1.0], listener)
    keep_scores(scored, made.run, listener.say)
    row.say(_EVAL, f"{max(it.images for it in scored.stages.values())} images scored")
    return replace(made, scored=scored)
