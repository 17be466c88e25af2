"""The vectors of a run's words, where and in the order in which maps are made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipes.choices import Descriptions, Fusion
from clipes.errors import VocabularyError
from clipes.maps.fusion import MakeMaps, fused_maps
from clipes.types import Float32Array
from clipes.words.features import TextFeatures

BACKGROUND_REMEDY = (
    "give 'clipes cam' such words (--prompts, --text-features), or weights with a text tower"
)


class WordVectors:
    """Vectors of C classes and B background words on the device of a tower.

    Classes and background words are worked on in alphabetical order, so that the order they have in
    a vocabulary or in an annotation does not change a map, not even in the last bit.

    Args:
        text: The vectors; classes in the order in which labels count.
        device: Where they are to be.
        dtype: Of the tower.

    Raises:
        VocabularyError: There are no words for the background.

    Attributes:
        classes: (C, E), in the order in which labels count.
        background: (B, E), in alphabetical order.
    """

    def __init__(self, text: TextFeatures, device: torch.device, dtype: torch.dtype) -> None:
        words = text.background_words
        if not words:  # a class alone would have all of every image, and its map say nothing
            raise VocabularyError("there are no words for the background", BACKGROUND_REMEDY)
        alphabetical = sorted(range(len(words)), key=words.__getitem__)
        background = text.background_vectors[alphabetical]
        self.classes = torch.from_numpy(text.class_vectors).to(device, dtype)
        self.background = torch.from_numpy(background).to(device, dtype)
        self._names = text.classes
        self._largest = text.fusion is Fusion.cam_max
        several = [torch.from_numpy(vectors).to(device, dtype) for vectors in text.phrase_vectors]
        self._words, self._synonyms = self.classes, several
        if text.descriptions is Descriptions.max:
            self._words, self._synonyms = _side_by_side(several), []

    def __len__(self) -> int:
        """C."""
        return len(self._names)

    def by_name(self, labels: Sequence[int]) -> list[int]:
        """Return 0-based labels in the order of their names."""
        return sorted(labels, key=self._names.__getitem__)

    def of(self, labels: Sequence[int]) -> Tensor:
        """Return the vectors that maps are made of.

        Args:
            labels: (K,) 0-based.

        Returns:
            (K, E); or (K, S, E), where the largest of S scores is a class's.
        """
        return self._words[list(labels)]

    def fused(self, maps: Float32Array, make: MakeMaps, labels: Sequence[int]) -> Float32Array:
        """Return the maps of classes whose synonyms are fused as maps; see ``fused_maps``.

        Args:
            maps: (K, h, w) of one vector a class.
            make: Makes the maps of some vectors.
            labels: (K,) 0-based.
        """
        synonyms = [self._synonyms[label] for label in labels if self._synonyms]
        text = self.classes[list(labels)]
        return fused_maps(maps, make, text, self.background, synonyms, largest=self._largest)


def _side_by_side(several: Sequence[Tensor]) -> Tensor:
    """Return C times (S, E) vectors as (C, most S, E): the last is repeated where there are fewer.

    It changes no maximum.
    """
    places = torch.arange(max(map(len, several)))
    return torch.stack([vectors[places.clamp(max=len(vectors) - 1)] for vectors in several])
