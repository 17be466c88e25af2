"""Looks for words and vectors that get in each other's way; nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from clipes.choices import Descriptions, Fusion
from clipes.errors import UnknownClassError, UsageError
from clipes.listener import Listener
from clipes.maps.vectors import BACKGROUND_REMEDY
from clipes.stages.setup import open_weights
from clipes.towers.clip_text import CONTEXT_LENGTH, tokenize
from clipes.weights import DEFAULT_MODEL, cache_dir
from clipes.words.check import Entry, Remark, collisions, entries, near, spelling
from clipes.words.encode import from_given, text_features
from clipes.words.features import TextFeatures, load_text_features
from clipes.words.templates import templates_of
from clipes.words.vocabulary import Vocabulary, check_levels, load_vocabulary


@dataclass(frozen=True)
class WordsRequest:
    """Which words and vectors are looked at.

    Attributes:
        prompts: The vocabulary.
        weights: Compare vectors of these weights; None for none.
        model: ``--model``.
        text_features: Compare the vectors of this file instead; None for none.
        fusion: Where synonyms become one.
        template: What takes the place of the vocabulary's template.
        descriptions: What the vocabulary's descriptions do; None to pass over them.
    """

    prompts: str
    weights: str | None = None
    model: str = DEFAULT_MODEL
    text_features: Path | None = None
    fusion: Fusion = Fusion.sentence
    template: str | None = None
    descriptions: Descriptions | None = None


@dataclass(frozen=True)
class WordsChecked:
    """What was found.

    Attributes:
        entries: A line for each class, then for each background word.
        remarks: What to look at.
        compared: Whether vectors were compared.
    """

    entries: list[Entry]
    remarks: list[Remark]
    compared: bool

    @property
    def fatal(self) -> int:
        """Number of remarks that stop ``clipes cam``."""
        return sum(remark.fatal for remark in self.remarks)


def check_words(request: WordsRequest, listener: Listener) -> WordsChecked:
    """Look at the words of a vocabulary, and at their vectors if any are named.

    Args:
        request: What is looked at.
        listener: Who is told which weights are used.

    Raises:
        UsageError: Both weights and a file are named, or a model without weights, or descriptions
            cannot be joined to that fusion.
        ClipesError: Vocabulary, weights or file cannot be used.
    """
    if request.weights is not None and request.text_features is not None:
        raise UsageError("--weights and --text-features exclude each other", "give one of them")
    if request.weights is None and request.model != DEFAULT_MODEL:
        raise UsageError(f"--model {request.model} means nothing without --weights", "add it")
    check_levels(request.fusion, request.descriptions)
    vocabulary = load_vocabulary(request.prompts).as_asked(request.descriptions).widened()
    fusion = request.fusion
    templates = templates_of(request.template, vocabulary)
    remarks = list(spelling(vocabulary, templates, fusion, tokenize, CONTEXT_LENGTH))
    features = None
    if not any(remark.fatal for remark in remarks):
        features = _vectors(request, vocabulary, templates, listener)
    if features is not None:
        # A run takes the background words that come with the vectors.
        words = tuple(dict.fromkeys(features.background_words))
        vocabulary = replace(vocabulary, background=words)
        remarks += near(features)
    if not vocabulary.background:
        # Vectors may bring words of their own: without any it is not known yet.
        text = f"there are no words for the background: {BACKGROUND_REMEDY}"
        remarks.append(Remark(text, fatal=features is not None))
    remarks += collisions(vocabulary)
    table = entries(vocabulary, templates, fusion, tokenize, features)
    return WordsChecked(table, remarks, features is not None)


def _vectors(
    request: WordsRequest, vocabulary: Vocabulary, templates: tuple[str, ...], listener: Listener
) -> TextFeatures | None:
    """Return the vectors that are asked for, without making an image tower."""
    if request.text_features is not None:
        given = load_text_features(request.text_features)
        return from_given(given, vocabulary, request.fusion, request.descriptions)
    if request.weights is None:
        return None
    opened = open_weights(request.weights, request.model, "cpu", listener)
    try:
        return text_features(
            vocabulary,
            opened.state,
            opened.weights,
            file=None,
            cache=cache_dir(),
            say=listener.say,
            fusion=request.fusion,
            templates=templates if templates != (vocabulary.template,) else (),
            descriptions=request.descriptions,
            progress=listener.progress,
        )
    except UnknownClassError as error:
        listener.say(
            f"vectors were not compared: {error.what}; 'clipes cam' fits them to the images and "
            "labels of a run, and the file that it keeps can be compared with --text-features"
        )
        return None
