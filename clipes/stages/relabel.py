"""Masks of a run's own images as a segmenter sees them that learnt from such: ``relabelled/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from clipes.config import RELABEL_SHARE, CrfParams
from clipes.device import choose_device, share_processor
from clipes.disk.files import sha256_of
from clipes.errors import ArtifactError, UsageError
from clipes.listener import Listener
from clipes.masks.pseudo import SHRUNK
from clipes.processes import local_rank
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.loop import Outcome, Shard, Summary, for_each, say_made_again, waiting
from clipes.run.origin import changing, read_picture
from clipes.run.record import RefineRecord, RelabelSettings
from clipes.run.relabelled import Relabelled
from clipes.run.reopen import reopen
from clipes.seg.checkpoint import Checkpoint, load_checkpoint
from clipes.seg.kinds import predictor_for
from clipes.seg.label import FirstOpinion, label_image
from clipes.seg.recipes import LabelPredictor, TestSettings
from clipes.stages.token_source import TowerRequest, tokens_of
from clipes.types import Sample

STAGE = "relabel"

ALONE = "have no maps: the segmenter alone says what they show"

_ABSENT = "none of any name"

_AT_ONCE_ON_GPU = 4  # images: each may need room for a pass of the network


@dataclass(frozen=True)
class RelabelRequest:
    """All that ``clipes relabel`` is told.

    Attributes:
        checkpoint: The segmenter's file.
        root: Where the data set is, if not where run.json says.
        scales: Factors of the image's size that are averaged; None as the checkpoint says.
        flip: Whether the mirror image is averaged in; None likewise.
        crf: Whether the dense CRF comes last, with the settings of ``refine`` and a weaker
            appearance kernel.
        share: The segmenter's share in the maps that masks are made of; the rest is the run's own,
            where an image has some.
        device: ``auto``, or a torch device.
        towers: Where the towers' weights come from, for segmenters that read tokens.
        command: The command line, for the record.
        workers: Images at once; None for as many as cores, or what a GPU has room for.
    """

    checkpoint: Path
    root: Path | None = None
    scales: tuple[float, ...] | None = None
    flip: bool | None = None
    crf: bool = True
    share: float = RELABEL_SHARE
    device: str = "auto"
    towers: TowerRequest = field(default_factory=TowerRequest)
    command: str = ""
    workers: int | None = None

    def settings(self, own: TestSettings, refined: RefineRecord | None) -> RelabelSettings:
        """Return what changes the masks.

        Args:
            own: The way in which the checkpoint is to be asked.
            refined: How the run's own masks were made.

        Raises:
            UsageError: The share is none.
        """
        if not 0 < self.share <= 1:
            raise UsageError(
                f"a segmenter's share of {self.share:g} is not above 0 and at most 1",
                "1 is the segmenter alone",
            )
        crf = CrfParams() if refined is None else refined.settings.crf
        return RelabelSettings(
            sha256_of(self.checkpoint),
            own.scales if self.scales is None else self.scales,
            own.flip if self.flip is None else self.flip,
            own.window,
            crf.of_segmenter() if self.crf else None,
            self.share,
        )


def relabel(request: RelabelRequest, run: Run, part: Shard, listener: Listener) -> Outcome:
    """Write a mask and a confidence map of every image of a run, beside those that there are.

    Classes that an image is not labelled with are left out. Files that were made of the same
    picture, labels, checkpoint and settings stay, others are made again; what a person edited is
    not written over. If there is nothing to do, nothing is written.

    Args:
        request: What is asked for.
        run: The run folder.
        part: The images that this process does.
        listener: Who is told how it goes.

    Raises:
        ArtifactError: The checkpoint cannot be used, or knows other classes.
        WeightsError: The towers that it goes with cannot be had.
        ClipesError: Run folder or data set cannot be used.
    """
    data = reopen(run, request.root)
    saved = load_checkpoint(request.checkpoint)
    _check_classes(saved, data.classes, run)
    settings = request.settings(saved.test, run.refine_record())
    current = Relabelled(run, settings)
    mine = part.of(data.samples)
    todo = waiting(mine, current.is_done, listener)
    record = run.relabel_record()
    if not todo and record is not None and record.settings == settings:
        return Outcome(Summary(0, len(mine), ()), data.failures)
    with run.claim(STAGE, shared=part.count > 1):
        labeller = _labeller(request, saved, settings, current, listener)
        # Not before it is certain that there will be others: masks of other settings count no more.
        _say_again(todo, current, listener)
        run.begin(STAGE, settings.to_dict(), request.command, anew=True)
        summary = labeller.label_all(todo, listener)
    return Outcome(replace(summary, skipped=len(mine) - len(todo)), data.failures)


def _check_classes(saved: Checkpoint, classes: tuple[str, ...], run: Run) -> None:
    theirs = saved.spec.classes
    if theirs == classes:
        return
    pairs = zip_longest(theirs, classes)
    index, (known, wanted) = next((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1])
    raise ArtifactError(
        f"{saved.path} has other classes than {run.root}: its class {index} is {known or _ABSENT}, "
        f"not {wanted or _ABSENT}",
        "take a segmenter that learnt the classes of this run, in their order",
    )


def _say_again(todo: Sequence[Sample], current: Relabelled, listener: Listener) -> None:
    """Say how many masks there are that are made again, and why the first of them is."""
    again = [
        (sample.id, reason)
        for sample in todo
        if not current.is_edited(sample) and (reason := current.stale(sample))
    ]
    say_made_again(again, listener)


@dataclass(frozen=True)
class _Labeller:
    """A segmenter at work on the images of a run.

    Attributes:
        predictor: The segmenter.
        settings: Of the masks.
        current: Where the files go, and what they say of themselves.
        maps: Tells which of its maps are out of date.
        workers: Images at once.
    """

    predictor: LabelPredictor
    settings: RelabelSettings
    current: Relabelled
    maps: Freshness
    workers: int

    def label_all(self, samples: Sequence[Sample], listener: Listener) -> Summary:
        """Make and save the files of every sample.

        Raises:
            WriteError: A file cannot be written; the rest is not tried.
        """
        with listener.progress(STAGE) as progress:
            return for_each(
                self._label_one,
                samples,
                is_done=self.current.is_done,
                workers=self.workers,
                progress=progress,
                report=listener.report,
            )

    def _label_one(self, sample: Sample) -> str | None:
        if self.current.is_edited(sample) and (reason := self.current.unusable(sample)):
            raise ArtifactError(reason)
        first = self._first_opinion(sample)
        pixels, picture = read_picture(sample.image)
        pseudo, was_shrunk = label_image(
            pixels, self.predictor, self.settings.crf, sample.labels, first
        )
        if not picture.is_still(sample.image):
            raise changing(sample.image)
        origin = self.current.origin(sample, picture).text()
        self.current.files.save_pseudo(sample.id, pseudo, origin=origin)
        if was_shrunk:
            return SHRUNK
        return ALONE if first is None and self.settings.share < 1 else None

    def _first_opinion(self, sample: Sample) -> FirstOpinion | None:
        """Return the maps that have a share in the mask of an image; None if none have.

        Raises:
            ArtifactError: They are out of date, or damaged.
        """
        run = self.current.run
        if self.settings.share == 1 or not run.cams_path(sample.id).exists():
            return None
        if reason := self.maps.unusable_maps(sample):
            raise ArtifactError(reason)
        return FirstOpinion(run.load_cams(sample.id), self.settings.share)


def _labeller(
    request: RelabelRequest,
    saved: Checkpoint,
    settings: RelabelSettings,
    current: Relabelled,
    listener: Listener,
) -> _Labeller:
    """Get a checkpoint ready to look at images; errors as for ``relabel``."""
    device = choose_device(request.device, local_rank())
    model = saved.build().to(device)
    test = TestSettings(settings.scales, settings.flip, window=settings.window)
    source = tokens_of(saved.spec, request.towers, request.device, listener)
    predictor = predictor_for(model, test, source)
    at_once = None if device.type == "cpu" else _AT_ONCE_ON_GPU
    workers = share_processor(device, at_once if request.workers is None else request.workers)
    maps = Freshness.of(current.run, saved.spec.classes)
    return _Labeller(predictor, settings, current, maps, workers)
