"""Training: SGD on random views, exact over restarts, processes and accumulated parts.

One update depends on the seed, the iteration and the weights before it, on nothing else: examples
are drawn by position (``clipes.seg.data``), chance inside the model is seeded per iteration, and
the loss is divided by the weight of the whole batch, wherever its parts are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipes.config import SegmenterPreset
from clipes.errors import ArtifactError, ClipesError, UsageError
from clipes.seg.checkpoint import (
    FINAL,
    Checkpoint,
    fill_model,
    iteration_path,
    save_checkpoint,
    saved_iterations,
)
from clipes.seg.data import Item, TrainingSet, batches
from clipes.seg.deeplab import MultiScale, Segmenter, freeze_norms
from clipes.seg.loss import branch_targets, confident_labels, weighted_loss
from clipes.seg.parallel import Processes
from clipes.types import IGNORE


class TrainingError(ClipesError):
    """The training cannot go on."""


@dataclass(frozen=True)
class TrainOptions:
    """What a training does beside the preset.

    Attributes:
        seed: Chooses first weights, order, views.
        threshold: mu of the confidence-guided loss; None trains on every labelled pixel.
        loss: ``ce``, or ``soft``: each pixel counts by its confidence.
        amp: ``none``, ``bf16`` or ``fp16``.
        save_every: Iterations between checkpoints.
        keep: Checkpoints kept, the latest.
        workers: Loader processes.
    """

    seed: int = 0
    threshold: float | None = 0.95
    loss: str = "ce"
    amp: str = "none"
    save_every: int = 500
    keep: int = 2
    workers: int = 0


@dataclass(frozen=True)
class Step:
    """One update, as seen from outside.

    Attributes:
        iteration: Updates made, this one included.
        total: Updates to make.
        loss: Sum of the branches' mean losses before the update.
        lr: The backbone's learning rate.
        kept: Share of the batch's labelled pixels that were trained on.
        images: (N, 3, H, W) last views, normalised.
        labels: (N, H, W) what they were trained on.
        logits: (N, L, h, w) of the first branch.
    """

    iteration: int
    total: int
    loss: float
    lr: float
    kept: float
    images: Tensor
    labels: Tensor
    logits: Tensor


class Trainer:
    """Trains one segmenter.

    Args:
        model: The segmenter, on the processes' device.
        preset: Recipe.
        options: The rest.
        processes: Who trains together.

    Raises:
        UsageError: The batch cannot be divided, or the precision is not available.
    """

    def __init__(
        self,
        model: Segmenter,
        preset: SegmenterPreset,
        options: TrainOptions,
        processes: Processes,
    ) -> None:
        self._model = model
        self._preset = preset
        self._options = options
        self._processes = processes
        self._part = part_size(preset, processes.count)
        self.iteration = 0
        model.train()
        if preset.freeze_norms:
            freeze_norms(model.backbone)
        self._branches = MultiScale(model, preset.train_scales)
        self._optimizer = torch.optim.SGD(
            parameter_groups(model, preset), lr=preset.lr, momentum=preset.momentum
        )
        self._scaler = torch.amp.GradScaler(
            processes.device.type, enabled=options.amp == "fp16" and processes.device.type == "cuda"
        )
        self._parallel: nn.Module = self._branches
        if processes.count > 1:
            if processes.device.type == "cuda":
                free = model.head if preset.freeze_norms else model
                nn.SyncBatchNorm.convert_sync_batchnorm(free)
            self._parallel = DistributedDataParallel(self._branches)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            ArtifactError: It is of another model, or of a finished training.
        """
        fill_model(self._model, checkpoint)
        try:
            self._optimizer.load_state_dict(checkpoint.training["optimizer"])
            self._scaler.load_state_dict(checkpoint.training["scaler"])
            self.iteration = checkpoint.iteration
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError(
                f"{checkpoint.path} does not hold the state of this training ({error})",
                "delete it, or train in another folder",
            ) from error

    def run(self, data: TrainingSet, folder: Path, on_step: Callable[[Step], None]) -> None:
        """Train to the end, leaving checkpoints in ``folder``.

        Args:
            data: Where the views come from.
            folder: For the checkpoints.
            on_step: Called after each update, in each process.

        Raises:
            TrainingError: The loss or the weights are not finite; checkpoints stay as they are.
            ArtifactError: An example or a checkpoint is bad, or cannot be written.
        """
        stream = self._stream(data)
        while self.iteration < self._preset.iterations:
            step = self.step([next(stream) for _ in range(self._preset.accumulate)])
            on_step(step)
            if self.iteration % self._options.save_every == 0:
                self._save(iteration_path(folder, self.iteration))
        self._save(folder / FINAL)

    def step(self, parts: list[Item]) -> Step:
        """Make one update.

        Args:
            parts: This process' share of the batch, to be accumulated.

        Raises:
            TrainingError: The loss is not finite; the weights stay as they were.
        """
        device, options = self._processes.device, self._options
        parts = [_to(device, part) for part in parts]
        lr = self._set_rates()
        torch.manual_seed(_mix(options.seed, self.iteration, self._processes.rank))
        sizes = self._branches.logit_sizes((self._preset.crop, self._preset.crop))
        labelled = [(labels, *self._weigh(labels, sure)) for _, labels, sure in parts]
        targets = [branch_targets(cut, weights, sizes) for _, cut, weights in labelled]
        totals = self._processes.total(
            torch.stack(
                [
                    torch.stack([part[branch][1].sum() for part in targets]).sum()
                    for branch in range(len(sizes))
                ]
            )
        ).clamp(min=torch.finfo(torch.float32).tiny)
        self._optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        first_logits = torch.empty(0)
        for index, ((images, _, _), target) in enumerate(zip(parts, targets, strict=True)):
            with self._sync(index == len(parts) - 1), self._autocast():
                logits = self._parallel(images)
                share = sum(
                    (
                        weighted_loss(one, labels, weights) / total
                        for one, (labels, weights), total in zip(
                            logits, target, totals, strict=True
                        )
                    ),
                    start=torch.zeros((), device=device),
                )
                # Processes' gradients are averaged, but the loss is a sum over them.
                self._scaler.scale(share * self._processes.count).backward()
            loss += share.detach()
            first_logits = logits[0].detach()
        value = float(self._processes.total(loss))
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at iteration {self.iteration + 1}",
                "earlier checkpoints are kept; try a lower --lr, or --amp none",
            )
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.iteration += 1
        given = sum(int((labels != IGNORE).sum()) for labels, _, _ in labelled)
        used = sum(int((cut != IGNORE).sum()) for _, cut, _ in labelled)
        return Step(
            self.iteration,
            self._preset.iterations,
            value,
            lr,
            used / max(given, 1),
            parts[-1][0],
            labelled[-1][1],
            first_logits,
        )

    def _weigh(self, labels: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
        if self._options.threshold is not None:
            labels = confident_labels(labels, confidence, self._options.threshold)
        soft = self._options.loss == "soft"
        return labels, confidence if soft else torch.ones_like(confidence)

    def _set_rates(self) -> float:
        left = 1 - self.iteration / self._preset.iterations
        lr = self._preset.lr * math.pow(left, self._preset.power)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        return lr

    def _stream(self, data: TrainingSet) -> Iterator[Item]:
        """Yield this process' parts of the batches still to come."""
        part, count, rank = self._part, self._processes.count, self._processes.rank
        pieces = range(
            self.iteration * self._preset.accumulate,
            self._preset.iterations * self._preset.accumulate,
        )
        starts = [(piece * count + rank) * part for piece in pieces]
        positions = [range(start, start + part) for start in starts]
        pin = self._processes.device.type == "cuda"
        return batches(data, positions, self._options.workers, pin=pin)

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        if isinstance(self._parallel, DistributedDataParallel) and not last:
            return self._parallel.no_sync()
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        kind = kinds.get(self._options.amp)
        return torch.autocast(
            self._processes.device.type, dtype=kind or torch.bfloat16, enabled=kind is not None
        )

    def _save(self, path: Path) -> None:
        if self._processes.first:
            self._check_weights(path)
            save_checkpoint(path, self._model, self._state(path), self._test())
            folder = path.parent
            kept = 0 if path.name == FINAL else self._options.keep
            for old in saved_iterations(folder)[: -kept or None]:
                old.unlink()
        self._processes.wait()

    def _check_weights(self, path: Path) -> None:
        for name, tensor in self._model.state_dict().items():
            if not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"{name} is not finite after iteration {self.iteration}; {path.name} was not "
                    "written",
                    "earlier checkpoints are kept; try a lower --lr, or --amp none",
                )

    def _state(self, path: Path) -> Mapping[str, Any]:
        if path.name == FINAL:
            return {"iteration": self.iteration}
        return {
            "iteration": self.iteration,
            "freeze_norms": self._preset.freeze_norms,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def _test(self) -> Mapping[str, Any]:
        preset = self._preset
        return {"scales": list(preset.test_scales), "flip": preset.flip, "crf": preset.crf}


def parameter_groups(model: Segmenter, preset: SegmenterPreset) -> list[dict[str, Any]]:
    """Return SGD's three groups: backbone, the head's weights, the head's biases.

    As in DeepLab's Caffe recipe, biases learn twice as fast as weights and do not decay.
    """
    head = list(model.head.named_parameters())
    weights = [parameter for name, parameter in head if not name.endswith("bias")]
    biases = [parameter for name, parameter in head if name.endswith("bias")]
    trained = [parameter for parameter in model.backbone.parameters() if parameter.requires_grad]
    decay = preset.weight_decay
    return [
        {"params": trained, "factor": 1.0, "weight_decay": decay},
        {"params": weights, "factor": preset.head_lr, "weight_decay": decay},
        {"params": biases, "factor": 2 * preset.head_lr, "weight_decay": 0.0},
    ]


def part_size(preset: SegmenterPreset, processes: int) -> int:
    """Return how many images a process takes at a time.

    Raises:
        UsageError: The batch cannot be divided so.
    """
    part, rest = divmod(preset.batch, preset.accumulate * processes)
    if rest or not part:
        raise UsageError(
            f"a batch of {preset.batch} cannot be divided into {preset.accumulate} parts on "
            f"{processes} processes",
            "choose --batch and --accumulate that divide",
        )
    if part == 1 and preset.arch != "deeplabv2":
        raise UsageError(
            f"{preset.arch} normalises over a batch and cannot learn from one image at a time",
            "use a larger --batch, or --arch deeplabv2",
        )
    return part


def choose_precision(name: str, device: torch.device) -> str:
    """Return ``none``, ``bf16`` or ``fp16`` for what was asked for.

    Raises:
        UsageError: The device cannot do that.
    """
    cuda = device.type == "cuda"
    if name == "auto":
        if not cuda:
            return "none"
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if name == "fp16" and not cuda:
        raise UsageError("--amp fp16 needs a CUDA device", "use --amp bf16 or none")
    return name


def _to(device: torch.device, item: Item) -> Item:
    images, labels, confidence = (tensor.to(device, non_blocking=True) for tensor in item)
    return images, labels, confidence


def _mix(*numbers: int) -> int:
    """Return one seed made of several."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number) % 2**63
    return mixed
