"""Training by a recipe, exact over restarts, processes and accumulated parts.

One update depends on the seed, the iteration and the weights before it, on nothing else: examples
are drawn by position (``clipes.seg.data``), chance inside the model is seeded per iteration, and
the loss is divided by the weight of the whole batch, wherever its parts are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipes.choices import Amp
from clipes.device import memory_for
from clipes.errors import ArtifactError, ClipesError, UsageError
from clipes.kernels.choose import multiplies_bf16, processor_features
from clipes.seg.checkpoint import (
    FINAL,
    Checkpoint,
    TrainingState,
    fill_model,
    iteration_path,
    save_checkpoint,
    saved_iterations,
)
from clipes.seg.data import batches
from clipes.seg.parallel import Processes
from clipes.seg.recipes import Batch, Examples, Model, Part, Recipe
from clipes.types import UInt8Array

LONGEST_UNSAVED = 500
"""Updates that are lost at most if a training is killed, unless others are asked for."""

_GPU_WORKERS = 4  # threads


class TrainingError(ClipesError):
    """The training cannot go on."""


@dataclass(frozen=True)
class TrainOptions:
    """What a training does beside the recipe.

    Attributes:
        seed: Chooses first weights, order, views.
        amp: Of ``clipes.choices.Amp``.
        save_every: Iterations between checkpoints; None for ten in a training, and one every
            ``LONGEST_UNSAVED`` at least.
        keep: Checkpoints kept, the latest.
        workers: Threads that load ahead; None for what suits the device.
    """

    seed: int = 0
    amp: str = Amp.none.value
    save_every: int | None = None
    keep: int = 2
    workers: int | None = None

    def on(self, device: torch.device, *, rounded: bool = False) -> TrainOptions:
        """Return the options as they suit a device.

        Args:
            device: Where the network runs.
            rounded: Whether ``auto`` is bf16 on processors that multiply it.

        Raises:
            UsageError: The device has no such precision.
        """
        workers = self.workers
        if workers is None:
            workers = _GPU_WORKERS if device.type == "cuda" else 0
        amp = choose_precision(self.amp, device, rounded=rounded)
        return replace(self, amp=amp, workers=workers)


@dataclass(frozen=True)
class Step:
    """One update, as seen from outside.

    Attributes:
        iteration: Updates made, this one included.
        total: Updates to make.
        loss: Sum of the terms' weighted means before the update.
        lr: The learning rate.
        kept: Share of the batch's labelled pixels that were trained on.
        picture: Draws what was learnt from last, and the answer: (H, W, 3) RGB.
        answers: Tells labels and answer of each of these images; see ``Recipe.answers``.
    """

    iteration: int
    total: int
    loss: float
    lr: float
    kept: float
    picture: Callable[[], UInt8Array]
    answers: Callable[[], list[tuple[Tensor, Tensor]]]


class Trainer:
    """Trains one model.

    Args:
        model: The model, on the processes' device.
        recipe: How it is trained.
        options: The rest.
        processes: Who trains together.

    Raises:
        UsageError: The batch cannot be divided, or the precision is not available.
    """

    def __init__(
        self,
        model: Model,
        recipe: Recipe[Any, Any],
        options: TrainOptions,
        processes: Processes,
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._options = options.on(processes.device)
        self._processes = processes
        self._part = part_size(recipe, processes.count)
        tenth = max(1, recipe.schedule.iterations // 10)
        self._save_every = self._options.save_every or min(LONGEST_UNSAVED, tenth)
        self.iteration = 0
        self._network = recipe.network(model)
        self._average = Average(model, recipe.schedule.average)
        self._optimizer = recipe.optimizer(model)
        cuda = processes.device.type == "cuda"
        self._scaler = torch.amp.GradScaler(
            processes.device.type, enabled=self._options.amp == Amp.fp16 and cuda
        )
        if processes.count > 1:
            if cuda:
                nn.SyncBatchNorm.convert_sync_batchnorm(self._network)
            self._network = DistributedDataParallel(self._network)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            ArtifactError: It is of another model, or of a finished training.
        """
        fill_model(self._model, checkpoint)
        state = checkpoint.training
        try:
            if state.optimizer is None or state.scaler is None:
                raise ValueError("training was finished")
            self._optimizer.load_state_dict(state.optimizer)
            self._scaler.load_state_dict(state.scaler)
            self._average.load_state_dict(state.average or {})
            self.iteration = state.iteration
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError(
                f"{checkpoint.path} does not hold the state of this training ({error})",
                "delete it, or train in another folder",
            ) from error

    def run(self, examples: Examples, folder: Path, on_step: Callable[[Step], None]) -> None:
        """Train to the end, leaving checkpoints in ``folder``.

        Args:
            examples: What is learnt from.
            folder: For the checkpoints.
            on_step: Called after each update, in each process.

        Raises:
            TrainingError: The loss or the weights are not finite; checkpoints stay as they are.
            ArtifactError: An example or a checkpoint is bad, or cannot be written.
            BackendError: The GPU has too little memory.
        """
        schedule = self._recipe.schedule
        with closing(self._stream(examples)) as stream:
            while self.iteration < schedule.iterations:
                step = self.step([next(stream) for _ in range(schedule.accumulate)])
                on_step(step)
                if self.iteration % self._save_every == 0:
                    self._save(iteration_path(folder, self.iteration))
        self._save(folder / FINAL)

    def step(self, batches: Sequence[Batch]) -> Step:
        """Make one update.

        Args:
            batches: This process' share of the batch, to be accumulated.

        Raises:
            TrainingError: The loss is not finite; the weights stay as they were.
            BackendError: The GPU has too little memory.
        """
        with memory_for(
            f"{self._part} images at a time",
            "raise --accumulate, lower --batch, or use --device cpu",
        ):
            return self._step(batches)

    def _step(self, batches: Sequence[Batch]) -> Step:
        rate = self._set_rates()
        torch.manual_seed(_mix(self._options.seed, self.iteration, self._processes.rank))
        parts = [self._recipe.part(self._moved(batch)) for batch in batches]
        loss, outputs = self._backward(parts)
        value = float(self._processes.total(loss))
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at iteration {self.iteration + 1}",
                "earlier checkpoints are kept; try a lower --lr, or --amp none",
            )
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._average.update(self.iteration)
        self.iteration += 1
        labelled = sum(int(part.labelled) for part in parts)
        used = sum(int(part.used) for part in parts)
        return Step(
            self.iteration,
            self._recipe.schedule.iterations,
            value,
            rate,
            used / max(labelled, 1),
            partial(self._recipe.picture, outputs, parts[-1]),
            partial(self._recipe.answers, outputs, parts[-1]),
        )

    def _backward(self, parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
        """Put parts through the network and back.

        Returns:
            Their share of the loss, and what the network returned for the last of them.
        """
        weights = torch.stack([part.weights for part in parts], dim=1).sum(1)
        totals = self._processes.total(weights).clamp(min=torch.finfo(torch.float32).tiny)
        self._optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self._processes.device)
        outputs: list[Tensor] = []
        for index, part in enumerate(parts):
            with self._sync(index == len(parts) - 1), self._autocast():
                outputs = list(self._network(*part.inputs))
                share = torch.zeros((), device=loss.device)
                for term, total in zip(self._recipe.losses(outputs, part), totals, strict=True):
                    share = share + term / total
                # Processes' gradients are averaged, but the loss is a sum over them.
                self._scaler.scale(share * self._processes.count).backward()
            loss += share.detach()
        return loss, [output.detach() for output in outputs]

    def _moved(self, batch: Batch) -> Batch:
        return tuple(tensor.to(self._processes.device, non_blocking=True) for tensor in batch)

    def _set_rates(self) -> float:
        rate = self._recipe.rate(self.iteration)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        return rate

    def _stream(self, examples: Examples) -> Generator[Batch, None, None]:
        """Yield this process' parts of the batches still to come."""
        part, count, rank = self._part, self._processes.count, self._processes.rank
        schedule = self._recipe.schedule
        pieces = range(
            self.iteration * schedule.accumulate, schedule.iterations * schedule.accumulate
        )
        starts = [(piece * count + rank) * part for piece in pieces]
        positions = [range(start, start + part) for start in starts]
        pin = self._processes.device.type == "cuda"
        workers = self._options.workers or 0 if examples.ahead else 0
        return batches(examples, positions, workers, pin=pin)

    def _sync(self, last: bool) -> AbstractContextManager[Any]:
        if isinstance(self._network, DistributedDataParallel) and not last:
            return self._network.no_sync()
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        kinds = {Amp.bf16.value: torch.bfloat16, Amp.fp16.value: torch.float16}
        kind = kinds.get(self._options.amp)
        return torch.autocast(
            self._processes.device.type, dtype=kind or torch.bfloat16, enabled=kind is not None
        )

    def _save(self, path: Path) -> None:
        if self._processes.first:
            if path.name == FINAL and (mean := self._average.state_dict()):
                self._model.load_state_dict(mean)  # its words are asked for anew when it is saved
            self._check_weights(path)
            save_checkpoint(path, self._model, self._state(path), self._recipe.test)
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

    def _state(self, path: Path) -> TrainingState:
        if path.name == FINAL:
            return TrainingState(self.iteration)
        return TrainingState(
            self.iteration,
            dict(self._recipe.state()),
            self._optimizer.state_dict(),
            self._scaler.state_dict(),
            self._average.state_dict(),
        )


