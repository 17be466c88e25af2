"""Which text features a run uses: a file's, the text tower's, or the shipped stand-in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from clipes.clip.load import has_text, load_text
from clipes.clip.text import encode_prompts
from clipes.errors import VocabularyError
from clipes.text_features import (
    TextFeatures,
    load_text_features,
    save_text_features,
    stand_in,
)
from clipes.vocabulary import Vocabulary
from clipes.weights import Weights


def text_features(
    vocabulary: Vocabulary,
    state: Mapping[str, Tensor],
    weights: Weights,
    *,
    file: Path | None,
    cache: Path,
    say: Callable[[str], None],
) -> TextFeatures:
    """Return the vectors of a vocabulary's classes, in its order, and of the background words.

    Args:
        vocabulary: The words.
        state: The weights' tensors.
        weights: Where they come from.
        file: A user's features; they take the place of the text tower.
        cache: Folder for features that were computed.
        say: Told which features are used, and why.

    Raises:
        VocabularyError: A class has no vector, or the vectors are not of the weights' width.
    """
    if file is not None:
        features = load_text_features(file).for_classes(vocabulary.classes)
    elif has_text(state):
        features = _encoded(vocabulary, state, weights, cache, say)
    else:
        features = stand_in().for_classes(vocabulary.classes)
        say(f"text: {weights.name} has no text tower; using the shipped {features.note}")
    width = state["visual.proj"].shape[1]
    if features.class_vectors.shape[1] != width:
        raise VocabularyError(
            f"text features of {features.model or file} have {features.class_vectors.shape[1]} "
            f"channels, the weights {weights.name} {width}",
            "give features of the same CLIP model as the weights",
        )
    return features


def fingerprint(features: TextFeatures) -> str:
    """Return the sha256 of names and vectors, for run.json."""
    digest = hashlib.sha256(json.dumps([features.classes, features.background_words]).encode())
    for vectors in (features.class_vectors, features.background_vectors):
        digest.update(vectors.tobytes())
    return digest.hexdigest()


def _encoded(
    vocabulary: Vocabulary,
    state: Mapping[str, Tensor],
    weights: Weights,
    cache: Path,
    say: Callable[[str], None],
) -> TextFeatures:
    prompts = vocabulary.prompts()
    key = hashlib.sha256(json.dumps([prompts, weights.sha256]).encode()).hexdigest()
    path = cache / "text" / f"{key}.npz"
    if not path.exists():
        say(f"text: encoding {len(prompts)} prompts with {weights.name}")
        vectors = encode_prompts(load_text(state, quick_gelu=weights.recipe.quick_gelu), prompts)
        count = len(vocabulary.classes)
        features = TextFeatures(
            vocabulary.classes,
            vocabulary.background,
            vectors[:count],
            vectors[count:],
            model=weights.name,
        )
        save_text_features(path, features)
    # Read back even when just made: scaling to length 1 on load moves the last bit.
    return load_text_features(path)
