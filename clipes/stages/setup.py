"""What the stages that need CLIP start from, beside data: weights and text features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor

from clipes.choices import Fusion, Precision
from clipes.device import choose_device
from clipes.errors import WeightsError
from clipes.processes import local_rank
from clipes.towers.clip import Backbone
from clipes.towers.dinov2 import DinoTower
from clipes.towers.load import load_dinov2, load_visual
from clipes.towers.side_by_side import TokenTower, Towers
from clipes.types import Progress
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
    """

    towers: Towers
    text: TextFeatures
    weights: Weights

    @property
    def backbone(self) -> Backbone:
        """The image tower."""
        return self.towers.clip


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


def open_weights(
    source: str,
    model: str,
    *,
    device: str,
    say: Callable[[str], None],
    progress: Callable[..., AbstractContextManager[Progress]],
) -> OpenedWeights:
    """Get weights and read them; arguments as for ``load_clip``."""
    if model == DINOV2:
        raise WeightsError(
            f"{model} knows no words: it is no CLIP", "name a CLIP with --model, or leave it out"
        )
    chosen = choose_device(device, local_rank())
    with progress("weights", show_count=False) as bar:
        weights = resolve(source, model, say=say, progress=bar)
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


def load_clip(
    source: str,
    model: str,
    vocabulary: Vocabulary,
    *,
    text_features: Path | None,
    fp16_positions: bool,
    device: str,
    say: Callable[[str], None],
    progress: Callable[..., AbstractContextManager[Progress]],
    fusion: Fusion = Fusion.sentence,
    template: str | None = None,
    rankings: Sequence[Path] = (),
    precision: Precision = Precision.fp32,
    others: Sequence[str] = (),
    dino: str = "auto",
) -> Clip:
    """Get weights and text features, and put the image tower on its device.

    Args:
        source: ``--weights``.
        model: ``--model``.
        vocabulary: The words.
        text_features: A user's vectors, or None.
        fp16_positions: See ``CamParams``.
        device: ``auto`` or a torch device.
        say: Told what is used, and why.
        progress: Opens a progress bar.
        fusion: Where synonyms become one.
        template: ``--template``: what takes the place of the vocabulary's template.
        rankings: Run folders in which a ranking may tell the best template.
        precision: Of the towers' linear layers.
        others: Names of the towers that are needed beside CLIP.
        dino: ``--dino``: where DINOv2's weights come from.
    """
    opened = open_weights(source, model, device=device, say=say, progress=progress)
    weights = opened.weights
    text = resolve_text(
        vocabulary,
        opened.state,
        weights,
        file=text_features,
        cache=cache_dir(),
        say=say,
        fusion=fusion,
        templates=choose_templates(template, vocabulary, weights.sha256, rankings, say),
    )
    backbone = opened.backbone(fp16_positions=fp16_positions, precision=precision)
    beside = load_others(
        others, dino, device=device, say=say, progress=progress, precision=precision
    )
    return Clip(Towers(backbone, beside), text, weights)


def load_others(
    names: Sequence[str],
    dino: str,
    *,
    device: str,
    say: Callable[[str], None],
    progress: Callable[..., AbstractContextManager[Progress]],
    precision: Precision = Precision.fp32,
) -> dict[str, TokenTower]:
    """Put the towers that a preset needs beside CLIP on their device; arguments as ``load_clip``.

    Returns:
        The towers by their names.
    """
    try:
        return {
            name: load_dino(dino, device=device, say=say, progress=progress, precision=precision)
            for name in names
        }
    except WeightsError as error:
        remedy = f"{error.remedy}; or take --preset clip, which does with CLIP alone"
        raise WeightsError(error.what, remedy) from error


def load_dino(
    weights: str,
    *,
    device: str,
    say: Callable[[str], None],
    progress: Callable[..., AbstractContextManager[Progress]],
    precision: Precision = Precision.fp32,
) -> DinoTower:
    """Get DINOv2's weights, and put the tower on its device.

    Args:
        weights: ``auto``, ``official``, ``registry`` or a file.
        device: ``auto`` or a torch device.
        say: Told what is used, and why.
        progress: Opens a progress bar.
        precision: Of the tower's linear layers.
    """
    chosen = choose_device(device, local_rank())
    with progress("DINOv2", show_count=False) as bar:
        found = resolve(weights, DINOV2, say=say, progress=bar)
    module = load_dinov2(read_state_dict(found.path, normalise_dinov2)).to(chosen)
    recipe = found.recipe
    return DinoTower(module, found.sha256, recipe.mean, recipe.std, precision=precision)
