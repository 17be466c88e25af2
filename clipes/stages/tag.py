"""Labels for images that have none: zero-shot tags, in a file for a person to look through."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from clipes.config import CamParams, TagParams
from clipes.datasets import Dataset
from clipes.errors import UsageError
from clipes.listener import Listener
from clipes.maps.tags import choose_tags, class_scores
from clipes.run.folder import Run
from clipes.run.loop import Outcome, Summary
from clipes.stages.cam import ClipRequest, DataRequest
from clipes.stages.setup import Clip, load_clip
from clipes.stages.tag_file import make_tags, open_tagged, untagged
from clipes.towers.clip import Backbone
from clipes.towers.taps import Taps
from clipes.types import Failure, Float32Array, UInt8Array
from clipes.words.encode import fingerprint
from clipes.words.features import TextFeatures


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
        encoded = self._backbone.encode(prepared[None], Taps(last="inputs"))
        return class_scores(
            self._backbone, encoded.last.of(0), self._classes, self._background, self._params
        )


@dataclass(frozen=True)
class TagRequest:
    """How images are tagged.

    Attributes:
        params: Settings.
        split: The list of images that the data set comes from.
        command: The command line, for the record.
        only_look: Take the tags as they are: other processes work on the same run.
    """

    params: TagParams
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
    """
    path, params = run.tags_path, request.params
    if request.only_look and not path.exists():
        raise UsageError(
            f"there is no {path} yet, and shards cannot share the work",
            "run 'clipes tag' with the same options first",
        )
    settings = {
        "dataset": data.name,
        "split": request.split,
        "classes": data.classes,
        "weights": {"name": clip.weights.name, "sha256": clip.weights.sha256},
        "text": {"sha256": fingerprint(clip.text), "note": clip.text.note},
        "tags": asdict(params),
    }
    run.check_settings("tag", settings)
    todo = untagged(data.samples, path)
    if todo:  # a finished run may be read-only
        run.begin("tag", settings, request.command, {"root": str(data.root.absolute())})
    if request.only_look:
        missed = tuple(Failure(sample.id, f"no tags in {path}") for sample in todo)
        summary = Summary(0, 0, missed)
    else:
        tagger = Tagger(clip.backbone, clip.text, params)
        choose = partial(choose_tags, threshold=params.threshold)
        summary = make_tags(todo, data.classes, tagger, choose, path, listener)
    labelled = open_tagged(data, run, request.split)
    _say_tagged(data, labelled, path, listener)
    return labelled, replace(summary, skipped=len(data.samples) - len(todo))


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
    clip = load_clip(asked, vocabulary, listener)
    how = TagRequest(images.tags, images.split, command)
    labelled, summary = tag(how, data, clip, run, listener)
    return Outcome(summary, labelled.failures)
