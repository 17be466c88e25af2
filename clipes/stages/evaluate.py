"""Scores of every stage that has output, against ground truth."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.datasets import Dataset
from clipes.disk.files import write_json
from clipes.disk.images import read_mask
from clipes.errors import ArtifactError, DatasetError, UsageError, WriteError
from clipes.listener import Listener, ignore
from clipes.masks.folder import find_masks, require_some
from clipes.masks.pseudo import in_mask_order, label_pixels, upsample, with_background
from clipes.masks.scores import (
    CONFIDENT_MASKS,
    CONFIDENT_RELABELLED,
    CORRECTED,
    MASKS,
    RELABELLED,
    ConfusionMatrix,
    Scores,
    maps_name,
    segmenter_name,
)
from clipes.masks.values import RULE, value_count, value_of
from clipes.run.corrected import Chosen
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.loop import in_order, waiting
from clipes.run.relabelled import Relabelled
from clipes.run.reopen import left_out, orphans, reopen
from clipes.types import IGNORE, CamMaps, Progress, PseudoLabel, Sample, UInt8Array
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


@dataclass(frozen=True)
class _Output:
    """Something that can be scored.

    Attributes:
        path: The file of an image's output.
        masks: Its masks, by the name of what is scored.
    """

    path: Callable[[str], Path]
    masks: Callable[[str], Mapping[str, UInt8Array]]


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

    Args:
        run: The run folder.
        root: Where the data set is, if not where run.json says.
        gt: Folder of ground-truth masks, if not the data set's.
        exponents: Background exponents to score the maps with.
        listener: Who is told what cannot be scored, and how far each stage is.
        use_corrected: Whether the masks are also scored with a person's in place of the run's.

    Raises:
        DatasetError: There is no ground truth.
        ArtifactError: ``gt`` is absent or holds no mask of these images; nothing to score, or an
            output does not fit its ground truth.
    """
    data, say = reopen(run, root), listener.say
    truths = _truths(data, gt, say)
    if not truths:
        if gt is not None and data.samples:
            ids = {sample.id for sample in data.samples}
            require_some(gt, ids, f"an image of {run.root}", data.samples[0].id)
        raise DatasetError(
            f"no ground-truth masks for the images of {run.root}",
            "give their folder with --gt; masks and reports need none",
        )
    lost = orphans(run, data, "cams") or orphans(run, data, "pseudo")
    for remark in filter(None, (left_out(data), lost)):
        say(remark)
    scored = [sample for sample in data.samples if sample.id in truths]
    current = Freshness.of(run, data.classes)
    _say_stale(current, scored, listener)
    with listener.progress("eval") as progress:
        stages = _score_masks(run, data, truths, exponents, progress, say)
        if use_corrected:
            stages |= _score_corrected(Chosen(run, current), data, truths, progress)
        stages |= score_relabelled(run, gt, data, progress, say)
        stages |= score_segmenter(run, root, gt, data, progress, say)
    if not stages:
        raise ArtifactError(f"nothing to score in {run.root}", "run 'clipes cam' first")
    return Scored(data.classes, stages)


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
        "cams": _Output(run.cams_path, lambda id_: _cam_masks(run.load_cams(id_), exponents)),
        "pseudo": _Output(run.pseudo_path, lambda id_: _pseudo_masks(run.load_pseudo(id_))),
    }
    stages: dict[str, Scores] = {}
    for folder, output in outputs.items():
        some = _made(run, folder, truths, say)
        if some:
            scores, found = _score(output, some, len(data.classes), progress)
            if not stages:
                _say_absent([s for s in data.samples if s.id in some], data.classes, found, say)
            stages |= scores
    return stages


