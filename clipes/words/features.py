"""Text features: the vectors that stand for classes and background words.

They come from CLIP's text tower, from a user's file, or, for weights without a text tower, from the
stand-in vectors that ship with the package.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipes.choices import Descriptions, Fusion
from clipes.disk.files import read_arrays, write_arrays
from clipes.errors import UnknownClassError, VocabularyError
from clipes.names import SAME_THING, folded, nearest
from clipes.types import Float32Array
from clipes.words.shipped import shipped_path
from clipes.words.vocabulary import shipped_synonyms

_ADVISED = 5
"""Most names that an error tells, with what may be meant."""

_ALIKE = 0.76
"""How alike two names must be for one to be meant: "truk" is a truck, but no "goat" a boat."""

_LARGEST_FILE = 1 << 28  # bytes; 254 classes of any CLIP are under a megabyte

_LEAST_ENTRY = 1e-100  # the largest of a vector: less has no square in float64


@dataclass(frozen=True)
class TextFeatures:
    """Vectors of the classes, in mask order, and of the background words.

    Attributes:
        classes: C class names.
        background_words: B background words.
        class_vectors: (C, E) float32 unit rows.
        background_vectors: (B, E) float32 unit rows.
        model: Name of the CLIP model they belong to.
        note: What a reader of the results must know about their origin; may be empty.
        phrase_vectors: For each of the C classes (S, E) float32 unit rows, where several vectors
            are to be had of one: of its synonyms for fusion of maps, of its name and each of its
            descriptions for their maximum. The class's row of ``class_vectors`` stands for them all
            where one vector is wanted. Empty otherwise.
        fusion: How synonyms became, or are to become, one.
        descriptions: What descriptions do for a class; None without them.
        templates: What the words were put into; empty where that is not known.
    """

    classes: tuple[str, ...]
    background_words: tuple[str, ...]
    class_vectors: Float32Array
    background_vectors: Float32Array
    model: str
    note: str = ""
    phrase_vectors: tuple[Float32Array, ...] = ()
    fusion: Fusion = Fusion.sentence
    descriptions: Descriptions | None = None
    templates: tuple[str, ...] = ()

    def for_classes(self, classes: tuple[str, ...]) -> TextFeatures:
        """Return these features for ``classes``, in that order.

        Names are compared without regard to spelling (``folded``), unless one is
        there letter by letter. A class may also be one of the background words; it then stops being
        one, as no class can compete with itself.

        Raises:
            UnknownClassError: A class has no vector here.
        """
        found = self._rows(classes)
        rows = [index for index in map(found.get, classes) if index is not None]
        if len(rows) < len(classes):
            raise self._unknown(self.lacks(classes))
        vectors = np.concatenate([self.class_vectors, self.background_vectors])
        return replace(
            self.without_words(classes),
            classes=classes,
            class_vectors=vectors[rows],
            phrase_vectors=tuple(self.phrase_vectors[k] for k in rows if self.phrase_vectors),
        )

    def with_words(self, words: tuple[str, ...], vectors: Float32Array) -> TextFeatures:
        """Return these features with further background words and their (n, E) unit rows."""
        return replace(
            self,
            background_words=(*self.background_words, *words),
            background_vectors=np.concatenate([self.background_vectors, vectors]),
        )

    def without_words(self, words: Collection[str]) -> TextFeatures:
        """Return these features without some of the background words, however they are spelt."""
        gone = set(map(folded, words))
        kept = [k for k, word in enumerate(self.background_words) if folded(word) not in gone]
        return replace(
            self,
            background_words=tuple(self.background_words[k] for k in kept),
            background_vectors=self.background_vectors[kept],
        )

    def lacks(self, classes: Sequence[str]) -> list[str]:
        """Return those of ``classes`` that have no vector here."""
        return [name for name, index in self._rows(classes).items() if index is None]

    def meant(self, name: str) -> str | None:
        """Return the class or word that a name without a vector may mean; None if none is near."""
        same = (*SAME_THING, *shipped_synonyms())
        return nearest(name, self._names(), groups=same, alike=_ALIKE)

    def _names(self) -> tuple[str, ...]:
        return self.classes if self.phrase_vectors else (*self.classes, *self.background_words)

    def _rows(self, classes: Sequence[str]) -> dict[str, int | None]:
        """Return the row of each class among the vectors of classes, then background words."""
        backwards = list(enumerate(self._names()))[::-1]  # of several, the first wins
        row = {folded(name): index for index, name in backwards}
        row |= {name: index for index, name in backwards}
        return {name: row.get(name, row.get(folded(name))) for name in classes}

    def _unknown(self, missing: Sequence[str]) -> UnknownClassError:
        """Return the error of classes without a vector, with the names that may be meant."""
        told = missing[:_ADVISED]
        meant = {name: self.meant(name) for name in told}
        more = f" and {len(missing) - len(told)} more" if missing[_ADVISED:] else ""
        near = [f"'{other}' for '{name}'" for name, other in meant.items() if other is not None]
        advice = "use weights with a text tower (--weights openai) or give --text-features FILE.npz"
        return UnknownClassError(
            f"no text feature for the class{'es' if missing[1:] else ''} "
            f"{', '.join(map(repr, told))}{more} among those of {self.model or 'the given file'}",
            f"did you mean {', '.join(near)}? Else {advice}" if near else advice,
        )


def unit_rows(vectors: np.ndarray) -> Float32Array:
    """Scale (n, E) rows to length 1, as float32."""
    wide = vectors.astype(np.float64)
    scaled: Float32Array = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def fuse_vectors(vectors: Float32Array) -> Float32Array:
    """Return the mean of (S, E) unit vectors, scaled to length 1: (E,). One stays as it is."""
    if len(vectors) == 1:
        only: Float32Array = vectors[0]
        return only
    fused: Float32Array = unit_rows(vectors.astype(np.float64).mean(0, keepdims=True))[0]
    return fused


def _have_lengths(vectors: np.ndarray) -> bool:
    """Tell whether the rows (n, E) have lengths that ``unit_rows`` can divide by."""
    largest = np.abs(vectors).max(1, initial=0).astype(np.float64)
    return bool(((largest > _LEAST_ENTRY) & (largest < 1 / _LEAST_ENTRY)).all())


def load_text_features(path: Path) -> TextFeatures:
    """Read the ``--text-features`` format.

    Arrays of the .npz: ``names`` (C+B,) strings, ``features`` (C+B, E) float, ``background`` (C+B,)
    bool, ``model`` (); class rows in mask order, background rows anywhere; ``note`` () is optional.
    Rows are scaled to length 1.

    Raises:
        VocabularyError: The file is missing, malformed, or holds values that are not finite.
    """
    remedy = "it needs the arrays names, features, background and model"
    try:
        arrays = read_arrays(path, _LARGEST_FILE)
        names, features = arrays["names"], arrays["features"]
        background, model = arrays["background"], arrays["model"]
    except (OSError, ValueError, KeyError) as error:
        raise VocabularyError(f"cannot read text features {path}: {error}", remedy) from error
    note = str(arrays.get("note", ""))
    rows = len(names) if names.ndim == 1 else -1
    problem = ""
    if names.dtype.kind != "U" or background.dtype != np.bool_ or model.shape != ():
        problem = "names, background or model has the wrong type"
    elif features.dtype.kind != "f" or features.ndim != 2:
        problem = (
            f"features is {features.dtype} with {features.ndim} dimensions, not (rows, E) float"
        )
    elif len(features) != rows or background.shape != (rows,):
        problem = f"{rows} names, {len(features)} features, {background.size} background flags"
    elif not _have_lengths(features):
        problem = "a feature is zero or not finite, or nearly so"
    elif background.all():
        problem = "no class row"
    elif len(set(names[~background].tolist())) != int((~background).sum()):
        problem = "a class appears twice"
    if problem:
        raise VocabularyError(f"text features {path}: {problem}", remedy)
    unit = unit_rows(features)
    return TextFeatures(
        classes=tuple(names[~background].tolist()),
        background_words=tuple(names[background].tolist()),
        class_vectors=unit[~background],
        background_vectors=unit[background],
        model=str(model),
        note=note,
    )


def features_to_arrays(features: TextFeatures) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of the ``--text-features`` format."""
    count = len(features.classes)
    return {
        "names": np.array([*features.classes, *features.background_words]),
        "features": np.concatenate([features.class_vectors, features.background_vectors]),
        "background": np.arange(count + len(features.background_words)) >= count,
        "model": np.array(features.model),
        "note": np.array(features.note),
    }


def save_text_features(path: Path, features: TextFeatures) -> None:
    """Write the ``--text-features`` format, atomically."""
    write_arrays(path, features_to_arrays(features), compress=False)


def stand_in() -> TextFeatures:
    """Return the class vectors that ship for OpenAI's ViT-B/16 without its text tower.

    They were fitted to image-level labels by ``clipes prompts fit``; docs/weights.md has the
    command, and what it costs in mIoU.
    """
    return load_text_features(shipped_path("standin-vit-b-16.npz"))
