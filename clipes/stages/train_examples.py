"""The examples of a training: which images have masks, and whether there is enough in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipes.datasets import Dataset
from clipes.disk.files import sha256_of
from clipes.disk.images import read_image
from clipes.errors import ArtifactError, ImageError, UsageError
from clipes.listener import Listener
from clipes.masks.folder import find_masks, require_some
from clipes.masks.values import RULE, value_count
from clipes.run.corrected import Chosen
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.origin import digest
from clipes.run.relabelled import Relabelled
from clipes.run.reopen import left_out, orphans
from clipes.seg.data import Tally, TrainingPair, check_pairs
from clipes.seg.loss import Guidance
from clipes.seg.recipes import Recipe
from clipes.seg.train import TrainingError
from clipes.stages.train_request import Sources
from clipes.types import Progress, Sample

_LEAST_USED, _LEAST_OF_ALL = 0.05, 0.001
"""Shares of the labelled pixels, and of all; with less, the result is an untrained network's."""

_NAMES_SHOWN = 5


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
    masks, maps = _folders(sources, guided=guided)
    given = None if sources.masks is None else find_masks(sources.masks, "--masks")
    _say_left_out(sources, data, say)
    chosen = _chosen(sources, data)
    pairs, stale, missing = [], [], []
    for sample in data.samples:
        own = chosen.files(sample).pseudo_path(sample.id) if chosen else None
        mask = own if given is None else given.get(sample.id)
        if mask is None or not mask.is_file():
            missing.append(sample.id)
            continue
        if chosen and (reason := chosen.unusable(sample)):
            stale.append(f"{sample.id}: {reason}")
            continue
        confidence = None if maps is None else _confidence(sources, maps, sample, chosen)
        pairs.append(TrainingPair(sample.id, sample.image, mask, confidence, sample.labels))
    if stale:
        say(f"left out: {len(stale)} images, the first is {stale[0]}")
    if not pairs:
        raise _no_masks(sources, masks, data)
    if missing:
        count = f"{len(missing)} of {len(data.samples)} images"
        say(f"{count} have no mask, the first is {missing[0]}")
    return pairs


def _confidence(sources: Sources, maps: Path, sample: Sample, chosen: Chosen | None) -> Path:
    """Return the confidence map that goes with an image's mask.

    Raises:
        ArtifactError: There is none.
    """
    corrected = chosen is not None and chosen.is_corrected(sample)
    path = maps / f"{sample.id}.png"
    if corrected:
        path = sources.run.corrected.confidence_path(sample.id)
    if not path.is_file():
        raise ArtifactError(
            f"{sample.id} has a mask but no confidence map {path}",
            f"{_makes_both(sources)}, or train with --no-cgl",
        )
    return path


def _no_masks(sources: Sources, masks: Path, data: Dataset) -> ArtifactError:
    """Return the error of a folder without a mask of these images; it may say more of why."""
    root = sources.run.root
    if sources.masks is not None and data.samples:
        ids = {sample.id for sample in data.samples}
        require_some(masks, ids, f"an image of {root}", data.samples[0].id)
    return ArtifactError(
        f"no image of {root} has a mask in {masks} that is up to date",
        f"run '{_maker(sources)}' first, or name another folder with --masks",
    )


def labelled_pairs(sources: Sources, data: Dataset, listener: Listener) -> list[TrainingPair]:
    """Return the images that show a class, for recipes that make their labels themselves.

    Each is looked at once: a picture that cannot be read is left out before a training of hours
    begins, not met in the middle of it.

    Args:
        sources: No masks may be named.
        data: The images.
        listener: Told how many images are left out.

    Raises:
        ArtifactError: No image that can be read shows a class.
        UsageError: Masks or confidence maps were named.
    """
    if sources.masks is not None or sources.confidence is not None or sources.relabelled:
        raise UsageError(
            "--masks, --confidence and --relabelled mean nothing to a preset that makes its labels "
            "itself",
            "leave them out, or choose another --preset",
        )
    if remark := left_out(data):
        listener.say(remark)
    pairs, unread = [], []
    with listener.progress("check") as progress:
        for index, sample in enumerate(data.samples):
            if sample.labels:
                try:
                    read_image(sample.image)
                except ImageError as error:
                    unread.append(str(error))
                else:
                    pairs.append(TrainingPair(sample.id, sample.image, None, None, sample.labels))
            progress(index + 1, len(data.samples))
    if unread:
        listener.say(f"left out: {len(unread)} images that cannot be read, the first: {unread[0]}")
    if not pairs:
        raise ArtifactError(
            f"no image of {sources.run.root} that can be read shows a class",
            "name a list of images that do",
        )
    return pairs