def _score_corrected(
    chosen: Chosen, data: Dataset, truths: Mapping[str, Path], progress: Progress
) -> dict[str, Scores]:
    """Score the masks with a person's in place of the run's, if there are any of theirs."""
    if not chosen.has_some:
        return {}
    paths = {sample.id: chosen.files(sample).pseudo_path(sample.id) for sample in data.samples}
    some = {id_: path for id_, path in truths.items() if paths[id_].exists()}
    output = _Output(paths.__getitem__, lambda id_: {CORRECTED: read_mask(paths[id_])})
    return _score(output, some, len(data.classes), progress)[0]


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
        ArtifactError: No mask has ground truth, or one does not fit it.
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
    output = _Output(masks.__getitem__, lambda id_: {"masks": read_mask(masks[id_])})
    with listener.progress("eval") as progress:
        return Scored(classes, _score(output, truths, len(classes), progress)[0])


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
        Two rows of scores; none if there are no such masks with ground truth.

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
    output = _Output(
        files.pseudo_path,
        lambda id_: _pseudo_masks(files.load_pseudo(id_), RELABELLED, CONFIDENT_RELABELLED),
    )
    return _score(output, some, len(data.classes), progress)[0]


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
        One row of scores; none if there are no predictions with ground truth.

    Raises:
        ClipesError: As for ``evaluate_run``.
    """
    if not run.ids("predictions"):
        return {}
    # Masks that another program put there have no such section: they are of the run's images.
    record = run.train_record()
    val = None if record is None else record.settings.val
    split = None if record is None else record.settings.split
    asked = reopen(run, root, val or split) if val or split else data
    truths = _truths(asked, gt, say if asked is not data else lambda _: None)
    some = _made(run, "predictions", truths, say)
    name = segmenter_name(val)
    folder = run.root / "predictions"

    paths = {id_: folder / f"{id_}.png" for id_ in some}
    output = _Output(paths.__getitem__, lambda id_: {name: read_mask(paths[id_])})
    return _score(output, some, len(data.classes), progress)[0] if some else {}


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


def _cam_masks(cams: CamMaps, exponents: Sequence[float]) -> dict[str, UInt8Array]:
    cams = in_mask_order(cams)
    full = upsample(cams.maps, cams.size)
    return {
        maps_name(exponent): label_pixels(with_background(full, exponent), cams.labels)
        for exponent in exponents
    }


def _score(
    output: _Output, truths: Mapping[str, Path], n_classes: int, progress: Progress
) -> tuple[dict[str, Scores], set[int]]:
    """Stream masks into one confusion matrix per name.

    Returns:
        The scores by name, and the values that occur in the ground truth.

    Raises:
        ArtifactError: A mask does not fit its ground truth, or no class occurs in that.
    """
    matrices: dict[str, ConfusionMatrix] = {}
    found: set[int] = set()
    work = partial(_score_one, output=output, n_classes=n_classes)
    with closing(in_order(work, [*truths.items()], workers=None, progress=progress)) as results:
        for held, scored in results:
            found |= held
            for name, matrix in scored.items():
                matrices[name] = matrices[name] + matrix if name in matrices else matrix
    if found <= {0, IGNORE}:
        values = " and ".join(map(str, sorted(found)))
        raise ArtifactError(
            f"the ground truth shows no class: {len(truths)} masks such as "
            f"{next(iter(truths.values()))} hold only {values}",
            f"{RULE}: a single class is 1, not 255",
        )
    return {name: matrix.scores() for name, matrix in matrices.items()}, found


def _score_one(
    item: tuple[str, Path], output: _Output, n_classes: int
) -> tuple[set[int], dict[str, ConfusionMatrix]]:
    """Return the values in the ground truth of an image, and the counts of each of its masks."""
    id_, path = item
    truth, matrices = read_mask(path), {}
    for name, mask in output.masks(id_).items():
        matrices[name] = ConfusionMatrix(value_count(n_classes))
        try:
            matrices[name].update(truth, mask)
        except ArtifactError as error:
            files = f"ground truth {path}, {name} {output.path(id_)}"
            raise ArtifactError(f"{id_}: {error.what} ({files})", error.remedy) from error
    return set(np.flatnonzero(np.bincount(truth.ravel())).tolist()), matrices


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
