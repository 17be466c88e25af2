"""Checkpoints: a segmenter, and everything its training needs to go on as if never stopped."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipes.disk.files import atomic_write, list_files
from clipes.disk.records import parse_record
from clipes.errors import ArtifactError, WeightsError
from clipes.seg.kinds import OLDEST, SPECS
from clipes.seg.recipes import Model, Spec, TestSettings, other_tower
from clipes.weights.read import load_plain

FORMAT = "clipes-segmenter-1"

FINAL = "final.pt"
"""File of a finished training: the model without the optimizer."""

_REMEDY = "take another checkpoint"
_DAMAGED_REMEDY = (
    "take another checkpoint that 'clipes train-seg' wrote; without this one a stopped training "
    "goes on from the one before, if there is one"
)


@dataclass(frozen=True)
class TrainingState:
    """How far a training is, and what it needs to go on.

    Attributes:
        iteration: Updates made.
        recipe: State of the recipe. This and the rest are absent once training is finished.
        optimizer: State of the optimizer.
        scaler: State of the loss scaler.
        average: Mean of the weights so far, where such a mean is what is trained.
    """

    iteration: int = 0
    recipe: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    average: dict[str, Any] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: The file.
        spec: What the model is built from.
        weights: The model's tensors.
        training: State of the training.
        test: How to predict unless asked otherwise.
    """

    path: Path
    spec: Spec
    weights: Mapping[str, Tensor]
    training: TrainingState
    test: TestSettings

    @property
    def iteration(self) -> int:
        """Updates made so far."""
        return self.training.iteration

    def build(self) -> Model:
        """Return the model, on the CPU.

        Raises:
            ArtifactError: The tensors are another architecture's.
        """
        model = self.spec.build()
        fill_model(model, self)
        return model


@dataclass(frozen=True)
class _Content:
    """What is stored, beside the format and ``model``, the fields of the spec.

    Attributes:
        weights: Tensors by name.
        training: State of the training.
        test: How to predict unless asked otherwise.
        kind: Of ``SPECS``.
        towers: sha256 of the frozen towers' weights that the model goes with, by name.
    """

    weights: dict[str, Any]
    training: TrainingState
    test: TestSettings
    kind: str = OLDEST
    towers: dict[str, str] = field(default_factory=dict)


def fill_model(model: Model, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights into a model.

    Raises:
        ArtifactError: The model is of another architecture or has other classes.
    """
    theirs, ours = _described(checkpoint.spec), _described(model.spec)
    same_kind = checkpoint.spec.kind == model.spec.kind
    for tower, sha256 in model.spec.towers().items() if same_kind else ():
        if (learnt := checkpoint.spec.towers().get(tower, "")) != sha256:
            raise other_tower(checkpoint.path.name, tower, learnt, sha256)
    for name in ours:
        if theirs.get(name) != ours[name]:
            raise ArtifactError(
                f"{checkpoint.path} has {name} {_short(theirs.get(name))}, not "
                f"{_short(ours[name])}",
                "take the checkpoint of this training",
            )
    expected = model.state_dict()
    fits = expected.keys() == checkpoint.weights.keys() and all(
        value.shape == checkpoint.weights[key].shape for key, value in expected.items()
    )
    if not fits:
        raise ArtifactError(
            f"{checkpoint.path}: its tensors are not those of {model.spec.name} with "
            f"{len(model.spec.classes)} classes",
            "the file was changed; take another checkpoint",
        )
    model.load_state_dict(dict(checkpoint.weights))


def save_checkpoint(
    path: Path,
    model: Model,
    training: TrainingState,
    test: TestSettings,
) -> None:
    """Write a checkpoint: complete, or not at all.

    Args:
        path: The file.
        model: The model.
        training: State of the training.
        test: How to predict unless asked otherwise.

    Raises:
        ArtifactError: It cannot be written: permissions, no space left.
    """
    content = {
        "format": FORMAT,
        "kind": model.spec.kind,
        "model": model.spec.to_dict(),
        "towers": dict(model.spec.towers()),
        "weights": model.state_dict(),
        # Not ``asdict``, which copies every tensor.
        "training": {name: part for name, part in vars(training).items() if part is not None},
        "test": {**asdict(test), "scales": list(test.scales)},
    }
    # By way of memory: torch turns a full disk into an error without a reason.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; the file is not trusted.

    Raises:
        ArtifactError: There is none, it is damaged, it is not one of ours, or it is of a kind that
            only a newer clipes knows.
    """
    if not path.is_file():
        raise ArtifactError(f"there is no checkpoint {path}", "run 'clipes train-seg' first")
    try:
        content = load_plain(path)
    except WeightsError as error:
        raise ArtifactError(error.what, _DAMAGED_REMEDY) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} is no checkpoint of clipes", "give one that 'clipes train-seg' wrote"
        )
    kind = content.get("kind", OLDEST)
    if not isinstance(kind, str) or kind not in SPECS:
        raise ArtifactError(
            f"{path} is a segmenter of kind '{_short(kind)}', which this clipes does not know",
            f"update clipes, or take one of kind {', '.join(SPECS)}",
        )
    damaged = f"{path} is damaged"
    spec = parse_record(content.get("model"), SPECS[kind], f"{damaged}: its model", _REMEDY)
    stored = parse_record(_as_written_now(content), _Content, damaged, _REMEDY)
    problem = spec.problem() or ("" if stored.test.scales else "it has no scales to predict at")
    if problem or stored.towers != spec.towers():
        raise ArtifactError(f"{damaged}: {problem or 'it names two sets of towers'}", _REMEDY)
    for name, value in stored.weights.items():
        if not _is_finite(value):
            raise ArtifactError(f"{damaged}: {name} is no tensor of finite numbers", _REMEDY)
    return Checkpoint(path, spec, stored.weights, stored.training, stored.test)


def iteration_path(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is."""
    return folder / f"iteration-{iteration:07d}.pt"


def saved_iterations(folder: Path) -> list[Path]:
    """Return the checkpoints of a training, oldest first."""
    return [p for p in list_files(folder, ".pt") if p.name.startswith("iteration-")]


def _as_written_now(content: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of clipes 0.1 as one of today; others as they are."""
    training = content.get("training")
    if "kind" in content or not isinstance(training, dict) or "freeze_norms" not in training:
        return content
    rest = {name: value for name, value in training.items() if name != "freeze_norms"}
    state = {"freeze_norms": training["freeze_norms"]}
    return {**content, "training": {**rest, "recipe": state}}


def _is_finite(value: object) -> bool:
    """Tell whether a value is a tensor of numbers as they are kept here, all finite."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    return bool(torch.isfinite(value).all())


def _described(spec: Spec) -> dict[str, Any]:
    """Return all that tells one model from another, by name."""
    return {"kind": spec.kind, **vars(spec)}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
