"""Scores of every stage that has output, against ground truth."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.datasets import Dataset
from clipes.disk.files import write_json
from clipes.disk.images import MAX_TILED_PIXELS, read_mask
from clipes.errors import ArtifactError, ClipesError, DatasetError, UsageError, WriteError
from clipes.listener import Listener, ignore
from clipes.masks.folder import find_masks, require_some
from clipes.masks.pseudo import cam_masks
from clipes.masks.scores import (
    CONFIDENT_MASKS,
    CONFIDENT_RELABELLED,
    CORRECTED,
    MASKS,
    RELABELLED,
    Scores,
    maps_name,
    segmenter_name,
)
from clipes.masks.values import RULE, value_of
from clipes.run.corrected import Chosen
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.loop import waiting
from clipes.run.record import TrainRecord
from clipes.run.relabelled import Relabelled
from clipes.run.reopen import left_out, orphans, reopen, reopen_all
from clipes.stages.score_output import Output, require_scores, score_output
from clipes.types import IGNORE, Progress, PseudoLabel, Sample, UInt8Array
from clipes.words.vocabulary import load_vocabulary

_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Scored:
    """Scores of everything that was found.

    Attributes:
        classes: Class names in mask order.
        stages: Scores by what was scored, in the order of the pipeline.
    """

    classes: tuple[str, ...]
    stages: dict[str, Scores]


def scores_to_json(scored: Scored) -> dict[str, Any]:
    """Return scores as plain data; ratios in [0, 1], IoU by class name, None where undefined."""
    names = ("background", *scored.classes)
    return {
        "classes": list(scored.classes),
        "stages": {
            stage: {
                "miou": scores.miou,
                "pixel_accuracy": scores.pixel_accuracy,
                "coverage": scores.coverage,
                "images": scores.images,
                "iou": dict(zip(names, scores.iou, strict=True)),
            }
            for stage, scores in scored.stages.items()
        },
    }


def keep_scores(scored: Scored, run: Run, say: Callable[[str], None]) -> None:
    """Write ``scores.json``, or say why not: a finished run may be read-only."""
    try:
        write_json(run.root / "scores.json", scores_to_json(scored))
    except WriteError as error:
        say(f"the scores are not kept: {error}")


def evaluate_run(
    run: Run,
    root: Path | None,
    gt: Path | None,
    exponents: Sequence[float],
    listener: Listener,
    *,
    use_corrected: bool = True,
) -> Scored:
    """Score every stage of a run that has output.

    What cannot be scored is left out, and said: without ground truth of the run's own images, a
    segmenter's predictions of others count all the same.

    Args:
        run: The run folder.
        root: Where the data set is, if not where run.json says.
        gt: Folder of ground-truth masks, if not the data set's.
        exponents: Background exponents to score the maps with.
        listener: Who is told what cannot be scored, and how far each stage is.
        use_corrected: Whether the masks are also scored with a person's in place of the run's.

    Raises:
        DatasetError: There is no ground truth of anything.
        ArtifactError: ``gt`` is absent or holds no mask of anything; nothing to score, or an output
            does not fit its ground truth.
    """
    data, say = reopen(run, root), listener.say
    truths = _truths(data, gt, say)
    current = Freshness.of(run, data.classes)
    if truths:
        _say_beforehand(run, data, truths, current, listener)
    with listener.progress("eval") as progress:
        stages = _score_masks(run, data, truths, exponents, progress, say)
        if use_corrected:
            stages |= _score_corrected(Chosen(run, current), data, truths, progress, say)
        stages |= score_relabelled(run, gt, data, progress, say)
        stages |= score_segmenter(run, root, gt, data, progress, say)
    if not stages:
        _refuse(run, gt, data, truths)
    if not truths:
        say(
            f"the images of {run.root} itself have no ground truth: only the segmenter's "
            "predictions of others are scored"
        )
    return Scored(data.classes, stages)


def _say_beforehand(
    run: Run, data: Dataset, truths: Container[str], current: Freshness, listener: Listener
) -> None:
    """Say which of a run's images and files are not scored, and what is out of date."""
    lost = orphans(run, data, "cams") or orphans(run, data, "pseudo")
    for remark in filter(None, (left_out(data), lost)):
        listener.say(remark)
    _say_stale(current, [sample for sample in data.samples if sample.id in truths], listener)


