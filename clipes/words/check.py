"""What may be wrong with a vocabulary: words and vectors that get in each other's way.

Everything here is a remark for a person to judge; nothing is changed. A background word takes its
share of the softmax from every class it resembles: fine for "railroad" beside "train", fatal for
"keyboard" where keyboards are a class (CLIP-ES drops "keyboard" and "sign" for COCO for this
reason).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from clipes.choices import Fusion
from clipes.types import Float32Array
from clipes.words.features import TextFeatures
from clipes.words.vocabulary import Vocabulary

NEAR = 1 / 3
"""Two vectors count as near when their distance (1 - cosine) is below this share of the usual one.

On real ViT-B/16 features of COCO's classes that is a cosine of 0.92: above it are bicycle and
motorcycle, bear and teddy bear, car and truck, but not cat and dog; of VOC's background words
railroad (to train).
"""

SAME = 1 / 10
"""Likewise for two background words, which may well be near: above it they are one word twice."""

PIECES = 3
"""Tokens from which on a single word counts as one that CLIP does not know as a whole."""

_FEWEST_CLASSES = 5  # from which on the distances among classes say what is usual
_PARTS = re.compile(r"[\W_]+")
_PLURAL = re.compile(r"..[^s]s$")


@dataclass(frozen=True)
class Remark:
    """One thing to look at.

    Attributes:
        text: What it is, in one line.
        fatal: Whether it stops ``clipes cam``.
    """

    text: str
    fatal: bool = False


@dataclass(frozen=True)
class Entry:
    """What the check has to say of one class or background word.

    Attributes:
        name: The class or word.
        background: Whether it is a background word.
        tokens: Tokens of its longest prompt, start and end of text among them.
        nearest: The class or word, other than itself, with the nearest vector; empty if unknown.
        cosine: Cosine to it; 0 if unknown.
    """

    name: str
    background: bool
    tokens: int
    nearest: str = ""
    cosine: float = 0.0


def collisions(vocabulary: Vocabulary) -> Iterator[Remark]:
    """Yield background words, then classes, that share words with a class or its synonyms.

    Compared are whole words, without regard to case and a plural s: "sign" collides with "stop
    sign", "plant" does not with "pottedplant".
    """
    said = {name: _said(name, vocabulary) for name in vocabulary.classes}
    for word in vocabulary.background:
        for name, hit in rivals(word, vocabulary):
            yield Remark(
                f"background word '{word}' {_relation(word, hit)} the class "
                f"'{name}'{_by(name, hit)}: it will compete with it"
            )
    for first, second in combinations(vocabulary.classes, 2):
        pairs = ((a, b) for a in said[first] for b in said[second])
        if hits := next(((a, b) for a, b in pairs if _parts(a) == _parts(b)), None):
            yield Remark(
                f"classes '{first}'{_by(first, hits[0])} and '{second}'{_by(second, hits[1])} "
                "say the same"
            )
    for first, second in combinations(vocabulary.background, 2):
        if _parts(first) == _parts(second):
            yield Remark(f"background words '{first}' and '{second}' say the same")


def rivals(word: str, vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    """Yield the classes that a background word shares words with, and which of their phrases."""
    for name in vocabulary.classes:
        said = _said(name, vocabulary)
        if hit := next((phrase for phrase in said if _overlap(word, phrase)), None):
            yield name, hit


def spelling(
    vocabulary: Vocabulary,
    templates: Sequence[str],
    fusion: Fusion,
    tokenize: Callable[[str], Sequence[str]],
    context_length: int,
) -> Iterator[Remark]:
    """Yield words that CLIP reads badly or not at all, and prompts that are too long for it.

    Args:
        vocabulary: The words.
        templates: What they are put into.
        fusion: Where synonyms become one, which decides how long prompts are.
        tokenize: Text to pieces, without start and end of text.
        context_length: Tokens the tower reads, with start and end of text.
    """
    names = (*vocabulary.classes, *vocabulary.background)
    separate = vocabulary.phrases(Fusion.feature)
    for name, phrases in zip(names, separate, strict=True):
        for phrase in (*phrases, *vocabulary.descriptions.get(name, ())):
            yield from _spelling(name, phrase, tokenize)
    for name, prompts in zip(names, vocabulary.texts(templates, fusion), strict=True):
        length = _longest(prompts, tokenize)
        if length > context_length:
            yield Remark(
                f"the prompt of '{name}' has {length} tokens, CLIP reads {context_length}: shorten "
                "its words, synonyms or descriptions",
                fatal=True,
            )


def near(features: TextFeatures) -> Iterator[Remark]:
    """Yield pairs of classes and background words whose vectors are unusually near.

    What is usual is the median distance between two classes, or between any two of all words where
    there are fewer than five classes.
    """
    classes, background = features.class_vectors, features.background_vectors
    usual = _usual_distance(classes, background)
    alike, equal = 1 - NEAR * usual, 1 - SAME * usual
    names, words = features.classes, features.background_words
    for i, j, cosine in _above(classes, classes, alike):
        if i < j:
            yield Remark(
                f"classes '{names[i]}' and '{names[j]}' have near vectors (cosine {cosine:.3f}, "
                f"near is from {alike:.3f} on): images with both may mix them up"
            )
    for i, j, cosine in _above(background, classes, alike):
        yield Remark(
            f"background word '{words[i]}' is near the class '{names[j]}' (cosine {cosine:.3f}, "
            f"near is from {alike:.3f} on): it may take the class's place"
        )
    for i, j, cosine in _above(background, background, equal):
        if i < j:
            yield Remark(
                f"background words '{words[i]}' and '{words[j]}' have one vector (cosine "
                f"{cosine:.3f}): one of them is enough"
            )


def entries(
    vocabulary: Vocabulary,
    templates: Sequence[str],
    fusion: Fusion,
    tokenize: Callable[[str], Sequence[str]],
    features: TextFeatures | None,
) -> list[Entry]:
    """Return one line of a table for each class, then for each background word.

    Args:
        vocabulary: The words.
        templates: What they are put into.
        fusion: Where synonyms become one.
        tokenize: Text to pieces, without start and end of text.
        features: Vectors of the classes and of any background words, or None.
    """
    names = (*vocabulary.classes, *vocabulary.background)
    nearest = _nearest(features) if features is not None else {}
    table = []
    prompts = vocabulary.texts(templates, fusion)
    for index, (name, of_name) in enumerate(zip(names, prompts, strict=True)):
        background = index >= len(vocabulary.classes)
        tokens = _longest(of_name, tokenize)
        table.append(Entry(name, background, tokens, *nearest.get((name, background), ())))
    return table


def _spelling(name: str, phrase: str, tokenize: Callable[[str], Sequence[str]]) -> Iterator[Remark]:
    whose = f"'{phrase}'" + (f" (of '{name}')" if phrase != name else "")
    if not tokenize(phrase):
        yield Remark(f"nothing is left of {whose} for CLIP to read")
        return
    if not phrase.isascii():
        yield Remark(f"{whose} has characters beyond ASCII: CLIP was trained on English")
    elif "_" in phrase:
        yield Remark(f"{whose} is written with '_', which CLIP reads as a sign: use spaces")
    for word in re.findall(r"[^\W_]+", phrase):
        pieces = [piece.removesuffix("</w>") for piece in tokenize(word)]
        if len(pieces) >= PIECES and word.isascii() and not word.isdigit():
            yield Remark(
                f"'{word}'{'' if word == name else f' (of {name!r})'} is no word to CLIP, it reads "
                f"'{' '.join(pieces)}': if it is several words, write spaces"
            )


def _longest(prompts: Sequence[str], tokenize: Callable[[str], Sequence[str]]) -> int:
    return max(len(tokenize(prompt)) for prompt in prompts) + 2


def _said(name: str, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return the name and its synonyms, each once."""
    return tuple(dict.fromkeys((name, *vocabulary.synonyms.get(name, ()))))


