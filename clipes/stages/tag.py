"""Labels for images that have none: zero-shot tags, in a file for a person to look through."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch

from clipes.artifacts import Run
from clipes.clip.backbone import Backbone
from clipes.config import CamParams, TagParams
from clipes.datasets import Dataset, open_dataset
from clipes.datasets.base import path_id, read_list
from clipes.errors import ClipesError, DatasetError, UsageError
from clipes.files import write_text
from clipes.images import read_image
from clipes.runner import Summary
from clipes.stages.features import fingerprint
from clipes.stages.setup import Clip
from clipes.tagging import choose_tags, class_scores
from clipes.text_features import TextFeatures
from clipes.types import Failure, Float32Array, Progress, Sample, UInt8Array

_COLUMNS = ("image", "labels", "scores")
_SECONDS_BETWEEN_WRITES = 20.0


class Tagger:
    """Scores the classes of a vocabulary in one image after another.

    Args:
        backbone: CLIP's image tower.
        text: Vectors of the classes and of the background words.
        params: Settings.
    """

    def __init__(self, backbone: Backbone, text: TextFeatures, params: TagParams) -> None:
        self._backbone = backbone
        self._params = params
        dtype = backbone.visual.proj.dtype
        self._classes = torch.from_numpy(text.class_vectors).to(backbone.device, dtype)
        self._background = torch.from_numpy(text.background_vectors).to(backbone.device, dtype)

    def __call__(self, image: UInt8Array) -> Float32Array:
        """Return the (C,) scores of the classes in ``image`` (H0, W0, 3) RGB uint8."""
        prepared = self._backbone.prepare(image, CamParams().max_patches)
        encoding = self._backbone.encode_patches(prepared[None], affinity_blocks=1)
        return class_scores(
            self._backbone, encoding.last.of(0), self._classes, self._background, self._params
        )


def tag(
    data: Dataset,
    clip: Clip,
    run: Run,
    params: TagParams,
    *,
    split: str | None,
    command: str,
    only_look: bool,
    say: Callable[[str], None],
    progress: Callable[[str], AbstractContextManager[Progress]],
    report: Callable[[Failure], None],
) -> tuple[Dataset, Summary]:
    """Write ``labels.csv`` of a run, and open the data set with it.

    Args:
        data: Images without labels, and the classes to look for.
        clip: CLIP with the vectors of the classes.
        run: The run folder.
        params: Settings.
        split: The list of images that ``data`` comes from.
        command: The command line.
        only_look: Take the tags as they are: other processes work on the same run.
        say: Told where the tags are.
        progress: Opens a progress bar.
        report: Called with each image that cannot be tagged.

    Returns:
        The data set with the tags as labels, and how tagging went.

    Raises:
        RunConflictError: The run has tags that were made with other settings.
        UsageError: There are no tags yet, and ``only_look`` is true.
    """
    path = run.tags_path
    if only_look and not path.exists():
        raise UsageError(
            f"there is no {path} yet, and shards cannot share the work",
            "run 'clipes tag' with the same options first",
        )
    run.begin(
        "tag",
        settings={
            "dataset": data.name,
            "split": split,
            "classes": data.classes,
            "weights": {"name": clip.weights.name, "sha256": clip.weights.sha256},
            "text": {"sha256": fingerprint(clip.text), "note": clip.text.note},
            "tags": asdict(params),
        },
        command=command,
        facts={"root": str(data.root.absolute())},
    )
    if only_look:
        missed = [Failure(s.id, f"no tags in {path}") for s in untagged(data.samples, path)]
        summary = Summary(0, len(data.samples) - len(missed), tuple(missed))
    else:
        tagger = Tagger(clip.backbone, clip.text, params)
        with progress("tag") as bar:
            summary = make_tags(
                data.samples,
                data.classes,
                tagger,
                params.threshold,
                path,
                progress=bar,
                report=report,
            )
    labelled = open_dataset(
        data.name, root=data.root, split=split, labels=path, classes=data.classes
    ).without_unlabelled()
    say(f"tags: {path}; look through them and correct them, then run the same command again")
    if labelled.empty:
        say(f"{len(labelled.empty)} images show none of the classes")
    return labelled, summary


def make_tags(
    samples: Sequence[Sample],
    classes: Sequence[str],
    tagger: Callable[[UInt8Array], Float32Array],
    threshold: float,
    path: Path,
    *,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Tag every image that the label file ``path`` does not list yet.

    The file has the columns image, labels, scores, the best label first; an image that shows none
    of the classes has empty ones. Rows that are there stay as they are: a person may have corrected
    them.

    Args:
        samples: Images.
        classes: Class names, in the order of the scores.
        tagger: Scores the classes of an image.
        threshold: Score from which a class is a tag.
        path: The label file; it is written every few seconds, so that little is lost.
        progress: Called after each image.
        report: Called with each image that cannot be tagged; the others go on.

    Raises:
        DatasetError: The label file has lost its columns.
        ArtifactError: The label file cannot be written.
    """
    rows = _read_rows(path) if path.exists() else []
    todo = untagged(samples, path)
    # A name that holds a separator would be taken for two.
    words = [str(k) if set(";|") & set(name) else name for k, name in enumerate(classes)]
    failures: list[Failure] = []
    written = time.monotonic()
    progress(0, len(todo))
    for index, sample in enumerate(todo):
        try:
            scores = tagger(read_image(sample.image))
            tags = choose_tags(scores, threshold)
            row = (words[k] for k in tags), (f"{scores[k]:.2f}" for k in tags)
            rows.append([f"{sample.id}{sample.image.suffix}", *map(";".join, row)])
        except ClipesError as error:
            failures.append(Failure(sample.id, str(error)))
            report(failures[-1])
        if index + 1 == len(todo) or time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
            _write_rows(path, rows)
            written = time.monotonic()
        progress(index + 1, len(todo))
    return Summary(len(todo) - len(failures), len(samples) - len(todo), tuple(failures))


