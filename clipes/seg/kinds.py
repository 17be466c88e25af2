"""The kinds of segmenters: which spec, recipe and predictor go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clipes.config import SegmenterPreset
from clipes.seg.deeplab import DeepLabSpec
from clipes.seg.deeplab_recipe import DeepLabRecipe
from clipes.seg.loss import Guidance
from clipes.seg.predict import Predictor
from clipes.seg.recipes import LabelPredictor, Model, Recipe, Spec, TestSettings


@dataclass(frozen=True)
class Kind:
    """A kind of segmenter.

    Attributes:
        preset: What says how one is trained.
        spec: What its checkpoints say of a model.
        recipe: How it is trained: of a preset, class names in mask order, and how confidence
            counts.
        predictor: How a model is asked.
    """

    preset: type[SegmenterPreset]
    spec: type[Spec]
    recipe: Callable[[SegmenterPreset, tuple[str, ...], Guidance], Recipe[Any, Any]]
    predictor: Callable[[Model, TestSettings], LabelPredictor]


KINDS: Mapping[str, Kind] = {
    DeepLabSpec.kind: Kind(SegmenterPreset, DeepLabSpec, DeepLabRecipe, Predictor),
}
"""By the name that checkpoints have for them."""

OLDEST = DeepLabSpec.kind
"""The kind of checkpoints that name none: clipes 0.1 knew no other."""


def recipe_for(
    preset: SegmenterPreset, classes: tuple[str, ...], guidance: Guidance
) -> Recipe[Any, Any]:
    """Return the recipe of a preset; arguments as for ``Kind.recipe``."""
    kind = next(kind for kind in KINDS.values() if type(preset) is kind.preset)
    return kind.recipe(preset, classes, guidance)