def _parts(phrase: str) -> tuple[str, ...]:
    """Return the words of a phrase in lower case, without a plural s."""
    words = [word for word in _PARTS.split(phrase.casefold()) if word]
    return tuple(word[:-1] if _PLURAL.search(word) else word for word in words)


def _contains(long: tuple[str, ...], short: tuple[str, ...]) -> bool:
    starts = range(len(long) - len(short) + 1)
    return bool(short) and any(long[start : start + len(short)] == short for start in starts)


def _overlap(first: str, second: str) -> bool:
    one, other = _parts(first), _parts(second)
    return _contains(one, other) or _contains(other, one)


def _relation(word: str, phrase: str) -> str:
    one, other = _parts(word), _parts(phrase)
    if one == other:
        return "is also"
    return "contains" if _contains(one, other) else "is part of"


def _by(name: str, phrase: str) -> str:
    return f" (synonym '{phrase}')" if phrase != name else ""


def _usual_distance(classes: Float32Array, background: Float32Array) -> float:
    vectors = classes if len(classes) >= _FEWEST_CLASSES else np.concatenate([classes, background])
    if len(vectors) < 2:
        return 0.0
    first, second = np.triu_indices(len(vectors), 1)
    return float(np.median(1 - (vectors @ vectors.T)[first, second]))


def _above(
    rows: Float32Array, columns: Float32Array, threshold: float
) -> Iterator[tuple[int, int, float]]:
    cosines = rows @ columns.T
    for i, j in np.argwhere(cosines > threshold):
        yield int(i), int(j), float(cosines[i, j])


def _nearest(features: TextFeatures) -> dict[tuple[str, bool], tuple[str, float]]:
    """Return the nearest other name and the cosine to it, by name and whether it is background."""
    keys = [(name, False) for name in features.classes]
    keys += [(word, True) for word in features.background_words]
    vectors = np.concatenate([features.class_vectors, features.background_vectors])
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    best = cosines.argmax(1)
    return {
        key: (keys[best[row]][0], float(cosines[row, best[row]]))
        for row, key in enumerate(keys)
        if len(keys) > 1
    }
