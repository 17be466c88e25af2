"""Words become vectors: by the text tower, or out of a file or the shipped stand-in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor

from clipes.choices import Descriptions, Fusion
from clipes.errors import UnknownClassError, VocabularyError
from clipes.listener import OpenProgress, no_progress
from clipes.towers.clip_text import encode_prompts
from clipes.towers.load import has_text, load_text
from clipes.types import Float32Array
from clipes.weights import Weights
from clipes.weights.cache import kept_if_possible
from clipes.words.features import (
    TextFeatures,
    fuse_vectors,
    load_text_features,
    save_text_features,
    stand_in,
    unit_rows,
)
from clipes.words.vocabulary import Vocabulary, fill

_CPU = torch.device("cpu")
_TEXT_TOWER = "use weights with a text tower (--weights openai, or a file with one)"


class PromptEncoder:
    """The text tower of some weights with a memory on disk; loaded when first needed.

    Where the memory cannot be written, it lasts as long as this object.

    Args:
        state: The weights' tensors, a text tower among them.
        weights: Where they come from.
        cache: Folder for features that were computed.
        device: Where to compute.
        say: Told once if the memory cannot be written.
        progress: Follows what is encoded.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        weights: Weights,
        cache: Path,
        device: torch.device = _CPU,
        *,
        say: Callable[[str], None],
        progress: OpenProgress = no_progress,
    ) -> None:
        self._state = state
        self._weights = weights
        self._folder = cache / "text"
        self._device = device
        self._say = say
        self._progress = progress
        self._unsaved: dict[Path, TextFeatures] = {}
        self._tower: TextTransformer | None = None

    def __call__(self, prompts: Sequence[str]) -> Float32Array:
        """Return the (n, E) float32 unit features of n prompts.

        Raises:
            VocabularyError: A prompt is longer than the tower's context.
        """
        self.learn([prompts])
        # Read back even when just made: scaling to length 1 on load moves the last bit.
        path = self._path(prompts)
        features = self._unsaved.get(path) or load_text_features(path)
        return features.for_classes(tuple(prompts)).class_vectors

    def learn(self, groups: Sequence[Sequence[str]]) -> None:
        """Encode several lists of prompts at once, so that asking for each is quick afterwards.

        Raises:
            VocabularyError: A prompt is longer than the tower's context.
        """
        unknown = [tuple(sorted(set(group))) for group in groups if not self.knows(group)]
        if not unknown:
            return
        flat = [prompt for group in unknown for prompt in group]
        tower = self._loaded()
        with self._progress("text") as progress:
            vectors = encode_prompts(tower, flat, progress)
        ends = np.cumsum([len(group) for group in unknown])[:-1]
        none = np.empty((0, vectors.shape[1]), np.float32)
        for group, rows in zip(unknown, np.split(vectors, ends), strict=True):
            self._keep(TextFeatures(group, (), rows, none, self._weights.name))

    def knows(self, prompts: Sequence[str]) -> bool:
        """Tell whether the features of just these prompts, in any order, are there already."""
        path = self._path(prompts)
        if path in self._unsaved:
            return True
        try:
            load_text_features(path)
        except VocabularyError:  # absent, damaged, or another user's
            return False
        return True

    def _keep(self, features: TextFeatures) -> None:
        path = self._path(features.classes)
        if not self._unsaved:  # else it was tried, and said
            with kept_if_possible("text: the vectors of prompts", self._say):
                save_text_features(path, features)
                return
        self._unsaved[path] = replace(features, class_vectors=unit_rows(features.class_vectors))

    def _path(self, prompts: Sequence[str]) -> Path:
        recipe = self._weights.recipe
        key = json.dumps([sorted(set(prompts)), self._weights.sha256, recipe.quick_gelu])
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"

    def _loaded(self) -> TextTransformer:
        if self._tower is None:
            quick_gelu = self._weights.recipe.quick_gelu
            self._tower = load_text(self._state, quick_gelu=quick_gelu).to(self._device)
        return self._tower


