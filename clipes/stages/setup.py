"""What the stages that need CLIP start from, beside data: weights and text features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor

from clipes.choices import Precision
from clipes.device import choose_device
from clipes.errors import UnknownClassError, WeightsError
from clipes.listener import Listener
from clipes.processes import local_rank
from clipes.stages.cam import ClipRequest
from clipes.standin.fit import Fitted
from clipes.towers.clip import Backbone
from clipes.towers.dinov2 import DinoTower
from clipes.towers.load import load_dinov2, load_visual
from clipes.towers.side_by_side import DINO, TokenTower, Towers
from clipes.weights import (
    DEFAULT_MODEL,
    DINOV2,
    Weights,
    cache_dir,
    normalise_dinov2,
    read_state_dict,
    resolve,
)
from clipes.words.encode import text_features as resolve_text
from clipes.words.features import TextFeatures
from clipes.words.templates import choose_templates
from clipes.words.vocabulary import Vocabulary


@dataclass(frozen=True)
class Clip:
    """CLIP, ready for a run.

    Attributes:
        towers: The image tower, and those that look at images beside it.
        text: Vectors of the classes, in mask order, and of the background words.
        weights: Where the image tower comes from.
        fitted: Number of images of each class whose vector was fitted to the run.
    """

    towers: Towers
    text: TextFeatures
    weights: Weights
    fitted: Mapping[str, int] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone:
        """The image tower."""
        return self.towers.clip


FitWords: TypeAlias = Callable[[Backbone, Weights], Fitted]
"""Makes vectors of a run's classes, for an image tower, where some have none."""


@dataclass(frozen=True)
class OpenedWeights:
    """Weights in memory, before towers are made of them.

    Attributes:
        weights: Where they come from.
        state: Their tensors.
        device: Where towers are to run.
    """

    weights: Weights
    state: Mapping[str, Tensor]
    device: torch.device

    @property
    def logit_scale(self) -> float:
        """Factor on cosine similarities before the softmax."""
        return float(self.state["logit_scale"].exp())

    def visual(self) -> VisionTransformer:
        """Make the image tower, on its device."""
        recipe = self.weights.recipe
        visual = load_visual(self.state, quick_gelu=recipe.quick_gelu, head_width=recipe.head_width)
        return visual.to(self.device)

    def backbone(self, *, fp16_positions: bool, precision: Precision = Precision.fp32) -> Backbone:
        """Make the image tower ready for maps; see ``CamParams`` for ``fp16_positions``."""
        recipe = self.weights.recipe
        return Backbone(
            self.visual(),
            logit_scale=self.logit_scale,
            mean=recipe.mean,
            std=recipe.std,
            fp16_positions=fp16_positions,
            precision=precision,
        )


def open_weights(source: str, model: str, device: str, listener: Listener) -> OpenedWeights:
    """Get weights and read them.

    Args:
        source: ``--weights``.
        model: ``--model``.
        device: ``auto`` or a torch device.
        listener: Told what is used, and why.
    """
    if model == DINOV2:
        raise WeightsError(
            f"{model} knows no words: it is no CLIP", "name a CLIP with --model, or leave it out"
        )
    chosen = choose_device(device, local_rank())
    with listener.progress("weights", show_count=False) as bar:
        weights = resolve(source, model, say=listener.say, progress=bar)
    state = read_state_dict(weights.path)
    _check_model(weights, state)
    return OpenedWeights(weights, state, chosen)


def _check_model(weights: Weights, state: Mapping[str, Tensor]) -> None:
    """Refuse a model that was named for a file that holds another one."""
    if weights.model == DEFAULT_MODEL:  # nobody had to name it
        return
    vision = open_clip.get_model_config(weights.model)["vision_cfg"]
    named = vision["width"], vision["patch_size"]
    width, _, patch, _ = state["visual.conv1.weight"].shape
    if named != (width, patch):
        raise WeightsError(
            f"{weights.path} is no {weights.model}: its image tower has width {width} and patches "
            f"of {patch} pixels, not {named[0]} and {named[1]}",
            "leave --model out, or give the weights of that model",
        )