def _refuse(run: Run, gt: Path | None, data: Dataset, truths: Mapping[str, Path]) -> NoReturn:
    """Say why nothing at all can be scored; errors as for ``evaluate_run``."""
    if truths:
        folders = [(run, "cams"), (run, "pseudo"), (run, "predictions"), (run.relabelled, "pseudo")]
        made = any(where.ids(folder) for where, folder in folders)
        raise ArtifactError(
            f"nothing to score in {run.root}",
            "why what is there does not count is said above" if made else "run 'clipes cam' first",
        )
    if gt is not None and data.samples:
        ids = {sample.id for sample in data.samples}
        require_some(gt, ids, f"an image of {run.root}", data.samples[0].id)
    raise DatasetError(
        f"no ground-truth masks for the images of {run.root}",
        "give their folder with --gt; masks and reports need none",
    )


def _score_masks(
    run: Run,
    data: Dataset,
    truths: Mapping[str, Path],
    exponents: Sequence[float],
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Scores]:
    """Score the maps and the masks of a run, as far as there are any."""
    outputs = {
        "cams": (run.cams_path, lambda id_: _cam_masks(run, id_, exponents)),
        "pseudo": (run.pseudo_path, lambda id_: _pseudo_masks(run.load_pseudo(id_))),
    }
    stages: dict[str, Scores] = {}
    for folder, (path, masks) in outputs.items():
        some, output = _made(run, folder, truths, say), Output(folder, path, masks)
        scores, found = score_output(
            output, some, truths.values(), len(data.classes), progress, say
        )
        if scores and not stages:
            _say_absent([s for s in data.samples if s.id in some], data.classes, found, say)
        stages |= scores
    return stages


def _score_corrected(
    chosen: Chosen,
    data: Dataset,
    truths: Mapping[str, Path],
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Scores]:
    """Score the masks with a person's in place of the run's, if there are any of theirs."""
    if not chosen.has_some:
        return {}
    paths = {sample.id: chosen.files(sample).pseudo_path(sample.id) for sample in data.samples}
    some = {id_: path for id_, path in truths.items() if paths[id_].exists()}
    output = Output(CORRECTED, paths.__getitem__, lambda id_: {CORRECTED: read_mask(paths[id_])})
    return score_output(output, some, truths.values(), len(data.classes), progress, say)[0]


def _say_stale(
    current: Freshness | Relabelled, samples: Sequence[Sample], listener: Listener
) -> None:
    """Say of how many images the scores are those of output that is out of date."""
    stale = waiting(samples, lambda sample: not current.unusable(sample), listener)
    if stale:
        id_, reason = stale[0].id, current.unusable(stale[0])
        listener.say(
            f"out of date: {len(stale)} of {len(samples)} images, the first is {id_}: {reason}"
        )


