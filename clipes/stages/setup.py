"""What the stages that need CLIP start from: data set, vocabulary, weights, text features."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from clipes.clip.backbone import Backbone
from clipes.clip.load import load_visual
from clipes.datasets import Dataset, open_dataset
from clipes.errors import UsageError
from clipes.stages.features import text_features as resolve_text
from clipes.text_features import TextFeatures
from clipes.types import Progress
from clipes.vocabulary import Vocabulary, load_vocabulary
from clipes.weights import Weights, cache_dir, read_state_dict, resolve


@dataclass(frozen=True)
class Clip:
    """CLIP, ready for a run.

    Attributes:
        backbone: The image tower.
        text: Vectors of the classes, in mask order, and of the background words.
        weights: Where the image tower comes from.
    """

    backbone: Backbone
    text: TextFeatures
    weights: Weights


def open_labelled(
    kind: str,
    *,
    root: Path | None,
    split: str | None,
    labels: Path | None,
    prompts: str | None,
) -> tuple[Vocabulary, Dataset]:
    """Open a data set and the vocabulary of its classes.

    The classes of a folder are its own unless ``prompts`` name them; the background words are VOC's
    unless ``prompts`` say more.
    """
    vocabulary = load_vocabulary(prompts or "voc")
    classes = vocabulary.classes if prompts or kind != "folder" else None
    data = open_dataset(kind, root=root, split=split, labels=labels, classes=classes)
    return vocabulary if classes else vocabulary.with_classes(data.classes), data


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
    """
    place = _device(device)
    with progress("weights", show_count=False) as bar:
        weights = resolve(source, model, say=say, progress=bar)
    state = read_state_dict(weights.path)
    text = resolve_text(vocabulary, state, weights, file=text_features, cache=cache_dir(), say=say)
    recipe = weights.recipe
    visual = load_visual(state, quick_gelu=recipe.quick_gelu, head_width=recipe.head_width)
    backbone = Backbone(
        visual.to(place),
        logit_scale=float(state["logit_scale"].exp()),
        mean=recipe.mean,
        std=recipe.std,
        fp16_positions=fp16_positions,
    )
    return Clip(backbone, text, weights)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device '{name}'", "use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device '{name}': no CUDA device here", "use --device cpu")
    return device
