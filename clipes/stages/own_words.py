"""Class vectors that a run fits to its own images and labels, where no others are to be had.

One pass over some of its images; the vectors lie in the run folder, in the format of
``--text-features``, with what they were fitted to. All shards use the same ones.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipes.datasets import Dataset
from clipes.disk.files import write_arrays
from clipes.errors import ImageError
from clipes.listener import Listener, ignore
from clipes.run.folder import Run
from clipes.run.origin import digest, mark_seen
from clipes.stages.looks_sources import Source, write_sources
from clipes.stages.words_sources import KNOWN, read_words, unfitted, words_are_current
from clipes.standin.beside import fit_beside
from clipes.standin.fit import EncodedImage, Fitted, LabelledImage, encode
from clipes.towers.clip import Backbone
from clipes.types import evenly_spaced
from clipes.weights import Weights
from clipes.words.features import TextFeatures, features_to_arrays, load_text_features, stand_in

ENOUGH = 10
"""Images of a class from which on more add little; ``benchmarks/words.py`` draws the curve.

IoU of VOC's classes left out of the stand-in, preset ``fast``, on 60 images of voc_sample: 34 with
one image of each class, 47 with two, 52 with five, 55 with all (up to eight).
"""

MOST = 50
"""Images of a class that are looked at; more would only take time."""

_TOLD = 5  # class names in a line


def own_words(
    data: Dataset,
    run: Run,
    backbone: Backbone,
    weights: Weights,
    max_patches: int,
    listener: Listener,
    *,
    keep: bool = False,
    workers: int = 1,
) -> Fitted:
    """Fit vectors to a run's labels, or read those that were fitted before.

    They are fitted anew if an image that they were fitted to has other labels now, is another
    picture or is gone, or if there is the first image of a class.

    Args:
        data: All images of the run with their labels, and its classes.
        run: The run folder.
        backbone: CLIP's image tower.
        weights: Where it comes from.
        max_patches: Size above which images are shrunk, see ``CamParams``.
        listener: Told what is done and why, and how it goes.
        keep: Keep what was fitted whatever has changed since.
        workers: Images at once.

    Returns:
        The vectors, and how many images each class had whose vector was fitted; 0 where none shows
        the class, which has no vector of its own.

    Raises:
        ImageError: None of the images can be read.
        VocabularyError: All images are labelled alike.
        WriteError: The run folder cannot be written to.
    """
    made_with = digest([weights.sha256, max_patches])
    waiting = f"waiting for another process, which fits class vectors: {run.words_path}"
    with run.claim("words", on_wait=lambda: listener.say(waiting)):
        arrays = read_words(run, data.classes)
        same = arrays is not None and arrays["made_with"] == made_with
        if same and not words_are_current(run, data, keep=keep):
            listener.say(
                "images that class vectors were fitted to have other labels, are other pictures or "
                "are gone (--keep-looks keeps them), or a class has its first image: they are "
                "fitted anew, and all maps are made again"
            )
            same = False
        if arrays is None or not same:
            started = time.time_ns()
            arrays = _fit(data, backbone, weights, max_patches, workers, listener)
            arrays["made_with"] = np.array(made_with)
            write_arrays(run.words_path, arrays, compress=False)
            mark_seen(run.words_path, started)  # a picture replaced since is looked at again
        # Read back even when just made: scaling to length 1 on load moves the last bit.
        text = load_text_features(run.words_path)
    counts = zip(data.classes, arrays["fitted"].tolist(), strict=True)
    fitted = {name: count for name, count in counts if count != KNOWN}
    _say_fitted(fitted, run.words_path, listener)
    return Fitted(text, fitted)


def _fit(
    data: Dataset,
    backbone: Backbone,
    weights: Weights,
    max_patches: int,
    workers: int,
    listener: Listener,
) -> dict[str, npt.NDArray[Any]]:
    """Return what is kept: the vectors, what they were fitted to, and how many images each had."""
    known = _known(backbone)
    new = data.classes if known is None else known.lacks(data.classes)
    listener.say(
        f"text: {weights.name} has no text tower, and no vectors are shipped for {_listed(new)}"
        f"{_meant(new, known)}: they are fitted to these images and labels (--no-fit stops instead)"
    )
    images = _chosen(data)
    # The last pass says what is wrong with an image.
    quiet = replace(listener, report=ignore)
    encoded = encode(backbone, images, quiet, max_patches=max_patches, workers=workers)
    if not encoded:
        raise ImageError(
            f"none of {len(images)} images can be read, so no vectors can be fitted to them",
            "'clipes check' says what is wrong with each",
        )
    with listener.progress("fit") as progress:
        fitted = fit_beside(
            encoded,
            known,
            logit_scale=backbone.logit_scale,
            model=f"{weights.model} {weights.name}",
            note=_note(new, len(encoded), known),
            progress=progress,
        )
    kept = dict.fromkeys(fitted.text.classes, KNOWN) | dict(fitted.images)
    counts = np.array([kept.get(name, 0) for name in data.classes], np.int64)
    return {
        **features_to_arrays(for_all(fitted.text, data.classes)),
        **write_sources(_sources(encoded, data.classes)),
        "fitted": counts,
        "unfitted": np.array([*unfitted(data, counts)], np.str_),
    }


def _known(backbone: Backbone) -> TextFeatures | None:
    """Return the shipped vectors, if they are of a tower like this one."""
    shipped = stand_in()
    fits = shipped.class_vectors.shape[1] == backbone.visual.proj.shape[1]
    return shipped if fits else None


def _chosen(data: Dataset) -> list[LabelledImage]:
    """Return the images to look at: all, or so many of each class, evenly spaced."""
    of_class = defaultdict(list)
    for index, sample in enumerate(data.samples):
        for label in sample.labels:
            of_class[label].append(index)
    chosen = {of[k] for of in of_class.values() for k in evenly_spaced(len(of), MOST)}
    samples = [data.samples[index] for index in sorted(chosen)]
    return [LabelledImage(s.id, s.image, tuple(data.classes[k] for k in s.labels)) for s in samples]


def for_all(text: TextFeatures, classes: tuple[str, ...]) -> TextFeatures:
    """Return vectors of all classes, in mask order.

    A class that no image shows is never asked for: it does not matter what stands for it until it
    has an image, and then all is fitted anew.
    """
    absent = text.lacks(classes)
    anything = text.background_vectors[[-1] * len(absent)]
    return replace(
        text,
        classes=(*text.classes, *absent),
        class_vectors=np.concatenate([text.class_vectors, anything]),
    ).for_classes(classes)


def _sources(encoded: Sequence[EncodedImage], classes: tuple[str, ...]) -> list[Source]:
    """Return what the vectors were fitted to."""
    return [
        Source(image.id, tuple(sorted(map(classes.index, image.names))), image.picture)
        for image in encoded
        if image.picture is not None
    ]


def _note(new: Sequence[str], images: int, known: TextFeatures | None) -> str:
    others = "; the others are the shipped stand-in" if known is not None else ""
    return (
        f"vectors of {_listed(new)} fitted to the labels of {images} of the run's own images"
        f"{others}; they are not text features"
    )


def _say_fitted(fitted: Mapping[str, int], path: Path, listener: Listener) -> None:
    counts = ", ".join(f"{name} {count}" for name, count in fitted.items() if count)
    listener.say(f"text: {path}, fitted to this run; images of each class: {counts}")
    few = [name for name, count in fitted.items() if 0 < count < ENOUGH]
    if few:
        listener.say(
            f"text: few images of {_listed(few)}: look at the masks, and add images if they are "
            f"poor; {ENOUGH} of a class are enough"
        )


def _meant(new: Sequence[str], known: TextFeatures | None) -> str:
    """Return which shipped names may be meant, if any."""
    meant = {} if known is None else {name: known.meant(name) for name in new[:_TOLD]}
    near = [f"'{other}' for '{name}'" for name, other in meant.items() if other is not None]
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if names[_TOLD:] else ""
    return ", ".join(map(repr, names[:_TOLD])) + more