def evaluate_folder(
    folder: Path, gt: Path | None, prompts: str | None, listener: Listener
) -> Scored:
    """Score a folder of masks ``<id>.png`` against one of ground truth.

    Args:
        folder: 8-bit PNG masks.
        gt: Folder of ground-truth masks of the same names.
        prompts: Vocabulary that names the classes; None for the run's that the folder is of, or
            VOC's.
        listener: Who is told what cannot be scored, and how it goes.

    Raises:
        UsageError: ``gt`` is missing.
        ArtifactError: No mask has ground truth, or one does not fit it; no class occurs in that,
            or no pixel has both.
    """
    if gt is None:
        find_masks(folder, "the argument")
        raise UsageError(f"{folder} is no run folder", "give the ground truth with --gt DIR")
    masks, known = find_masks(folder, "the argument"), find_masks(gt, "--gt")
    truths = {id_: known[id_] for id_ in masks if id_ in known}
    if not truths:
        require_some(gt, masks, f"a mask in {folder}", min(masks, default="<id>"))
    if len(truths) < len(masks):
        listener.say(
            f"{len(masks) - len(truths)} of {len(masks)} masks have no ground truth in {gt}"
        )
    if len(truths) < len(known):
        missing = len(known) - len(truths)
        listener.say(
            f"{missing} of {len(known)} ground-truth masks of {gt} have no mask in {folder}"
        )
    classes = _classes_of(folder, prompts, listener.say)
    output = Output("masks", masks.__getitem__, lambda id_: {"masks": read_mask(masks[id_])})
    with listener.progress("eval") as progress:
        scores = require_scores(output, truths, len(classes), progress)
    return Scored(classes, scores)


def _recorded_classes(run: Run) -> tuple[str, ...]:
    """Return a run's classes; none where there is no run, or another program's run.json."""
    try:
        return run.cam_record().settings.classes
    except ArtifactError:
        return ()


def _classes_of(folder: Path, prompts: str | None, say: Callable[[str], None]) -> tuple[str, ...]:
    """Return what the labels in a folder of masks are called."""
    if prompts is None:
        for parent in folder.resolve().parents[:2]:
            if known := _recorded_classes(Run(parent)):
                return known
        say("classes: VOC's 20, for want of other names (--prompts)")
    return load_vocabulary(prompts or "voc").classes


def score_relabelled(
    run: Run,
    gt: Path | None,
    data: Dataset,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Scores]:
    """Score a segmenter's masks of the run's own images.

    Args:
        run: The run folder.
        gt: Folder of ground-truth masks, if not the data set's.
        data: The run's images, of which it was said already what cannot be scored.
        progress: Called after each image.
        say: Told what is missing or out of date.

    Returns:
        Two rows of scores, less what cannot be scored; none if there are no such masks with ground
        truth.

    Raises:
        ClipesError: As for ``evaluate_run``.
    """
    files = run.relabelled
    if not files.ids("pseudo"):
        return {}
    truths = _truths(data, gt, ignore)
    some = _made(files, "pseudo", truths, lambda remark: say(f"{RELABELLED}/{remark}"))
    if not some:
        return {}
    if run.relabel_record() is not None:  # else another program put them there
        scored = [sample for sample in data.samples if sample.id in some]
        _say_stale(Relabelled.of(run), scored, Listener(lambda it: say(f"{RELABELLED}: {it}")))
    output = Output(
        RELABELLED,
        files.pseudo_path,
        lambda id_: _pseudo_masks(files.load_pseudo(id_), RELABELLED, CONFIDENT_RELABELLED),
    )
    return score_output(output, some, truths.values(), len(data.classes), progress, say)[0]


def score_segmenter(
    run: Run,
    root: Path | None,
    gt: Path | None,
    data: Dataset,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Scores]:
    """Score the predictions of a trained segmenter, on whichever images it was asked.

    Args:
        run: The run folder.
        root: Where the data set is, if not where run.json says.
        gt: Folder of ground-truth masks, if not the data set's.
        data: The run's own images, of which it was said already what cannot be scored.
        progress: Called after each image.
        say: Told what cannot be scored of others.

    Returns:
        One row of scores; none if there are no predictions with ground truth, or no saying of which
        images they are.

    Raises:
        ClipesError: As for ``evaluate_run``.
    """
    if not run.ids("predictions"):
        return {}
    record = run.train_record()
    try:
        asked = _predicted(run, root, data, record)
    except ClipesError as error:  # the scores of the run's own masks are none the worse for it
        say(f"no scores of the segmenter: {error}")
        return {}
    name = segmenter_name(None if record is None else record.settings.val)
    tell = ignore if asked is data else lambda remark: say(f"{name}: {remark}")
    if remark := left_out(asked):
        tell(remark)
    truths = _truths(asked, gt, tell)
    if not truths:
        say(f"{name}: no scores, its images have no ground truth")
    some = _made(run, "predictions", truths, say)
    folder = run.root / "predictions"
    paths = {id_: folder / f"{id_}.png" for id_ in some}
    output = Output(name, paths.__getitem__, lambda id_: {name: read_mask(paths[id_])})
    # Of few images to predict none may show a class: the run's own tell whether masks ever do.
    known = truths | _truths(data, gt, ignore)
    return score_output(output, some, known.values(), len(data.classes), progress, say)[0]


