"""The kinds of segmenters: which spec, recipe and predictor go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clipes.config import (
    AnySegmenterPreset,
    FrozenPreset,
    SegmenterPreset,
    WeakClipPreset,
    WeClipPlusPreset,
    WeClipPreset,
)
from clipes.run.tokens import CachedTokens
from clipes.seg.deeplab import DeepLab, DeepLabSpec
from clipes.seg.deeplab_recipe import DeepLabRecipe
from clipes.seg.frozen import FrozenDecoder, FrozenSpec
from clipes.seg.frozen_recipe import FrozenRecipe
from clipes.seg.loss import Guidance
from clipes.seg.predict import Predictor
from clipes.seg.predict_tokens import TokenPredictor
from clipes.seg.recipes import LabelPredictor, Model, Recipe, Spec, TestSettings
from clipes.seg.weakclip import WeakClip, WeakClipSpec
from clipes.seg.weakclip_predict import WindowPredictor
from clipes.seg.weakclip_recipe import SpeakingTowers, WeakClipRecipe
from clipes.seg.weclip import WeClip, WeClipSpec
from clipes.seg.weclip_labels import Teacher
from clipes.seg.weclip_plus import WeClipPlus, WeClipPlusSpec
from clipes.seg.weclip_plus_recipe import WeClipPlusRecipe
from clipes.seg.weclip_predict import WeClipPredictor
from clipes.seg.weclip_recipe import WeClipRecipe
from clipes.towers.tokens import TokenSource

_SPECS: tuple[type[Spec], ...] = (
    DeepLabSpec,
    FrozenSpec,
    WeakClipSpec,
    WeClipSpec,
    WeClipPlusSpec,
)

SPECS: Mapping[str, type[Spec]] = {spec.kind: spec for spec in _SPECS}
"""What checkpoints say of a model, by the name that they have for its kind."""

OLDEST = DeepLabSpec.kind
"""The kind of checkpoints that name none: clipes 0.1 knew no other."""


def recipe_for(
    preset: AnySegmenterPreset,
    classes: tuple[str, ...],
    guidance: Guidance,
    tokens: CachedTokens | None = None,
    open_teacher: Callable[[], Teacher] | None = None,
    open_towers: Callable[[], SpeakingTowers] | None = None,
) -> Recipe[Any, Any]:
    """Return the recipe of a preset.

    Args:
        preset: Model, rates, views.
        classes: Class names in mask order.
        guidance: How confidence counts.
        tokens: Those that the preset reads, where they are kept.
        open_teacher: Loads CLIP and the words, for presets whose labels they make; a
            ``PlusTeacher`` for WeCLIP+.
        open_towers: Loads CLIP and the words, for presets that match both.
    """
    if isinstance(preset, SegmenterPreset):
        return DeepLabRecipe(preset, classes, guidance)
    if isinstance(preset, FrozenPreset):
        if tokens is None:
            raise ValueError(f"preset {preset.name} reads tokens")
        return FrozenRecipe(preset, classes, guidance, tokens)
    if isinstance(preset, WeakClipPreset):
        if open_towers is None:
            raise ValueError(f"preset {preset.name} reads words")
        return WeakClipRecipe(preset, classes, guidance, open_towers, tokens)
    if not isinstance(preset, WeClipPreset):
        raise TypeError(f"no recipe for preset {preset.name}")
    if open_teacher is None:
        raise ValueError(f"preset {preset.name} makes its labels")
    if isinstance(preset, WeClipPlusPreset):
        return WeClipPlusRecipe(preset, classes, open_teacher)
    return WeClipRecipe(preset, classes, open_teacher)


def predictor_for(
    model: Model, settings: TestSettings, source: TokenSource | None = None
) -> LabelPredictor:
    """Return what asks a model about images.

    Args:
        model: The model, on its device; put into evaluation mode.
        settings: Scales and so on.
        source: The towers that ``model.spec.towers()`` names, if it names some.

    Raises:
        ArtifactError: The model was trained on other towers.
    """
    if isinstance(model, DeepLab):
        return Predictor(model, settings)
    if not isinstance(model, FrozenDecoder | WeakClip | WeClip | WeClipPlus):
        raise TypeError(f"nothing asks {model.spec.name} about images")
    if source is None:
        raise ValueError(f"{model.spec.name} reads tokens")
    if isinstance(model, WeClip | WeClipPlus):
        return WeClipPredictor(model, settings, source)
    if isinstance(model, WeakClip) and model.spec.side:
        return WindowPredictor(model, settings, source)
    return TokenPredictor(model, settings, source)
