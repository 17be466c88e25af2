"""Ranking of templates, or of files of text features, by sharpness on images with labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from clipes.choices import Fusion
from clipes.datasets import Dataset
from clipes.disk.files import read_arrays, write_arrays
from clipes.disk.images import read_image
from clipes.errors import DatasetError, VocabularyError
from clipes.listener import Listener
from clipes.run.loop import for_each_batch, never
from clipes.stages.setup import OpenedWeights
from clipes.towers.classify import classifier_input, image_features
from clipes.towers.load import has_text
from clipes.types import Failure, Float32Array, Progress, Sample, evenly_spaced
from clipes.weights import cache_dir
from clipes.weights.cache import kept_if_possible
from clipes.words.encode import PromptEncoder, from_given
from clipes.words.features import load_text_features
from clipes.words.sharpness import class_scores, sharpness
from clipes.words.templates import Ranking, words_of
from clipes.words.vocabulary import Vocabulary, fill

_IMAGES_AT_ONCE = 32
_TEMPLATES_AT_ONCE = 16  # fills the text tower's batches where there are few classes
_LARGEST_CACHE = 1 << 32  # bytes; a million features of width 1024


class ImageFeatures:
    """CLIP's features of whole images, with a memory on disk: one file per weights and data set.

    An image is known by its path, size and time of change.

    Args:
        opened: The weights.
        root: Folder of the data set.
        cache: Folder of the memory.
        say: Told if it cannot be written.
    """

    def __init__(
        self, opened: OpenedWeights, root: Path, cache: Path, say: Callable[[str], None]
    ) -> None:
        self._opened = opened
        self._say = say
        name = json.dumps(
            [opened.weights.sha256, asdict(opened.weights.recipe), str(root.absolute())]
        )
        self._path = cache / "images" / f"{hashlib.sha256(name.encode()).hexdigest()}.npz"
        self._known = self._load()

    def __call__(
        self, samples: Sequence[Sample], listener: Listener
    ) -> tuple[list[Sample], Float32Array]:
        """Return the samples that could be encoded, and their (n, E) float32 unit features.

        Args:
            samples: Images.
            listener: Who is told of each image that cannot be read and is left out, and how it
                goes.

        Raises:
            DatasetError: No image could be read.
        """
        keys = {sample.id: _key(sample) for sample in samples}
        todo = [sample for sample in samples if keys[sample.id] not in self._known]
        if todo:
            try:
                self._encode(todo, keys, listener)
            finally:
                # Also when interrupted: encoding is what takes the time.
                if self._known:
                    self._save()
        usable = [sample for sample in samples if keys[sample.id] in self._known]
        if not usable:
            raise DatasetError("none of the images could be read", "see the remarks above")
        return usable, np.stack([self._known[keys[sample.id]] for sample in usable])

    def _encode(
        self, samples: Sequence[Sample], keys: Mapping[str, str], listener: Listener
    ) -> None:
        """Encode images, and know them by their keys from then on."""
        visual, recipe = self._opened.visual(), self._opened.weights.recipe
        prepare = classifier_input(visual, recipe.mean, recipe.std)

        def keep(sample: Sample, feature: Float32Array) -> None:
            self._known[keys[sample.id]] = feature

        with listener.progress("images") as progress:
            for_each_batch(
                lambda sample: prepare(read_image(sample.image)),
                lambda inputs: list(image_features(visual, torch.stack(list(inputs)))),
                keep,
                samples,
                size=_IMAGES_AT_ONCE,
                is_done=never,
                workers=1,
                progress=progress,
                report=listener.report,
            )

    def _load(self) -> dict[str, Float32Array]:
        try:
            arrays = read_arrays(self._path, _LARGEST_CACHE)
            return dict(zip(arrays["keys"].tolist(), arrays["features"], strict=True))
        except (OSError, ValueError, KeyError):
            return {}  # a damaged memory, too, is one that has to be made again

    def _save(self) -> None:
        with kept_if_possible("images: the features of images", self._say):
            write_arrays(
                self._path,
                {
                    "keys": np.array(list(self._known)),
                    "features": np.stack(list(self._known.values())),
                },
                compress=False,
            )


def rank_templates(
    templates: Sequence[str],
    vocabulary: Vocabulary,
    images: Float32Array,
    present: npt.NDArray[np.bool_],
    encoder: PromptEncoder,
    logit_scale: float,
    progress: Progress,
) -> list[tuple[str, float]]:
    """Return each template with its sharpness, best first.

    Args:
        templates: The candidates.
        vocabulary: The words; synonyms are fused to one sentence.
        images: (n, E) unit image features.
        present: (n, C), the classes each image shows.
        encoder: Makes text features.
        logit_scale: Factor on the cosines.
        progress: Called after each template.

    Raises:
        VocabularyError: A prompt is longer than the tower's context.
    """
    words = words_of(vocabulary)
    groups = [[fill(template, word) for word in words] for template in templates]
    ranked = []
    for index, (template, prompts) in enumerate(zip(templates, groups, strict=True)):
        if index % _TEMPLATES_AT_ONCE == 0:
            encoder.learn(groups[index : index + _TEMPLATES_AT_ONCE])
        vectors = encoder(prompts)
        ranked.append((template, sharpness(class_scores(images, vectors, logit_scale), present)))
        progress(index + 1, len(templates))
    return sorted(ranked, key=lambda pair: pair[1])


def rank_files(
    files: Sequence[Path],
    vocabulary: Vocabulary,
    images: Float32Array,
    present: npt.NDArray[np.bool_],
    logit_scale: float,
) -> list[tuple[str, float]]:
    """Return each file of text features with its sharpness; arguments as for ``rank_templates``.

    Raises:
        VocabularyError: A file cannot be read, lacks a class, or is of another model.
    """
    ranked = []
    for file in files:
        vectors = from_given(load_text_features(file), vocabulary, Fusion.sentence).class_vectors
        if vectors.shape[1] != images.shape[1]:
            raise VocabularyError(
                f"text features {file} have {vectors.shape[1]} channels, the weights "
                f"{images.shape[1]}",
                "give features of the same CLIP model as the weights",
            )
        score = sharpness(class_scores(images, vectors, logit_scale), present)
        ranked.append((str(file), score))
    return sorted(ranked, key=lambda pair: pair[1])


@dataclass(frozen=True)
class RankRequest:
    """What ``clipes prompts rank`` compares.

    Attributes:
        templates: The candidates, when there are no ``files``.
        files: Files of text features to compare.
        limit: Most images to score, evenly spaced over all; None for all.
        cache: Folder for features that were computed.
    """

    templates: tuple[str, ...]
    files: tuple[Path, ...] = ()
    limit: int | None = None
    cache: Path = field(default_factory=cache_dir)


def rank(
    request: RankRequest,
    data: Dataset,
    vocabulary: Vocabulary,
    opened: OpenedWeights,
    listener: Listener,
) -> tuple[Ranking, tuple[Failure, ...]]:
    """Rank templates or, if there are any, files of text features.

    Args:
        request: What is compared.
        data: Images with their labels.
        vocabulary: The words.
        opened: The weights.
        listener: Who is told of each image that cannot be used and is left out, and how it goes.

    Returns:
        The ranking, and the images that could not be used.

    Raises:
        VocabularyError: There is no text tower and no file, or a candidate cannot be used.
        DatasetError: No image can be read, or none shows two classes.
    """
    failures: list[Failure] = []

    def report(failure: Failure) -> None:
        failures.append(failure)
        listener.report(failure)

    for failure in data.failures:
        report(failure)
    if not request.files and not has_text(opened.state):
        raise VocabularyError(
            f"ranking templates needs a text tower, and {opened.weights.name} has none",
            "use --weights openai or a file with one, or compare files: --text-features A.npz "
            "--text-features B.npz",
        )
    samples = _spread(data.samples, request.limit)
    encode = ImageFeatures(opened, data.root, request.cache, listener.say)
    usable, images = encode(samples, replace(listener, report=report))
    present = np.zeros((len(usable), len(vocabulary.classes)), np.bool_)
    for row, sample in enumerate(usable):
        present[row, list(sample.labels)] = True
    ranking = Ranking(
        kind="features" if request.files else "templates",
        ranking=tuple(_ranked(request, vocabulary, opened, images, present, listener)),
        images=len(usable),
        several=int((present.sum(1) > 1).sum()),
        words=words_of(vocabulary),
        weights=opened.weights.name,
        sha256=opened.weights.sha256,
        dataset=data.name,
    )
    return ranking, tuple(failures)


def _spread(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """Return at most ``limit`` samples, evenly spaced over all; refuse what cannot be ranked on."""
    indices = evenly_spaced(len(samples), len(samples) if limit is None else limit)
    chosen = [samples[index] for index in indices]
    if not any(len(sample.labels) > 1 for sample in chosen):
        raise DatasetError(
            "no image has two labels, so every prompt is equally sharp",
            "rank on images that show several classes",
        )
    return chosen


def _ranked(
    request: RankRequest,
    vocabulary: Vocabulary,
    opened: OpenedWeights,
    images: Float32Array,
    present: npt.NDArray[np.bool_],
    listener: Listener,
) -> list[tuple[str, float]]:
    if request.files:
        return rank_files(request.files, vocabulary, images, present, opened.logit_scale)
    encoder = PromptEncoder(
        opened.state, opened.weights, request.cache, opened.device, say=listener.say
    )
    scale = opened.logit_scale
    with listener.progress("templates") as progress:
        return rank_templates(
            request.templates, vocabulary, images, present, encoder, scale, progress
        )


def _key(sample: Sample) -> str:
    try:
        about = sample.image.stat()
    except OSError:
        return f"missing {sample.id}"  # never in the memory; reading it says what is wrong
    text = f"{sample.image.absolute()}|{about.st_size}|{about.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()