def _predicted(run: Run, root: Path | None, data: Dataset, record: TrainRecord | None) -> Dataset:
    """Open the images that a segmenter was asked, ``data`` where these are the run's own.

    Raises:
        ClipesError: They cannot be opened, as where their list is gone.
    """
    # Masks that another program put there have no such section: they are of the run's images.
    if record is None:
        return data
    if record.settings.val is not None:  # to be predicted, an image needs no labels
        return reopen_all(run, root, record.settings.val)
    return data if record.settings.split is None else reopen(run, root, record.settings.split)


def _made(
    run: Run, folder: str, truths: Mapping[str, Path], say: Callable[[str], None]
) -> dict[str, Path]:
    """Return the ground truth of the images of which a folder holds output; say what it lacks."""
    present = set(run.ids(folder))
    some = {id_: path for id_, path in truths.items() if id_ in present}
    if present and len(some) < len(truths):
        missing = next(id_ for id_ in truths if id_ not in some)
        say(
            f"{folder}: {len(truths) - len(some)} of {len(truths)} images have none yet, the first "
            f"is {missing}"
        )
    return some


def _truths(data: Dataset, gt: Path | None, say: Callable[[str], None]) -> dict[str, Path]:
    """Return the ground-truth masks there are, by id; say how many there are not."""
    known = None if gt is None else find_masks(gt, "--gt")
    truths = {
        sample.id: truth
        for sample in data.samples
        if (truth := sample.mask if known is None else known.get(sample.id)) is not None
        and truth.is_file()
    }
    missing = [sample.id for sample in data.samples if sample.id not in truths]
    if truths and missing:
        say(
            f"{len(missing)} of {len(data.samples)} images have no ground truth and are not "
            f"scored, the first is {missing[0]}"
        )
    return truths


def confident(pseudo: PseudoLabel, threshold: float = CONFIDENCE_THRESHOLD) -> UInt8Array:
    """Return the (H, W) mask with ``IGNORE`` where the confidence is below ``threshold``."""
    kept: UInt8Array = np.where(pseudo.confidence >= threshold, pseudo.mask, IGNORE)
    return kept.astype(np.uint8)


def _pseudo_masks(
    pseudo: PseudoLabel, name: str = MASKS, where_confident: str = CONFIDENT_MASKS
) -> dict[str, UInt8Array]:
    return {name: pseudo.mask, where_confident: confident(pseudo)}


def _cam_masks(run: Run, image_id: str, exponents: Sequence[float]) -> dict[str, UInt8Array]:
    cams = run.load_cams(image_id, most=MAX_TILED_PIXELS)
    names = map(maps_name, exponents)
    return dict(zip(names, cam_masks(cams, exponents), strict=True))


def _say_absent(
    samples: Sequence[Sample],
    classes: Sequence[str],
    found: Container[int],
    say: Callable[[str], None],
) -> None:
    """Say which classes images are labelled with that their ground truth never shows.

    It may be right, but it is also what masks look like that count classes otherwise.
    """
    labelled = {label for sample in samples for label in sample.labels}
    absent = [classes[label] for label in sorted(labelled) if value_of(label) not in found]
    if absent:
        names = ", ".join(absent[:_NAMES_SHOWN]) + (", ..." if len(absent) > _NAMES_SHOWN else "")
        say(f"labelled, but nowhere in the ground truth of these images: {names}; {RULE}")
