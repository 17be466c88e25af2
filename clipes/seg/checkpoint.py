"""Checkpoints: a segmenter, and everything its training needs to go on as if never stopped."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipes.choices import Arch, SegmenterBackbone
from clipes.config import OUTPUT_STRIDES
from clipes.disk.files import atomic_write, list_files
from clipes.disk.records import parse_record
from clipes.errors import ArtifactError, WeightsError
from clipes.seg.deeplab import ModelSpec, Segmenter
from clipes.weights.read import load_plain

FORMAT = "clipes-segmenter-1"

FINAL = "final.pt"
"""File of a finished training: the model without the optimizer."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: The file.
        spec: What the model is built from.
        weights: The model's tensors.
        training: State of the training: ``iteration``, and, unless it is finished,
            ``freeze_norms``, ``optimizer``, ``scaler``.
        test: How to predict unless asked otherwise: ``scales``, ``flip``, ``crf``.
    """

    path: Path
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    training: Mapping[str, Any]
    test: Mapping[str, Any]

    @property
    def iteration(self) -> int:
        """Updates made so far."""
        return int(self.training.get("iteration", 0))

    def build(self) -> Segmenter:
        """Return the model, on the CPU.

        Raises:
            ArtifactError: The tensors are another architecture's.
        """
        model = Segmenter(self.spec)
        fill_model(model, self)
        return model


@dataclass(frozen=True)
class _Test:
    """How to predict unless asked otherwise."""

    scales: list[float]
    flip: bool
    crf: bool


@dataclass(frozen=True)
class _Content:
    """What is stored, beside the format."""

    model: ModelSpec
    weights: dict[str, Any]
    training: dict[str, Any]
    test: _Test


def fill_model(model: Segmenter, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights into a model.

    Raises:
        ArtifactError: The model is of another architecture or has other classes.
    """
    for field in ("arch", "backbone", "output_stride", "classes"):
        theirs, ours = getattr(checkpoint.spec, field), getattr(model.spec, field)
        if theirs != ours:
            raise ArtifactError(
                f"{checkpoint.path} has {field} {_short(theirs)}, not {_short(ours)}",
                "take the checkpoint of this training",
            )
    expected = model.state_dict()
    fits = expected.keys() == checkpoint.weights.keys() and all(
        value.shape == checkpoint.weights[key].shape for key, value in expected.items()
    )
    if not fits:
        raise ArtifactError(
            f"{checkpoint.path}: its tensors are not those of {model.spec.arch} on "
            f"{model.spec.backbone} with {len(model.spec.classes)} classes",
            "the file was changed; take another checkpoint",
        )
    model.load_state_dict(dict(checkpoint.weights))


def save_checkpoint(
    path: Path, model: Segmenter, training: Mapping[str, Any], test: Mapping[str, Any]
) -> None:
    """Write a checkpoint: complete, or not at all.

    Raises:
        ArtifactError: It cannot be written: permissions, no space left.
    """
    content = {
        "format": FORMAT,
        "model": model.spec.to_dict(),
        "weights": model.state_dict(),
        "training": dict(training),
        "test": dict(test),
    }
    # By way of memory: torch turns a full disk into an error without a reason.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; the file is not trusted.

    Raises:
        ArtifactError: There is none, it is damaged, or it is not one of ours.
    """
    if not path.is_file():
        raise ArtifactError(f"there is no checkpoint {path}", "run 'clipes train-seg' first")
    try:
        content = load_plain(path)
    except WeightsError as error:
        raise ArtifactError(error.what, "delete it, or take another checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} is no checkpoint of clipes", "give one that 'clipes train-seg' wrote"
        )
    remedy = "take another checkpoint"
    stored = parse_record(content, _Content, f"{path} is damaged", remedy)
    spec = stored.model
    if (
        spec.arch not in Arch.names()
        or spec.backbone not in SegmenterBackbone.names()
        or spec.output_stride not in OUTPUT_STRIDES
    ):
        raise ArtifactError(
            f"{path} is damaged: there is no {spec.arch} on {spec.backbone} with output stride "
            f"{spec.output_stride}",
            remedy,
        )
    if not stored.test.scales:
        raise ArtifactError(f"{path} is damaged: it has no scales to predict at", remedy)
    return Checkpoint(path, spec, stored.weights, stored.training, asdict(stored.test))


def iteration_path(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is."""
    return folder / f"iteration-{iteration:07d}.pt"


def saved_iterations(folder: Path) -> list[Path]:
    """Return the checkpoints of a training, oldest first."""
    return [p for p in list_files(folder, ".pt") if p.name.startswith("iteration-")]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
