"""Labels for images that have none: zero-shot tags, in a file for a person to look through."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial

import torch

from clipes.config import CamParams, TagParams
from clipes.datasets import Dataset
from clipes.errors import UsageError
from clipes.maps.tags import choose_tags, class_scores
from clipes.run.folder import Run
from clipes.run.loop import Summary
from clipes.stages.setup import Clip
from clipes.stages.tag_file import make_tags, open_tagged, untagged
from clipes.towers.clip import Backbone
from clipes.towers.taps import Taps
from clipes.types import Failure, Float32Array, Progress, UInt8Array
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
    settings = {
        "dataset": data.name,
        "split": split,
        "classes": data.classes,
        "weights": {"name": clip.weights.name, "sha256": clip.weights.sha256},
        "text": {"sha256": fingerprint(clip.text), "note": clip.text.note},
        "tags": asdict(params),
    }
    run.check_settings("tag", settings)
    todo = untagged(data.samples, path)
    if todo:  # a finished run may be read-only
        run.begin("tag", settings, command, {"root": str(data.root.absolute())})
    if only_look:
        missed = [Failure(sample.id, f"no tags in {path}") for sample in todo]
        summary = Summary(0, len(data.samples) - len(missed), tuple(missed))
    else:
        tagger = Tagger(clip.backbone, clip.text, params)
        with progress("tag") as bar:
            summary = make_tags(
                data.samples,
                todo,
                data.classes,
                tagger,
                partial(choose_tags, threshold=params.threshold),
                path,
                progress=bar,
                report=report,
            )
    labelled = open_tagged(data, run, split)
    for remark in labelled.remarks:
        if remark not in data.remarks:  # those were told when the images were found
            say(remark)
    say(f"tags: {path}; look through them and correct them, then run the same command again")
    if labelled.empty:
        say(f"{len(labelled.empty)} images show none of the classes")
    return labelled, summary