def that_tags(clip: Clip, vocabulary: Vocabulary) -> Clip:
    """Return CLIP without a vocabulary's further background words, which are for maps alone.

    Also where a file of text features has them: wherever vectors are from, tags are the same.
    What they take from classes tags lack: F1 of coco_sample 64.0 with them, 65.9 without.
    """
    return replace(clip, text=clip.text.without_words(vocabulary.more_background))


def load_clip(
    asked: ClipRequest,
    vocabulary: Vocabulary,
    listener: Listener,
    *,
    fp16_positions: bool = False,
    others: Sequence[str] = (),
    fit: FitWords | None = None,
    wide: bool = False,
) -> Clip:
    """Get weights and text features, and put the towers on their device.

    Args:
        asked: What is asked for.
        vocabulary: The words.
        listener: Told what is used, and why.
        fp16_positions: See ``CamParams``.
        others: Names of the towers that are needed beside CLIP.
        fit: What is asked for vectors where the shipped ones do not know a class; None to stop.
        wide: As for ``clipes.words.encode.text_features``.

    Raises:
        UnknownClassError: A class has no vector, and nothing can or may fit one.
    """
    opened = open_weights(asked.weights, asked.model, asked.device, listener)
    weights, say = opened.weights, listener.say
    templates = choose_templates(asked.template, vocabulary, weights.sha256, asked.rankings, say)
    precision = Precision(asked.precision)
    backbone = opened.backbone(fp16_positions=fp16_positions, precision=precision)
    fitted: Mapping[str, int] = {}
    try:
        text = resolve_text(
            vocabulary,
            opened.state,
            weights,
            file=asked.text_features,
            cache=cache_dir(),
            say=say,
            fusion=asked.fusion,
            templates=templates,
            descriptions=asked.descriptions,
            progress=listener.progress,
            wide=wide,
        )
    except UnknownClassError:
        if fit is None or asked.text_features is not None:
            raise
        made = fit(backbone, weights)
        text, fitted = made.text, made.images
    return Clip(Towers(backbone, load_others(others, asked, listener)), text, weights, fitted)


def load_others(
    names: Sequence[str], asked: ClipRequest, listener: Listener
) -> dict[str, TokenTower]:
    """Put the towers that a preset needs beside CLIP on their device; arguments as ``load_clip``.

    Returns:
        The towers by their names.
    """
    precision = Precision(asked.precision)
    if unknown := set(names) - {DINO}:
        raise ValueError(f"nothing loads a tower called {', '.join(sorted(unknown))}")
    without = "or take --preset clip, which does with CLIP alone"
    return {
        name: load_dino(asked.dino, asked.device, listener, precision, otherwise=without)
        for name in names
    }


def load_dino(
    weights: str,
    device: str,
    listener: Listener,
    precision: Precision = Precision.fp32,
    *,
    otherwise: str = "",
) -> DinoTower:
    """Get DINOv2's weights, and put the tower on its device.

    Args:
        weights: ``auto``, ``official``, ``registry`` or a file.
        device: ``auto`` or a torch device.
        listener: Told what is used, and why.
        precision: Of the tower's linear layers.
        otherwise: What there is for those who cannot have it; to be said then.

    Raises:
        WeightsError: It cannot be had, or is no such tower.
    """
    chosen = choose_device(device, local_rank())
    try:
        with listener.progress("DINOv2", show_count=False) as bar:
            found = resolve(weights, DINOV2, say=listener.say, progress=bar)
        module = load_dinov2(read_state_dict(found.path, normalise_dinov2)).to(chosen)
    except WeightsError as error:
        remedy = "; ".join(filter(None, (error.remedy, otherwise)))
        raise WeightsError(error.what, remedy) from error
    recipe = found.recipe
    return DinoTower(module, found.sha256, recipe.mean, recipe.std, precision=precision)
