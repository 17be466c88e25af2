"""Where a backbone's weights come from: torchvision, a file, or nowhere."""

from __future__ import annotations

import contextlib
import io
import urllib.error
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipes.errors import WeightsError
from clipes.seg.backbones import Features
from clipes.weights.read import load_plain

_REMEDY = "give a state dict with torchvision's names for this backbone, or another --backbone"
_UNUSED = ("fc.", "classifier.", "aux_classifier.")
_PUBLISHED = "IMAGENET1K_V1"  # the weights of the papers' time; V2 are of another recipe


def load_backbone(backbone: Features, name: str, source: str, *, say: Callable[[str], None]) -> str:
    """Put pre-trained weights into a backbone.

    Args:
        backbone: The module.
        name: Its name.
        source: ``auto`` (torchvision's ImageNet weights, or none where they cannot be reached),
            ``none``, or the path of a state dict.
        say: Told where the weights come from.

    Returns:
        In a word or two, where they come from.

    Raises:
        WeightsError: The file cannot be used for this backbone.
    """
    if source == "none":
        say(f"backbone: {name} from random weights, as asked for")
        return "none"
    if source != "auto":
        fill(backbone, read_tensors(Path(source)), source)
        say(f"backbone: {name} from {source}")
        return Path(source).name
    state = _from_torchvision(name, say)
    if state is None:
        return "none"
    fill(backbone, state, "torchvision's weights")
    say(f"backbone: {name} from torchvision's {_PUBLISHED}")
    return f"torchvision {_PUBLISHED}"


def fill(backbone: Features, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict; the classifier's tensors and those of other models' heads are left out.

    Raises:
        WeightsError: Names or shapes are another backbone's, or a number is not finite.
    """
    prefix = "backbone."  # of torchvision's segmentation models
    if any(key.startswith(prefix) for key in state):
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    state = {key: value for key, value in state.items() if not key.startswith(_UNUSED)}
    expected = backbone.state_dict()
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = sorted(expected.keys() - state.keys() - counters)
    foreign = sorted(state.keys() - expected.keys())
    if missing or foreign:
        example = f"no {missing[0]}" if missing else f"{foreign[0]} too many"
        raise WeightsError(
            f"{source} is of another architecture ({len(missing)} tensors missing, "
            f"{len(foreign)} too many: {example})",
            _REMEDY,
        )
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise WeightsError(
                f"{source}: {key} is {tuple(value.shape)}, not {tuple(expected[key].shape)}",
                _REMEDY,
            )
        if not bool(torch.isfinite(value).all()):
            raise WeightsError(f"{source}: {key} holds numbers that are not finite")
    backbone.load_state_dict(dict(state), strict=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` file or of one that torch.save wrote.

    Raises:
        WeightsError: There is no such file, or it holds something else.
    """
    if not path.is_file():
        raise WeightsError(f"there is no file {path}", "check the path of the weights")
    content: Any
    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_plain(path)
    except SafetensorError as error:
        raise WeightsError(f"{path} is no safetensors file: {error}", _REMEDY) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds no state dict", _REMEDY)
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor) and isinstance(k, str)}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors", _REMEDY)
    return tensors


def _from_torchvision(name: str, say: Callable[[str], None]) -> dict[str, Tensor] | None:
    remedy = "give a state dict with --backbone-weights FILE"
    if name.endswith("_v1"):
        say(f"backbone: torchvision has no weights for {name}; training from scratch; {remedy}")
        return None
    try:
        weights = torchvision.models.get_model_weights(name)[_PUBLISHED]
        # Its remarks are of no use to those who read this one's output.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        say(
            f"backbone: no ImageNet weights for {name} ({reason}); training from scratch, which "
            f"learns little from few images; {remedy}"
        )
        return None
    return state
