"""How a text that names several labels is split into them: decided once for a whole file.

Names may hold spaces and commas, and people write both between names. Where the classes are known,
they tell (``split_by_classes``). Where they are not, the file must tell (``find_names``): a
mark that can be in no name does, and so does a name that stands alone elsewhere. What can be read
in two ways is refused; what was taken for what is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from clipes.datasets.base import printable
from clipes.datasets.rows import RawLabels
from clipes.errors import DatasetError
from clipes.names import folded

Split: TypeAlias = Callable[[str], list[str]]

_MARK = re.compile(r"[;\uff1b|\t\r\n]")  # U+FF1B: the wide semicolon
"""What is in no name."""

_BREAK = re.compile(r"[\t\r\n]")
_COMMA = re.compile(r"[,\u3001\uff0c]")  # also the ideographic and the wide comma
_JOINT = re.compile(r"[/+&]")
"""What joins names, and is also in names: nothing is split there."""

_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"[^\s,\u3001\uff0c]+")
_PIECE = re.compile(r"[^\s,\u3001\uff0c/+&]+")
_FREE_TEXT = (".csv", ".json")
"""Formats in which a space is no separator unless the file shows it."""

_SHOWN = 3


def choose_split(
    path: Path, raw: RawLabels, classes: Sequence[str]
) -> tuple[Split, tuple[str, ...]]:
    """Return what splits the texts of a label file, and what is to be said about it.

    Args:
        path: The file.
        raw: What it holds.
        classes: The class names, where they are known.

    Raises:
        DatasetError: The classes are unknown and a text may be one label or several.
    """
    names = frozenset(map(folded, classes))
    remarks: list[str] = []
    if not classes:
        texts: dict[str, str] = {}
        listed: dict[str, str] = {}
        for image, labels in raw.rows:
            into = texts if isinstance(labels, str) else listed
            for text in [labels] if isinstance(labels, str) else map(str, labels):
                if text.strip():
                    into.setdefault(text.strip(), image)
        single = {folded(part) for text in listed for part in _parts(_MARK, text)}
        words = path.suffix.lower() not in _FREE_TEXT
        found, remark = find_names(path, texts, single, words=words)
        # Split by names here too: with these as its classes the file will read the same again.
        names = frozenset({*single, *map(folded, found)})
        remarks = [remark, "" if raw.classes else _whole_in_lists(path, listed, names)]
    longest = max((len(_WORD.findall(name)) for name in names), default=1)
    return lambda text: split_by_classes(text, names, longest), tuple(filter(None, remarks))


def split_by_classes(text: str, names: Collection[str], longest: int) -> list[str]:
    """Split a text of labels whose names are known.

    It is a name as a whole, else split at ``;``, ``|``, tabs and line ends, else at such commas and
    spaces that every part is a name or a class number; of several ways, that of the longest names.
    If there is none, what it holds is left for the caller to complain about.

    Args:
        text: What stands beside an image.
        names: The class names, folded.
        longest: Most words in one of them.
    """
    if folded(text) in names and not _BREAK.search(text.strip()):
        return [text.strip()]
    if _MARK.search(text):
        return _parts(_MARK, text)
    words = [match.span() for match in _WORD.finditer(text)]
    found = _cover(text, words, names, longest)
    if found or not words:
        return found
    if _COMMA.search(text):
        return _parts(_COMMA, text)
    singly = [text[slice(*word)] for word in words]
    return singly if any(_known(word, names) for word in singly) else [text.strip()]


def find_names(
    path: Path, texts: Mapping[str, str], single: Collection[str], *, words: bool
) -> tuple[list[str], str]:
    """Find the names in the texts of a file whose classes are unknown.

    A mark that is in no name (``;``, ``|``, tab) anywhere in the file separates, and nothing else.
    Else commas separate if every text that holds one has a part that stands alone elsewhere, or in
    another place of another such text. Else spaces separate if every word of these texts
    stands alone elsewhere, or is a number. ``/``, ``+`` and ``&`` never separate, but a text of
    which every part between them stands alone elsewhere is refused.

    Args:
        path: The file, for messages.
        texts: What stands beside images, with the first image each stands beside.
        single: Labels, folded, that the file gives one by one.
        words: Whether the format promises that a space separates; then no text of several words is
            taken for one name.

    Returns:
        The names, and a remark where a reader could take the file otherwise.

    Raises:
        DatasetError: A text may be one label or several.
    """
    marks = list(filter(None, map(_MARK.search, texts)))
    if marks:
        return _found(path, texts, _MARK, f"{marks[0][0]!r} separates labels", silent=True)
    if joined := _joined(texts, {*single, *map(folded, texts)}, _JOINT):
        raise _ambiguous(path, joined[0], texts)
    listed = [text for text in texts if _COMMA.search(text)]
    if listed:
        doubtful = _doubtful_lists(listed, {*single, *map(folded, texts.keys() - set(listed))})
        if doubtful:
            raise _ambiguous(path, doubtful[0], texts)
        comma = _COMMA.findall(listed[0])[0]
        rule = f"{comma!r} separates labels, as in {_quoted(listed[:1])}"
        return _found(path, texts, _COMMA, rule)
    spaced = [text for text in texts if _SPACE.search(text)]
    alone = {*single, *map(folded, texts.keys() - set(spaced))}
    several = [text for text in spaced if _all_in(text.split(), alone)]
    if spaced and len(several) == len(spaced):
        return _found(path, texts, _SPACE, f"a space separates labels, as in {_quoted(spaced[:1])}")
    if several or (spaced and words):
        raise _ambiguous(path, (several or spaced)[0], texts)
    also = " or '/'" if any(map(_JOINT.search, texts)) else ""
    return _found(path, texts, _MARK, f"labels are not split at spaces{also}", silent=True)


def _whole_in_lists(path: Path, listed: Mapping[str, str], names: Collection[str]) -> str:
    """Return what is to be said of labels given one by one that look like several.

    Args:
        path: The file, for messages.
        listed: The labels, with the first image that each is given.
        names: All names, folded.

    Raises:
        DatasetError: Every part of one of them is a name, too.
    """
    separator = re.compile(f"{_COMMA.pattern}|{_JOINT.pattern}")
    plain = [text for text in listed if not _MARK.search(text)]
    if joined := _joined(plain, names, separator):
        raise _ambiguous(path, joined[0], listed)
    whole = [text for text in plain if len(_parts(separator, text)) > 1]
    rule = "labels in lists are split at ';' only; one label each"
    return f"{path}: {rule}: {_quoted(whole)}" if whole else ""


def _joined(texts: Iterable[str], names: Collection[str], separator: re.Pattern[str]) -> list[str]:
    """Return the texts of which every part between separators is one of the folded ``names``."""
    parts = {text: _parts(separator, text) for text in texts}
    return [text for text, found in parts.items() if len(found) > 1 and _all_in(found, names)]


def _found(
    path: Path, texts: Iterable[str], separator: re.Pattern[str], rule: str, silent: bool = False
) -> tuple[list[str], str]:
    """Return the names between separators, and the rule that was taken with what it left whole.

    Args:
        path: The file.
        texts: What is split.
        separator: Where.
        rule: What to say.
        silent: Whether there is nothing to say unless a name of several words was left whole.
    """
    names = list(dict.fromkeys(part for text in texts for part in _parts(separator, text)))
    whole = [name for name in names if len(_PIECE.findall(name)) > 1]
    if not whole:
        return names, "" if silent else f"{path}: {rule}"
    # Those that are most likely to be several labels are told first.
    known = set(map(folded, names))
    whole.sort(key=lambda name: not _all_in(_PIECE.findall(name), known))
    return names, f"{path}: {rule}; one label each: {_quoted(whole)}"


def _parts(separator: re.Pattern[str], text: str) -> list[str]:
    return [part.strip() for part in separator.split(text) if part.strip()]


def _all_in(parts: Sequence[str], names: Collection[str]) -> bool:
    """Tell whether all ``parts`` are among the folded ``names``, or all are numbers."""
    return all(map(str.isdigit, parts)) or all(folded(part) in names for part in parts)


def _known(word: str, names: Collection[str]) -> bool:
    """Tell whether a word is one of the folded ``names``, or a number."""
    return folded(word) in names or (word.isascii() and word.isdigit())


def _cover(
    text: str, words: Sequence[tuple[int, int]], names: Collection[str], longest: int
) -> list[str]:
    """Cut a text into the fewest known names, none if that leaves a rest.

    Args:
        text: The text.
        words: Where its words start and end.
        names: The names, folded.
        longest: Most words in one of them.
    """
    # best[n]: the fewest names that the first n words are, and how many words come before the last.
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    for end in range(1, len(words) + 1):
        starts = (
            (best[start][0] + 1, start)
            for start in range(max(0, end - longest), end)
            if start in best
            and (
                folded(text[words[start][0] : words[end - 1][1]]) in names
                or (start == end - 1 and _known(text[slice(*words[start])], names))
            )
        )
        fewest = min(starts, default=None)
        if fewest is not None:
            best[end] = fewest
    if len(words) not in best:
        return []
    found, end = [], len(words)
    while end:
        start = best[end][1]
        found.append(text[words[start][0] : words[end - 1][1]])
        end = start
    return found[::-1]


def _doubtful_lists(texts: Sequence[str], alone: Collection[str]) -> list[str]:
    """Return the texts with commas of which nothing shows that they are several labels.

    A part that stands alone, or in different places of two texts, is a label; so are all parts of a
    text that has one.

    Args:
        texts: The texts with commas.
        alone: Labels, folded, that stand alone.
    """
    parts = {text: [folded(part) for part in _parts(_COMMA, text)] for text in texts}
    places: dict[str, set[int]] = {}
    for listed in parts.values():
        for place, part in enumerate(listed):
            places.setdefault(part, set()).add(place)
    sure = {*alone, *(part for part, where in places.items() if len(where) > 1)}
    doubtful = list(parts)
    while True:
        rest = []
        for text in doubtful:
            listed = parts[text]
            if len(listed) < 2 or any(part in sure for part in listed) or _all_in(listed, ()):
                sure.update(listed)
            else:
                rest.append(text)
        if len(rest) == len(doubtful):
            return rest
        doubtful = rest


def _quoted(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(f"'{printable(text)}'" for text in texts[:_SHOWN]) + more


def _ambiguous(path: Path, text: str, texts: Mapping[str, str]) -> DatasetError:
    return DatasetError(
        f"{path}: {_quoted([text])} (of {printable(texts[text])}) may be one label or several",
        "write ';' between labels, and after one that is alone; or list all names in classes.txt",
    )
