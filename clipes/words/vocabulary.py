"""Vocabularies: what the classes are called, in words CLIP can read (paper section 3.2).

A vocabulary is a TOML file::

    template = "a clean origami {}."
    classes = ["aeroplane", "person"]
    background = ["sky", "ground"]

    [synonyms]                      # optional; what stands for the name in prompts, see ``Fusion``
    person = ["person with clothes", "people", "human"]

    [descriptions]                  # optional; sentences that CLIP reads too, see ``Descriptions``
    aeroplane = ["the tail fin of an aeroplane", "an aeroplane of shiny white metal"]

Templates to choose from are a text file with one on each line; ``#`` starts a comment line.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from clipes.choices import Descriptions, Fusion
from clipes.config import DEFAULT_TEMPLATE
from clipes.errors import UsageError, VocabularyError
from clipes.names import folded
from clipes.types import MAX_CLASSES
from clipes.words.shipped import shipped_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = ("voc", "coco")
"""Vocabularies that come with the package."""

MAX_DESCRIPTIONS = 16
"""Of a class; each is a prompt to encode."""

_KEYS = ("classes", "background", "more_background", "template", "synonyms", "descriptions")
_LONGEST_DESCRIPTION = 400  # letters; CLIP reads 77 tokens, of about four each
_LARGEST_FILE = 1 << 20  # bytes; the largest sensible vocabulary is a few kilobytes


@dataclass(frozen=True)
class Vocabulary:
    """The words of a data set.

    Attributes:
        classes: Class names in mask order: class k has mask value k + 1.
        background: Words for what is not a class; they compete with the classes in the softmax.
        synonyms: For some classes, the words that stand for the name in a prompt.
        template: Sentence with one ``{}``.
        descriptions: For some classes, sentences about what they look like.
        more_background: Further such words, for presets that compare patches with words; the
            published method keeps to its list. See ``widened``.

    Raises:
        VocabularyError: There is no class or more than 254, a word is empty, repeated or has
            characters that cannot be printed, synonyms or descriptions belong to no class, the
            descriptions of a class are too many or too long, or the template has not exactly one
            ``{}``.
    """

    classes: tuple[str, ...]
    background: tuple[str, ...]
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    template: str = DEFAULT_TEMPLATE
    descriptions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    more_background: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.classes:
            raise VocabularyError("a vocabulary without classes", "list at least one class")
        if len(self.classes) > MAX_CLASSES:
            raise VocabularyError(
                f"{len(self.classes)} classes, but an 8-bit mask holds {MAX_CLASSES}",
                "split the vocabulary",
            )
        _check_words(self.classes, "class")
        _check_words((*self.background, *self.more_background), "background word")
        for kind, given in (("synonym", self.synonyms), ("description", self.descriptions)):
            for name, words in given.items():
                self._check_of_class(name, words, kind)
        for name, sentences in self.descriptions.items():
            _check_sentences(name, sentences)
        check_template(self.template)

    def _check_of_class(self, name: str, words: tuple[str, ...], kind: str) -> None:
        if name not in self.classes:
            raise VocabularyError(
                f"{kind}s for {name[:60]!r}, which is not a class",
                "write the name as in 'classes', or remove them",
            )
        if not words:
            raise VocabularyError(f"no {kind} for '{name}'", "list one, or remove the entry")
        _check_words(words, f"{kind} of '{name}'")

    def phrases(self, fusion: Fusion = Fusion.sentence) -> tuple[tuple[str, ...], ...]:
        """Return what goes into the template for every class, then for every background word.

        Args:
            fusion: At sentence level each class has one phrase, its synonyms joined by commas; at
            the
                other levels one for each synonym.

        Returns:
            C + B tuples of at least one phrase.
        """
        words = [self.synonyms.get(name, (name,)) for name in self.classes]
        if fusion is Fusion.sentence:
            words = [(",".join(synonyms),) for synonyms in words]
        return (*words, *((word,) for word in self.background))

    def texts(
        self, templates: Sequence[str], fusion: Fusion = Fusion.sentence
    ) -> tuple[tuple[str, ...], ...]:
        """Return all that CLIP reads: prompts, then descriptions, for each class and word.

        Args:
            templates: What phrases are put into; descriptions stand as they are.
            fusion: As for ``phrases``.

        Returns:
            C + B tuples of at least one text.
        """
        sentences = (*self.sentences(), *((),) * len(self.background))
        return tuple(
            (*(fill(template, phrase) for phrase in phrases for template in templates), *described)
            for phrases, described in zip(self.phrases(fusion), sentences, strict=True)
        )

    def prompts(self) -> tuple[str, ...]:
        """Return one prompt for every class, then one for every background word.

        Synonyms are fused at sentence level, as in the reference.
        """
        return tuple(fill(self.template, phrase) for (phrase,) in self.phrases())

    def with_classes(self, classes: tuple[str, ...]) -> Vocabulary:
        """Return this vocabulary for other classes; what is said of classes that go away goes too.

        Names are compared without regard to spelling (``folded``).
        """

        def kept(words: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
            given = {folded(name): of for name, of in words.items()}
            return {name: given[folded(name)] for name in classes if folded(name) in given}

        taken = set(map(folded, classes))

        def free(words: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(word for word in words if folded(word) not in taken)

        return replace(
            self,
            classes=classes,
            synonyms=kept(self.synonyms),
            background=free(self.background),
            descriptions=kept(self.descriptions),
            more_background=free(self.more_background),
        )

    def widened(self) -> Vocabulary:
        """Return this vocabulary with all its background words among ``background``."""
        words = (*self.background, *self.more_background)
        return replace(self, background=words, more_background=())

    def as_asked(self, descriptions: Descriptions | None) -> Vocabulary:
        """Return this vocabulary with descriptions only if they are asked for.

        Raises:
            VocabularyError: They are, and there are none.
        """
        if descriptions is None:
            return replace(self, descriptions={})
        if not self.descriptions:
            raise VocabularyError(
                "descriptions are asked for, but the vocabulary has none of these classes",
                "write some into it, under [descriptions], or leave --descriptions out",
            )
        return self

    def sentences(self) -> tuple[tuple[str, ...], ...]:
        """Return the C descriptions, of any length, in the order of the classes."""
        return tuple(self.descriptions.get(name, ()) for name in self.classes)


@lru_cache(maxsize=1 << 14)
def fill(template: str, phrase: str) -> str:
    """Put a phrase into a template.

    >>> fill("a photo of a {}.", "cat")
    'a photo of a cat.'
    """
    return template.replace("{}", phrase)


def check_template(template: str) -> str:
    """Return ``template`` if it is one line with exactly one ``{}``.

    Raises:
        VocabularyError: It is not.
    """
    if template.count("{}") != 1 or not template.isprintable():
        raise VocabularyError(
            f"the template {template[:80]!r} is not one line with one {{}}",
            "put {} where the class goes, such as 'a photo of a {}.'",
        )
    return template


def check_levels(fusion: Fusion, descriptions: Descriptions | None) -> None:
    """Refuse descriptions beside maps of each synonym: a class has one map or several.

    Raises:
        UsageError: Both are asked for.
    """
    if descriptions is not None and fusion in (Fusion.cam, Fusion.cam_max):
        raise UsageError(
            f"--fusion {fusion} makes maps of a class's synonyms, which descriptions cannot join",
            "leave --descriptions out, or take --fusion sentence or feature",
        )


def load_vocabulary(source: str | Path) -> Vocabulary:
    """Read a vocabulary: the name of a shipped one, or the path of a TOML file.

    Raises:
        VocabularyError: The file cannot be read, or what it says makes no vocabulary.
    """
    if source in SHIPPED:
        text = _shipped(f"{source}.toml")
    else:
        remedy = f"give a UTF-8 TOML file, or one of {', '.join(SHIPPED)}"
        text = _read(Path(source), "prompts file", remedy)
    try:
        return parse_vocabulary(text)
    except VocabularyError as error:
        raise VocabularyError(f"prompts file {source}: {error.what}", error.remedy) from error


def load_templates(path: Path | None = None) -> tuple[str, ...]:
    """Read a file of templates.

    Args:
        path: A text file; None for the templates that come with the package.

    Raises:
        VocabularyError: The file cannot be read, holds none, or holds a line that is no template.
    """
    if path is None:
        return parse_templates(_shipped("templates.txt"))
    text = _read(path, "templates file", "give a sentence with one {}, or a file")
    try:
        return parse_templates(text)
    except VocabularyError as error:
        raise VocabularyError(f"templates file {path}: {error.what}", error.remedy) from error


def parse_vocabulary(text: str) -> Vocabulary:
    """Make a vocabulary of TOML text.

    Raises:
        VocabularyError: It is not TOML, has a key of another name or type, or makes no vocabulary.
    """
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: TOMLDecodeError and huge numbers
        raise VocabularyError(f"not TOML: {error}", "see docs/prompts.md for an example") from error
    unknown = sorted(set(table) - set(_KEYS))
    if unknown:
        raise VocabularyError(f"unknown key {unknown[0][:60]!r}", f"known are {', '.join(_KEYS)}")
    template = table.get("template", DEFAULT_TEMPLATE)
    if not isinstance(template, str):
        raise VocabularyError("'template' is not a string", "write template = 'a photo of a {}.'")
    return Vocabulary(
        classes=_words(table.get("classes", []), "classes"),
        background=_words(table.get("background", []), "background"),
        synonyms=_words_of_classes(table, "synonyms"),
        template=template,
        descriptions=_words_of_classes(table, "descriptions"),
        more_background=_words(table.get("more_background", []), "more_background"),
    )


def parse_templates(text: str) -> tuple[str, ...]:
    """Return the lines of ``text`` that are neither blank nor start with ``#``.

    Raises:
        VocabularyError: There is none, one is repeated, or a line is no template.
    """
    lines = [line.strip() for line in text.split("\n")]
    templates = tuple(line for line in lines if line and not line.startswith("#"))
    if not templates:
        raise VocabularyError("it holds no template", "put one on each line")
    for template in templates:
        check_template(template)
    _check_words(templates, "template")
    return templates


def _check_words(words: Iterable[str], kind: str) -> None:
    for word, count in Counter(words).items():
        if not word.strip():
            raise VocabularyError(f"an empty {kind}", "remove or name it")
        if not word.isprintable():
            raise VocabularyError(
                f"the {kind} {word[:60]!r} has characters that cannot be printed",
                "write it with letters and plain spaces",
            )
        if count > 1:
            raise VocabularyError(f"the {kind} '{word}' appears twice", "keep one")


def _check_sentences(name: str, sentences: tuple[str, ...]) -> None:
    if len(sentences) > MAX_DESCRIPTIONS:
        raise VocabularyError(
            f"{len(sentences)} descriptions of '{name}'", f"keep the best {MAX_DESCRIPTIONS}"
        )
    longest = max(sentences, key=len)
    if len(longest) > _LONGEST_DESCRIPTION:
        raise VocabularyError(
            f"a description of '{name}' has {len(longest)} letters, more than "
            f"{_LONGEST_DESCRIPTION}: '{longest[:60]}...'",
            "shorten it: CLIP reads 77 tokens",
        )


def _words(value: Any, key: str) -> tuple[str, ...]:  # noqa: ANN401  (TOML gives anything)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise VocabularyError(f"'{key[:60]}' is not a list of strings", 'write ["one", "two"]')
    return tuple(value)


def _words_of_classes(table: dict[str, Any], key: str) -> dict[str, tuple[str, ...]]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise VocabularyError(f"'{key}' is not a table", f'write [{key}] and name = ["one", "two"]')
    return {name: _words(words, f"{key}.{name}") for name, words in value.items()}


@cache
def shipped_synonyms() -> tuple[tuple[str, ...], ...]:
    """Return each class of the shipped vocabularies that has synonyms, with these."""
    shipped = [load_vocabulary(name).synonyms for name in SHIPPED]
    return tuple((name, *words) for synonyms in shipped for name, words in synonyms.items())


def _shipped(name: str) -> str:
    return shipped_path(name).read_text("utf-8")


def _read(path: Path, kind: str, remedy: str) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise VocabularyError(f"the {kind} {path} is larger than {_LARGEST_FILE} bytes", remedy)
        return path.read_text("utf-8-sig")  # Windows' editors like to put a mark at the start
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no file can have
        raise VocabularyError(f"cannot read the {kind} {str(path)!r}: {error}", remedy) from error