def _chosen(sources: Sources, data: Dataset) -> Chosen | None:
    """Return which masks of the run are learnt; None if others are named.

    Raises:
        ArtifactError: The run does not say what its masks were made with.
    """
    if sources.masks is not None:
        return None
    own = (
        Relabelled.of(sources.run)
        if sources.relabelled
        else Freshness.of(sources.run, data.classes)
    )
    return Chosen(sources.run, own, sources.use_corrected)


def _maker(sources: Sources) -> str:
    """Return the command that makes the masks."""
    return "clipes relabel" if sources.relabelled else "clipes refine"


def _makes_both(sources: Sources) -> str:
    """Return how a mask and its confidence map come to be."""
    return f"make both with '{_maker(sources)}'" if sources.confidence is None else "add it"


def _folders(sources: Sources, *, guided: bool) -> tuple[Path, Path | None]:
    """Return where masks and, if they are asked for, confidence maps are; errors as above."""
    run, own, confidence = sources.own, sources.masks is None, sources.confidence
    masks = sources.masks or run.root / "pseudo"
    if not guided:
        if confidence is not None:
            raise UsageError("--confidence means nothing to --no-cgl", "leave one of them out")
        return masks, None
    if confidence is not None:
        find_masks(confidence, "--confidence")
        return masks, confidence
    if not own:
        find_masks(masks, "--masks")
        raise ArtifactError(
            f"the masks of {masks} come without confidence",
            "give --confidence DIR, or train with --no-cgl",
        )
    return masks, run.root / "confidence"


def _say_left_out(sources: Sources, data: Dataset, say: Callable[[str], None]) -> None:
    """Say which images cannot be learnt from, and which masks of the run belong to none."""
    if remark := left_out(data):
        say(remark)
    # Another list, or other masks, are meant not to be all of the run's.
    own = sources.split is None and sources.masks is None
    if own and (remark := orphans(sources.own, data, "pseudo")):
        say(remark)


def pairs_digest(pairs: Sequence[TrainingPair], progress: Progress) -> str:
    """Return the digest of all files that are learnt from.

    Raises:
        ArtifactError: One cannot be read.
    """
    found = []
    for index, pair in enumerate(pairs):
        files = [path for path in (pair.image, pair.mask, pair.confidence) if path is not None]
        try:
            found.append([pair.id, *(sha256_of(file) for file in files)])
        except OSError as error:
            raise ArtifactError(f"cannot read {pair.id}: {error}", "check the file") from error
        progress(index + 1, len(pairs))
    return digest(found)


@dataclass(frozen=True)
class Taught:
    """What examples are, in digests; see ``TrainFacts``. Where one has changed, so have they."""

    learnt_from: str
    taught_by: str
    words: str


def taught_by(
    recipe: Recipe[Any, Any], pairs: Sequence[TrainingPair], run: Run, progress: Progress
) -> Taught:
    """Return what a recipe learns from.

    Args:
        recipe: Tells whether labels count, and words.
        pairs: The examples.
        run: Where the words are from.
        progress: Called after each example.

    Raises:
        ArtifactError: A file cannot be read.
    """
    files = pairs_digest(pairs, progress)
    labels = [[pair.id, sorted(pair.labels)] for pair in pairs]
    text = None if recipe.reads_masks else run.cam_record().settings.text
    return Taught(
        files, digest(labels) if recipe.reads_labels else "", "" if text is None else text.sha256
    )


def check_examples(
    pairs: Sequence[TrainingPair], classes: Sequence[str], guidance: Guidance, listener: Listener
) -> None:
    """Read all examples once; errors as for ``check_pairs`` and ``check_enough``."""
    with listener.progress("check") as progress:
        tally = check_pairs(pairs, value_count(len(classes)), guidance, progress)
    check_enough(tally, classes, guidance.threshold, say=listener.say)


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