def text_features(
    vocabulary: Vocabulary,
    state: Mapping[str, Tensor],
    weights: Weights,
    *,
    file: Path | None,
    cache: Path,
    say: Callable[[str], None],
    fusion: Fusion = Fusion.sentence,
    templates: tuple[str, ...] = (),
    descriptions: Descriptions | None = None,
    progress: OpenProgress = no_progress,
    wide: bool = False,
) -> TextFeatures:
    """Return the vectors of a vocabulary's classes, in its order, and of the background words.

    Args:
        vocabulary: The words.
        state: The weights' tensors.
        weights: Where they come from.
        file: A user's features; they take the place of the text tower. Below sentence level it must
            have a row for every synonym, with descriptions one for each of them, too.
        cache: Folder for features that were computed.
        say: Told which features are used, and why.
        fusion: Where synonyms become one.
        templates: Take the place of the vocabulary's; the features of several are averaged.
        descriptions: What the vocabulary's descriptions do; None to pass over them.
        progress: Follows what is encoded.
        wide: Whether a text tower also reads the vocabulary's further background words.

    Raises:
        UnknownClassError: A class has no vector among those that were given or are shipped.
        VocabularyError: A synonym or description has no vector, the vectors are not of the width of
            the weights, a prompt is too long, there are no descriptions, or templates or they were
            asked for where there is nothing to encode them with.
    """
    if file is not None or not has_text(state):
        origin = "text features come from a file" if file else f"{weights.name} has no text tower"
        if templates:
            raise VocabularyError(f"a template was given, but {origin}", _TEXT_TOWER)
        if descriptions and not file:
            raise VocabularyError(
                f"descriptions are asked for, but {origin}",
                f"{_TEXT_TOWER}, or --text-features FILE.npz with a row for each sentence",
            )
        given = load_text_features(file) if file else stand_in()
        _check_width(given, state, weights, file)
        features = from_given(given, vocabulary, fusion, descriptions)
        if file is None:
            say(f"text: {origin}; using the shipped {features.note}")
    else:
        encoder = PromptEncoder(state, weights, cache, say=say, progress=progress)
        features = from_tower(
            encoder, vocabulary, fusion, templates, weights.name, say, descriptions
        )
        more = vocabulary.more_background
        if wide and more:
            # Apart: vectors of the others shall not depend on these, to the last bit.
            words = replace(vocabulary, classes=more, background=(), synonyms={}, descriptions={})
            added = from_tower(encoder, words, Fusion.sentence, templates, weights.name, say)
            features = features.with_words(more, added.class_vectors)
    return features


def _check_width(
    given: TextFeatures, state: Mapping[str, Tensor], weights: Weights, file: Path | None
) -> None:
    """Refuse vectors of another model. To such weights all classes of the stand-in are unknown."""
    width = state["visual.proj"].shape[1]
    if given.class_vectors.shape[1] != width:
        kind = VocabularyError if file else UnknownClassError
        raise kind(
            f"text features of {given.model or file} have {given.class_vectors.shape[1]} "
            f"channels, the weights {weights.name} {width}",
            "give features of the same CLIP model as the weights",
        )


def from_given(
    given: TextFeatures,
    vocabulary: Vocabulary,
    fusion: Fusion,
    descriptions: Descriptions | None = None,
) -> TextFeatures:
    """Return the vectors of a vocabulary's classes out of features that are there already.

    At sentence level a class is its own row; at the others it is fused from its synonyms' rows. The
    background words are those of ``given``. Other arguments are those of ``text_features``.

    Raises:
        VocabularyError: A class, synonym or description has no row.
    """

    def rows_of(sentences: tuple[str, ...]) -> Float32Array:
        try:
            return given.for_classes(sentences).class_vectors
        except VocabularyError as error:
            raise VocabularyError(
                f"descriptions need a vector of every sentence: {error.what}",
                f"{_TEXT_TOWER}, or leave --descriptions out",
            ) from error

    return _described(_from_rows(given, vocabulary, fusion), vocabulary, descriptions, rows_of)


