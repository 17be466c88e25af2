"""Weight files of every supported format to tensors in the layout of a tower."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clipes.disk import files
from clipes.errors import WeightsError
from clipes.weights.layout import normalise
from clipes.weights.torchscript import MALFORMED, is_torchscript, read_torchscript

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".onnx")
LARGEST_GRAPH = 1 << 30
"""Most bytes of an ONNX file that is read: several times what the towers take."""

Layout: TypeAlias = Callable[[Mapping[str, torch.Tensor], str], dict[str, torch.Tensor]]
"""Brings a file's tensors under a tower's names and checks them; see ``normalise``."""


def read_state_dict(path: Path, layout: Layout = normalise) -> dict[str, torch.Tensor]:
    """Return the tensors of a tower in fp32.

    Args:
        path: ``.safetensors``; a ``.pt``, ``.pth``, ``.bin`` with a state dict, a training
            checkpoint of open_clip, or OpenAI's TorchScript archive; or an ``.onnx`` export. Files
            are not trusted: code in them is never run.
        layout: Of the tower that it should hold: CLIP's, or ``normalise_dinov2``.

    Returns:
        For CLIP ``visual.*`` and ``logit_scale`` (natural logarithm) under OpenAI's names, and the
        text tower's tensors (``token_embedding.weight`` and so on) if the file has one. The number
        of heads is not part of a state dict; see ``Recipe.head_width``. For DINOv2 see
        ``normalise_dinov2``.

    Raises:
        WeightsError: There is no such file, it is damaged or holds code, it is not such a tower
            with a plain ViT, or it holds numbers that are not finite.
    """
    state = {key: tensor.float() for key, tensor in load_tensors(path, layout).items()}
    for key, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                f"{path}: {key} holds numbers that are not finite",
                "the file is damaged or the training diverged; take another",
            )
    return state


def load_tensors(path: Path, layout: Layout = normalise) -> dict[str, torch.Tensor]:
    """Return the same as ``read_state_dict`` in the types the file stores, values unchecked."""
    if not path.is_file():
        raise WeightsError(f"there is no file {path}", "check the path given as weights")
    try:
        _refuse_text(path)
        return layout(_load(path), str(path))
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a usable safetensors file: {error}", _REMEDY) from error
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error


def _load(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file under the names it has for them."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".onnx":
        return _load_graph(path)
    return read_torchscript(path) if is_torchscript(path) else _load_pickle(path)


def _load_graph(path: Path) -> dict[str, torch.Tensor]:
    # Not at the top: hardly anybody who has weights already needs the ONNX reader.
    from clipes.weights.graph import read_graph

    if path.stat().st_size > LARGEST_GRAPH:
        raise WeightsError(f"{path} has more than {LARGEST_GRAPH} bytes", _REMEDY)
    return read_graph(path.read_bytes(), str(path))


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits.

    Raises:
        WeightsError: The file cannot be read.
    """
    try:
        return files.sha256_of(path)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error


_REMEDY = "the file is damaged or of another kind; fetch it again from its original source"


def _refuse_text(path: Path) -> None:
    """Name the two text files that pass for weights most often."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            f"{path} is a web page, not weights", "download the file itself, not its page"
        )
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a Git LFS pointer, not weights", "run git lfs pull in its repository"
        )


def load_plain(path: Path, holding: str = "tensors and plain data") -> Any:  # noqa: ANN401
    """Return what torch.save wrote, if it is tensors and plain data; code is never run.

    Args:
        path: The file.
        holding: What it should hold, for the message.

    Raises:
        WeightsError: It is damaged or holds something else.
    """
    try:
        with warnings.catch_warnings():
            # About old formats and pickle protocols: what matters is the content.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message goes on with how to switch the check off: not advice to pass on.
        raise WeightsError(
            f"{path} holds something other than {holding} (damage, or code that loading would run)",
            "convert it to safetensors where it comes from, or take another file",
        ) from error
    except (*MALFORMED, OSError) as error:
        raise WeightsError(f"cannot read {path}: {_first(error)}", _REMEDY) from error


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file that torch.save wrote."""
    content = load_plain(path, "tensors")
    # open_clip's and others' training checkpoints keep the weights one level down.
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict", _REMEDY)
    return {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }


def _first(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