def untagged(samples: Sequence[Sample], path: Path) -> list[Sample]:
    """Return the images that the label file ``path`` does not list, all if there is none."""
    listed = {_id(row[0]) for row in _read_rows(path)} if path.exists() else set()
    return [sample for sample in samples if sample.id not in listed]


def drop_changed(run: Run, data: Dataset) -> int:
    """Remove maps and masks of a run that were made from other labels than ``data`` has now.

    Returns:
        Of how many images.
    """
    labels = {sample.id: sorted(sample.labels) for sample in data.samples}
    labels |= {id_: [] for id_ in data.empty}
    changed = [
        id_
        for id_ in run.ids("cams")
        if id_ in labels and sorted(run.load_cams(id_).labels.tolist()) != labels[id_]
    ]
    for id_ in changed:
        # The maps last: as long as they are there, the others are looked for again.
        for path in (run.pseudo_path(id_), run.confidence_path(id_), run.cams_path(id_)):
            path.unlink(missing_ok=True)
    return len(changed)


def _id(name: str) -> str:
    try:
        return path_id(name)
    except DatasetError:
        return ""


def _read_rows(path: Path) -> list[list[str]]:
    """Read the columns of a label file that a person may have edited in a spreadsheet."""
    text = read_list(path)
    header = text.partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise DatasetError(f"{path} is no CSV: {error}", "save it again as CSV") from error
    if not {"image", "labels"} <= set(header.strip().split(delimiter)):
        raise DatasetError(f"{path} has no header 'image,labels'", "put it on the first line")
    return [[row.get(column) or "" for column in _COLUMNS] for row in rows]


def _write_rows(path: Path, rows: Sequence[Sequence[str]]) -> None:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([_COLUMNS, *rows])
    write_text(path, table.getvalue())
