"""Vocabularies: what the classes are called, in words CLIP can read (paper section 3.2).

A vocabulary is a TOML file::

    template = "a clean origami {}."
    classes = ["aeroplane", "person"]
    background = ["sky", "ground"]

    [synonyms]                      # optional; joined to one sentence, as in the reference
    person = ["person with clothes", "people", "human"]
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from clipes.config import DEFAULT_TEMPLATE
from clipes.errors import VocabularyError
from clipes.types import MAX_CLASSES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = ("voc",)
"""Vocabularies that come with the package."""

_KEYS = {"classes", "background", "template", "synonyms"}
_LARGEST_FILE = 1 << 20  # bytes; the largest sensible vocabulary is a few kilobytes


@dataclass(frozen=True)
class Vocabulary:
    """The words of a data set.

    Attributes:
        classes: Class names in mask order: class k has mask value k + 1.
        background: Words for what is not a class; they compete with the classes in the softmax.
        synonyms: For some classes, the words that stand for the name in a prompt.
        template: Sentence with one ``{}``.
    """

    classes: tuple[str, ...]
    background: tuple[str, ...]
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    template: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        if not self.classes:
            raise VocabularyError("a vocabulary without classes", "list at least one class")
        if len(self.classes) > MAX_CLASSES:
            raise VocabularyError(
                f"{len(self.classes)} classes, but an 8-bit mask holds {MAX_CLASSES}",
                "split the vocabulary",
            )
        for kind, words in (("class", self.classes), ("background word", self.background)):
            if "" in (word.strip() for word in words):
                raise VocabularyError(f"an empty {kind}", "remove or name it")
            repeated = [word for word, count in Counter(words).items() if count > 1]
            if repeated:
                raise VocabularyError(f"the {kind} '{repeated[0]}' appears twice", "keep one")
        for name, words in self.synonyms.items():
            if name not in self.classes:
                raise VocabularyError(f"synonyms for '{name}', which is not a class")
            if not words or "" in (word.strip() for word in words):
                raise VocabularyError(f"an empty list or word in the synonyms of '{name}'")
        if self.template.count("{}") != 1:
            raise VocabularyError(f"the template '{self.template}' needs exactly one {{}}")

    def prompts(self) -> tuple[str, ...]:
        """Return one prompt for every class, then one for every background word.

        Synonyms are fused at sentence level, joined by commas, as in the reference.
        """
        words = [",".join(self.synonyms.get(name, (name,))) for name in self.classes]
        return tuple(self.template.replace("{}", word) for word in (*words, *self.background))

    def with_classes(self, classes: tuple[str, ...]) -> Vocabulary:
        """Return this vocabulary for other classes; synonyms of classes that go away go too."""
        synonyms = {name: words for name, words in self.synonyms.items() if name in classes}
        background = tuple(word for word in self.background if word not in classes)
        return replace(self, classes=classes, synonyms=synonyms, background=background)


def load_vocabulary(source: str | Path) -> Vocabulary:
    """Read a vocabulary: the name of a shipped one, or the path of a TOML file.

    Raises:
        VocabularyError: The file cannot be read, or what it says makes no vocabulary.
    """
    if source in SHIPPED:
        text = (resources.files("clipes") / "prompts" / f"{source}.toml").read_text("utf-8")
    else:
        path = Path(source)
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise VocabularyError(f"{path} is larger than {_LARGEST_FILE} bytes")
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise VocabularyError(
                f"cannot read the prompts file {path}: {error}",
                f"give a UTF-8 TOML file, or one of {', '.join(SHIPPED)}",
            ) from error
    try:
        return _parse(text)
    except VocabularyError as error:
        raise VocabularyError(f"prompts file {source}: {error.what}", error.remedy) from error


def _parse(text: str) -> Vocabulary:
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise VocabularyError(f"not TOML: {error}") from error
    unknown = sorted(set(table) - _KEYS)
    if unknown:
        raise VocabularyError(f"unknown key '{unknown[0]}'", f"known are {', '.join(_KEYS)}")
    synonyms = table.get("synonyms", {})
    template = table.get("template", DEFAULT_TEMPLATE)
    if not isinstance(synonyms, dict):
        raise VocabularyError("'synonyms' is not a table", "write [synonyms] and name = [words]")
    if not isinstance(template, str):
        raise VocabularyError("'template' is not a string")
    return Vocabulary(
        classes=_words(table.get("classes", []), "classes"),
        background=_words(table.get("background", []), "background"),
        synonyms={name: _words(words, f"synonyms.{name}") for name, words in synonyms.items()},
        template=template,
    )


def _words(value: Any, key: str) -> tuple[str, ...]:  # noqa: ANN401  (TOML gives anything)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise VocabularyError(f"'{key}' is not a list of strings")
    return tuple(value)
