"""Labels for images that have none: zero-shot tags, in a file for a person to look through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clipes.choices import Precision
from clipes.config import TagParams
from clipes.datasets import Dataset
from clipes.datasets.base import recorded_split
from clipes.errors import UsageError, WeightsError
from clipes.listener import Listener
from clipes.maps.tag_odds import class_probabilities
from clipes.maps.tags import Candidates, Tagger
from clipes.run.folder import Run
from clipes.run.loop import Outcome, Summary, for_each
from clipes.run.origin import read_picture
from clipes.stages.cam import ClipRequest, DataRequest
from clipes.stages.setup import Clip, load_clip, load_dino, that_tags
from clipes.stages.tag_candidates import is_kept, keep, kept
from clipes.stages.tag_file import Tagged, add_tags, open_tagged, untagged
from clipes.towers.side_by_side import DINO, Towers
from clipes.types import Failure, FloatArray, Int64Array, Sample, UInt8Array
from clipes.words.encode import fingerprint


@dataclass(frozen=True)
class TagRequest:
    """How images are tagged.

    Attributes:
        params: Settings.
        clip: What was asked for of the towers; DINOv2 is loaded where it is not there yet.
        split: The list of images that the data set comes from.
        command: The command line, for the record.
        only_look: Take the tags as they are: other processes work on the same run.
    """

    params: TagParams
    clip: ClipRequest
    split: str | None = None
    command: str = ""
    only_look: bool = False


def tag(
    request: TagRequest, data: Dataset, clip: Clip, run: Run, listener: Listener
) -> tuple[Dataset, Summary]:
    """Write ``labels.csv`` of a run, and open the data set with it.

    Args:
        request: What is asked for.
        data: Images without labels, and the classes to look for.
        clip: CLIP with the vectors of the classes.
        run: The run folder.
        listener: Who is told where the tags are, and how it goes.

    Returns:
        The data set with the tags as labels, and how tagging went.

    Raises:
        RunConflictError: The run has tags that were made with other settings.
        UsageError: There are no tags yet, and ``only_look`` is true.
        WeightsError: DINOv2's weights cannot be had.
    """
    path = run.tags_path
    if request.only_look and not path.exists():
        raise UsageError(
            f"there is no {path} yet, and shards cannot share the work",
            "run 'clipes tag' with the same options first",
        )
    todo, summary = untagged(data.samples, path), Summary(0, 0, ())
    if request.only_look or not todo:  # a finished run may be read-only
        run.check_settings("tag", _settings(request, data, clip, _recorded_towers(run)))
        missed = tuple(Failure(sample.id, f"no tags in {path}") for sample in todo)
        summary = replace(summary, failures=missed)
    else:
        towers = _with_dino(clip.towers, request.clip, listener)
        settings = _settings(request, data, clip, {DINO: towers.others[DINO].digest})
        run.begin("tag", settings, request.command, {"root": str(data.root.absolute())})
        tagger = Tagger(towers, clip.text, request.params)
        summary = _ask(todo, tagger, request.params, data, run, listener)
        _decide(todo, request.params, data, run, listener)
    labelled = open_tagged(data, run, request.split)
    _say_tagged(data, labelled, path, listener)
    return labelled, replace(summary, skipped=len(data.samples) - len(todo))


def _settings(
    request: TagRequest, data: Dataset, clip: Clip, towers: Mapping[str, str]
) -> dict[str, object]:
    return {
        "dataset": data.name,
        "split": recorded_split(data.root, request.split),
        "classes": data.classes,
        "weights": {"name": clip.weights.name, "sha256": clip.weights.sha256},
        "text": {"sha256": fingerprint(clip.text), "note": clip.text.note},
        "towers": dict(towers),
        "tags": asdict(request.params),
    }


def _recorded_towers(run: Run) -> Mapping[str, str]:
    """Return the digests of the towers that tags were made with: they are not loaded to look."""
    stages = run.manifest()["stages"] if run.exists() else {}
    settings = (stages.get("tag") or {}).get("settings") or {}
    towers: Mapping[str, str] = settings.get("towers") or {}
    return towers


def _with_dino(towers: Towers, asked: ClipRequest, listener: Listener) -> Towers:
    """Return the towers with DINOv2 among them, though the preset of the maps does without."""
    if DINO in towers.others:
        return towers
    try:
        dino = load_dino(asked.dino, asked.device, listener, Precision(asked.precision))
    except WeightsError as error:
        remedy = f"{error.remedy}; tags cannot do without, labels of your own can"
        raise WeightsError(error.what, remedy) from error
    return replace(towers, others={DINO: dino})


def _ask(
    todo: Sequence[Sample],
    tagger: Callable[[UInt8Array], Candidates],
    params: TagParams,
    data: Dataset,
    run: Run,
    listener: Listener,
) -> Summary:
    """Keep what each image says of the classes."""
    count = params.count(len(data.classes))

    def ask(sample: Sample) -> None:
        pixels, picture = read_picture(sample.image)
        keep(run, sample.id, tagger(pixels), picture.sha256)

    with listener.progress("tag") as progress:
        return for_each(
            ask,
            todo,
            is_done=lambda sample: is_kept(run, sample, count),
            progress=progress,
            report=listener.report,
        )


def _decide(
    todo: Sequence[Sample], params: TagParams, data: Dataset, run: Run, listener: Listener
) -> None:
    """Choose tags of the images that have none, by what all images say."""
    count, found = params.count(len(data.classes)), []
    with listener.progress("look") as progress:
        for index, sample in enumerate(data.samples):
            if (known := kept(run, sample.id, count)) is not None:
                found.append((sample, known))
            progress(index + 1, len(data.samples))
    wanted, chosen = {sample.id for sample in todo}, []
    if found:
        said = [known.candidates for _, known in found]
        odds = class_probabilities(said, len(data.classes), params)
        for (sample, known), row in zip(found, odds, strict=True):
            if sample.id in wanted:
                tags = choose_tags(known.candidates.labels, row, params.threshold)
                chosen.append(Tagged(sample, known.picture, tags))
    add_tags(run.tags_path, chosen, data.classes)


def choose_tags(
    labels: Int64Array, probabilities: FloatArray, threshold: float
) -> dict[int, float]:
    """Return the classes whose probability reaches ``threshold``.

    >>> import numpy as np
    >>> choose_tags(np.array([7, 2]), np.array([0.3, 0.5]), 0.4)
    {2: 0.5}
    """
    pairs = zip(labels.tolist(), probabilities.tolist(), strict=True)
    return {label: odds for label, odds in pairs if odds >= threshold}


def _say_tagged(data: Dataset, labelled: Dataset, path: Path, listener: Listener) -> None:
    for remark in labelled.remarks:
        if remark not in data.remarks:  # those were said when the images were found
            listener.say(remark)
    listener.say(
        f"tags: {path}; look through them and correct them, then run the same command again"
    )
    if labelled.empty:
        listener.say(f"{len(labelled.empty)} images show none of the classes")


def tag_images(
    images: DataRequest, asked: ClipRequest, run: Run, listener: Listener, *, command: str = ""
) -> Outcome:
    """Tag the images of a data set: what ``cam`` does first where labels are ``auto``.

    Args:
        images: The images, without labels, and the settings of the tags.
        asked: What is to look at them.
        run: The run folder.
        listener: Who is told how it goes.
        command: The command line, for the record.

    Raises:
        RunConflictError: The run has tags that were made with other settings.
        ClipesError: Data set, weights or words cannot be used.
    """
    vocabulary, data = images.open()
    for remark in data.remarks:
        listener.say(remark)
    clip = that_tags(load_clip(asked, vocabulary, listener), vocabulary)
    how = TagRequest(images.tags, asked, images.split, command)
    labelled, summary = tag(how, data, clip, run, listener)
    return Outcome(summary, labelled.failures)
