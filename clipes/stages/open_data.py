"""What a run starts from: a data set, and the words for its classes."""

from __future__ import annotations

from pathlib import Path

from clipes.datasets import Dataset, open_dataset
from clipes.errors import UsageError
from clipes.words.vocabulary import Vocabulary, load_vocabulary


def open_labelled(
    kind: str,
    *,
    root: Path | None,
    split: str | None,
    labels: Path | None,
    prompts: str | None,
    difficult: bool = True,
) -> tuple[Vocabulary, Dataset]:
    """Open a data set and the vocabulary of its classes.

    The classes of a folder are its own unless ``prompts`` name them; the background words are VOC's
    or COCO's unless ``prompts`` say more.
    """
    vocabulary, classes = _vocabulary(kind, prompts)
    data = open_dataset(
        kind, root=root, split=split, labels=labels, classes=classes, difficult=difficult
    )
    return vocabulary if classes else vocabulary.with_classes(data.classes), data


def open_unlabelled(
    kind: str,
    *,
    root: Path | None,
    split: str | None,
    prompts: str | None,
    difficult: bool = True,
) -> tuple[Vocabulary, Dataset]:
    """Open a data set without its labels, and the vocabulary to look for; as ``open_labelled``.

    Raises:
        UsageError: Nothing says what to look for.
    """
    vocabulary, classes = _vocabulary(kind, prompts)
    data = open_dataset(
        kind, root=root, split=split, classes=classes, difficult=difficult, labelled=False
    )
    if not data.classes:
        raise UsageError(
            f"nothing says which classes to look for in {data.root}",
            "name a vocabulary with --prompts (voc, coco or a file), or write classes.txt there",
        )
    return vocabulary if classes else vocabulary.with_classes(data.classes), data


def _vocabulary(kind: str, prompts: str | None) -> tuple[Vocabulary, tuple[str, ...] | None]:
    """Return the vocabulary of a kind of data set, and its classes unless they are the data's."""
    vocabulary = load_vocabulary(prompts or ("coco" if kind == "coco" else "voc"))
    return vocabulary, vocabulary.classes if prompts or kind != "folder" else None
