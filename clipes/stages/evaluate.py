"""Scores of every stage that has output, against ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipes.artifacts import Run
from clipes.config import CONFIDENCE_THRESHOLD
from clipes.datasets import Dataset
from clipes.errors import ArtifactError, ClipesError, DatasetError, UsageError
from clipes.files import list_files
from clipes.images import read_mask
from clipes.metrics import ConfusionMatrix, Scores
from clipes.pseudo import in_mask_order, label_pixels, upsample, with_background
from clipes.stages.reopen import reopen
from clipes.types import IGNORE, CamMaps, Progress, PseudoLabel, Sample, UInt8Array
from clipes.vocabulary import load_vocabulary


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


def evaluate_run(
    run: Run,
    root: Path | None,
    gt: Path | None,
    exponents: Sequence[float],
    *,
    progress: Progress,
    say: Callable[[str], None],
) -> Scored:
    """Score every stage of a run that has output.

    Args:
        run: The run folder.
        root: Where the data set is, if not where run.json says.
        gt: Folder of ground-truth masks, if not the data set's.
        exponents: Background exponents to score the maps with.
        progress: Called after each image of each stage.
        say: Told what cannot be scored.

    Raises:
        DatasetError: There is no ground truth.
        ArtifactError: Nothing to score, or an output does not fit its ground truth.
    """
    data = reopen(run, root)
    truths = _truths(data, gt)
    if not truths:
        raise DatasetError(
            f"no ground-truth masks for the images of {run.root}",
            "give their folder with --gt; masks and reports need none",
        )
    outputs: dict[str, Callable[[str], dict[str, UInt8Array]]] = {
        "cams": lambda id_: dict(_cam_masks(run.load_cams(id_), exponents)),
        "pseudo": lambda id_: _pseudo_masks(run.load_pseudo(id_)),
    }
    stages: dict[str, Scores] = {}
    for folder, masks in outputs.items():
        present = set(run.ids(folder))
        some = {id_: path for id_, path in truths.items() if id_ in present}
        if some:
            stages |= _score(((id_, masks(id_)) for id_ in some), some, len(data.classes), progress)
        if present and len(some) < len(truths):
            say(f"{folder}: {len(truths) - len(some)} of {len(truths)} images have none yet")
    stages |= _segmenter(run, root, gt, data, progress, say)
    if not stages:
        raise ArtifactError(f"nothing to score in {run.root}", "run 'clipes cam' first")
    return Scored(data.classes, stages)


def evaluate_folder(
    folder: Path,
    gt: Path | None,
    prompts: str,
    *,
    progress: Progress,
    say: Callable[[str], None],
) -> Scored:
    """Score a folder of masks ``<id>.png`` against one of ground truth.

    Args:
        folder: 8-bit PNG masks.
        gt: Folder of ground-truth masks of the same names.
        prompts: Vocabulary that names the classes.
        progress: Called after each image.
        say: Told what cannot be scored.

    Raises:
        UsageError: ``gt`` is missing.
        ArtifactError: No mask has ground truth, or one does not fit it.
    """
    if gt is None:
        raise UsageError(f"{folder} is no run folder", "give the ground truth with --gt DIR")
    classes = load_vocabulary(prompts).classes
    masks = {path.stem: path for path in list_files(folder, ".png")}
    truths = {id_: gt / f"{id_}.png" for id_ in masks if (gt / f"{id_}.png").is_file()}
    if not truths:
        raise ArtifactError(
            f"no mask <id>.png of {folder} has ground truth in {gt}", "check both folders"
        )
    if len(truths) < len(masks):
        say(f"{len(masks) - len(truths)} of {len(masks)} masks have no ground truth in {gt}")
    named = ((id_, {"masks": read_mask(masks[id_])}) for id_ in truths)
    return Scored(classes, _score(named, truths, len(classes), progress))


def _segmenter(
    run: Run,
    root: Path | None,
    gt: Path | None,
    data: Dataset,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Scores]:
    """Score the predictions of a trained segmenter, on whichever images it was asked."""
    present = set(run.ids("predictions"))
    if not present:
        return {}
    # Masks that another program put there have no such section: they are of the run's images.
    settings = run.manifest()["stages"].get("train-seg", {}).get("settings", {})
    val, split = settings.get("val"), settings.get("split")
    asked = reopen(run, root, val or split) if val or split else data
    truths = _truths(asked, gt)
    some = {id_: path for id_, path in truths.items() if id_ in present}
    if len(some) < len(truths):
        say(f"predictions: {len(truths) - len(some)} of {len(truths)} images have none yet")
    name = "segmenter, train" if val is None else f"segmenter, {Path(val).stem}"
    folder = run.root / "predictions"
    masks = ((id_, {name: read_mask(folder / f"{id_}.png")}) for id_ in some)
    return _score(masks, some, len(data.classes), progress) if some else {}


def _truths(data: Dataset, gt: Path | None) -> dict[str, Path]:
    """Return the ground-truth masks there are, by id."""
    return {
        sample.id: truth
        for sample in data.samples
        if (truth := _truth(sample, gt)) is not None and truth.is_file()
    }


def _truth(sample: Sample, gt: Path | None) -> Path | None:
    return sample.mask if gt is None else gt / f"{sample.id}.png"


def confident(pseudo: PseudoLabel, threshold: float = CONFIDENCE_THRESHOLD) -> UInt8Array:
    """Return the (H, W) mask with ``IGNORE`` where the confidence is below ``threshold``."""
    kept: UInt8Array = np.where(pseudo.confidence >= threshold, pseudo.mask, IGNORE)
    return kept.astype(np.uint8)


def _pseudo_masks(pseudo: PseudoLabel) -> dict[str, UInt8Array]:
    return {"CRF": pseudo.mask, f"CRF >= {CONFIDENCE_THRESHOLD}": confident(pseudo)}


def _cam_masks(cams: CamMaps, exponents: Sequence[float]) -> Iterator[tuple[str, UInt8Array]]:
    cams = in_mask_order(cams)
    full = upsample(cams.maps, cams.size)
    for exponent in exponents:
        scores = with_background(full, exponent)
        yield f"CAM (alpha {exponent:g})", label_pixels(scores, cams.labels)


def _score(
    masks: Iterable[tuple[str, Mapping[str, UInt8Array]]],
    truths: Mapping[str, Path],
    n_classes: int,
    progress: Progress,
) -> dict[str, Scores]:
    """Stream (id, {name: mask}) pairs into one confusion matrix per name."""
    matrices: dict[str, ConfusionMatrix] = {}
    progress(0, len(truths))
    for index, (id_, named) in enumerate(masks):
        truth = read_mask(truths[id_])
        for name, mask in named.items():
            matrix = matrices.setdefault(name, ConfusionMatrix(n_classes + 1))
            try:
                matrix.update(truth, mask)
            except ClipesError as error:
                raise type(error)(f"{id_} ({name}): {error.what}", error.remedy) from error
        progress(index + 1, len(truths))
    return {name: matrix.scores() for name, matrix in matrices.items()}