class Average:
    """The running mean of a model's weights, which is steadier than the weights.

    Args:
        model: The model.
        share: As ``Schedule.average``; 0 keeps no mean.
    """

    def __init__(self, model: Model, share: float) -> None:
        self._model = model
        self._share = share
        self._mean: dict[str, Tensor] = {}
        if share:
            self._mean = {key: value.clone() for key, value in model.state_dict().items()}

    def update(self, iteration: int) -> None:
        """Take in the weights after update ``iteration``, counted from 0."""
        # At first the mean is young: what training started from would long remain in it.
        kept = min(self._share, (1 + iteration) / (10 + iteration))
        now = _tensors(self._model) if self._share else {}
        for key, mean in self._mean.items():
            if mean.is_floating_point():
                mean.lerp_(now[key], 1 - kept)
            else:
                mean.copy_(now[key])

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return the mean; None if none is kept."""
        return self._mean if self._share else None

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            KeyError: It is another model's.
        """
        for key, mean in self._mean.items():
            mean.copy_(state[key])


def _tensors(model: Model) -> dict[str, Tensor]:
    """Return all tensors of a model as they are: its ``state_dict`` may ask a tower for words."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in named}


def part_size(recipe: Recipe[Any, Any], processes: int) -> int:
    """Return how many images a process takes at a time.

    Raises:
        UsageError: The batch cannot be divided so.
    """
    schedule = recipe.schedule
    part, rest = divmod(schedule.batch, schedule.accumulate * processes)
    if rest or not part:
        raise UsageError(
            f"a batch of {schedule.batch} cannot be divided into {schedule.accumulate} parts on "
            f"{processes} processes",
            "choose --batch and --accumulate that divide",
        )
    recipe.check_part(part)
    return part


def choose_precision(name: str, device: torch.device, *, rounded: bool = False) -> str:
    """Return ``none``, ``bf16`` or ``fp16`` for what was asked for; see ``TrainOptions.on``.

    Raises:
        UsageError: The device cannot do that.
    """
    cuda = device.type == "cuda"
    if name == Amp.auto:
        if not cuda:
            pays = rounded and multiplies_bf16(device, processor_features())
            return Amp.bf16.value if pays else Amp.none.value
        return Amp.bf16.value if torch.cuda.is_bf16_supported() else Amp.fp16.value
    if name == Amp.fp16 and not cuda:
        raise UsageError("--amp fp16 needs a CUDA device", "use --amp bf16 or none")
    return name


def _mix(*numbers: int) -> int:
    """Return one seed made of several."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number) % 2**63
    return mixed