def _from_rows(given: TextFeatures, vocabulary: Vocabulary, fusion: Fusion) -> TextFeatures:
    if fusion is Fusion.sentence:
        return given.for_classes(vocabulary.classes)
    phrases = vocabulary.phrases(fusion)[: len(vocabulary.classes)]
    try:
        rows = [given.for_classes(synonyms).class_vectors for synonyms in phrases]
    except VocabularyError as error:
        raise VocabularyError(
            f"fusion at {fusion.value} level needs a vector of every synonym: {error.what}",
            f"{_TEXT_TOWER}, or --fusion sentence",
        ) from error
    return _fused(replace(given, classes=vocabulary.classes), rows, fusion)


def from_tower(
    encoder: PromptEncoder,
    vocabulary: Vocabulary,
    fusion: Fusion,
    templates: tuple[str, ...],
    model: str,
    say: Callable[[str], None],
    descriptions: Descriptions | None = None,
) -> TextFeatures:
    """Encode a vocabulary; arguments and errors as for ``text_features``."""
    templates = templates or (vocabulary.template,)
    phrases = vocabulary.phrases(fusion)
    flat = [phrase for synonyms in phrases for phrase in synonyms]
    prompts = [fill(template, phrase) for phrase in flat for template in templates]
    if not encoder.knows(prompts):
        say(f"text: encoding {len(prompts)} prompts with {model}")
    vectors = encoder(prompts).reshape(len(flat), len(templates), -1)
    averaged = iter([fuse_vectors(of_phrase) for of_phrase in vectors])
    rows = [np.stack([next(averaged) for _ in synonyms]) for synonyms in phrases]
    count = len(vocabulary.classes)
    background = np.empty((0, vectors.shape[2]), np.float32)
    if vocabulary.background:
        background = np.concatenate(rows[count:])
    empty = TextFeatures(
        vocabulary.classes,
        vocabulary.background,
        class_vectors=np.empty((0, vectors.shape[2]), np.float32),
        background_vectors=background,
        model=model,
        templates=templates,
    )

    def encoded(sentences: tuple[str, ...]) -> Float32Array:
        if not encoder.knows(sentences):
            say(f"text: encoding {len(sentences)} descriptions with {model}")
        return encoder(sentences)

    named = _fused(empty, rows[:count], fusion)
    return _described(named, vocabulary, descriptions, encoded)


def fingerprint(features: TextFeatures) -> str:
    """Return the sha256 of names and vectors, for run.json."""
    digest = hashlib.sha256(json.dumps([features.classes, features.background_words]).encode())
    vectors = (features.class_vectors, features.background_vectors, *features.phrase_vectors)
    for rows in vectors:
        digest.update(rows.tobytes())
    return digest.hexdigest()


def _fused(features: TextFeatures, rows: Sequence[Float32Array], fusion: Fusion) -> TextFeatures:
    """Put C times (S, E) vectors of synonyms in the place of the class vectors."""
    of_maps = fusion in (Fusion.cam, Fusion.cam_max)
    return replace(
        features,
        class_vectors=np.stack([fuse_vectors(synonyms) for synonyms in rows]),
        phrase_vectors=tuple(rows) if of_maps else (),
        fusion=fusion,
    )


def _described(
    features: TextFeatures,
    vocabulary: Vocabulary,
    descriptions: Descriptions | None,
    encode: Callable[[tuple[str, ...]], Float32Array],
) -> TextFeatures:
    """Let each class vector, the name's, be joined by those of its descriptions."""
    if descriptions is None:
        return features
    sentences = vocabulary.as_asked(descriptions).sentences()
    vectors = encode(tuple(sentence for of_class in sentences for sentence in of_class))
    parts = np.split(vectors, np.cumsum([len(of_class) for of_class in sentences])[:-1])
    rows = [
        np.concatenate([name[None], of_class])
        for name, of_class in zip(features.class_vectors, parts, strict=True)
    ]
    return replace(
        features,
        class_vectors=np.stack([fuse_vectors(vectors) for vectors in rows]),
        phrase_vectors=tuple(rows) if descriptions is Descriptions.max else (),
        descriptions=descriptions,
    )
