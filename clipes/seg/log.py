"""How a training goes, for later: points of a curve, and TensorBoard's curves and pictures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipes.errors import ArtifactError
from clipes.masks.scores import ConfusionMatrix
from clipes.run.curve import TrainingPoint, read_curve, write_curve
from clipes.seg.train import Step
from clipes.types import Int64Array

_SCALARS_EVERY = 10
_PANELS_EVERY = 500

_POINTS = 100  # of a training's curve
_COMPARED = 10  # points whose images one mIoU is of: those of one alone are too few


class TensorBoard:
    """Writes steps as event files; without the package ``tensorboard`` it only says so.

    Args:
        folder: For the event files.
        after: Updates made before; what was written beyond them counts no more.
        say: Told if they cannot be written.
    """

    def __init__(self, folder: Path, after: int, say: Callable[[str], None]) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("no TensorBoard log: the package is not installed; pip install 'clipes[train]'")
            return
        self._writer = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def write(self, step: Step) -> None:
        """Write a step, if it is its turn."""
        if self._writer is None:
            return
        if step.iteration % _SCALARS_EVERY == 0 or step.iteration == 1:
            self._writer.add_scalar("loss", step.loss, step.iteration)
            self._writer.add_scalar("lr", step.lr, step.iteration)
            self._writer.add_scalar("kept", step.kept, step.iteration)
        if step.iteration % _PANELS_EVERY == 0 or step.iteration == step.total:
            self._writer.add_image("views", step.picture(), step.iteration, dataformats="HWC")
            self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()


class Curve:
    """Keeps the curve of a training in ``training.csv``, whatever packages there are.

    Args:
        folder: The folder of the training.
        labels: Number of labels, background included.
        after: Updates made before; points beyond them are of a training that was broken off.
        say: Told if the curve so far cannot be read: it starts anew then.
    """

    def __init__(self, folder: Path, labels: int, after: int, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._labels = labels
        self._points: list[TrainingPoint] = []
        try:
            self._points = read_curve(folder, after) if after else []
        except ArtifactError as error:
            say(f"the curve of the training starts anew: {error.what}")
        self._losses: list[float] = []
        self._compared: deque[Int64Array] = deque(maxlen=_COMPARED)

    def write(self, step: Step) -> None:
        """Take in a step, and write the file if it is its turn and a pixel had a label lately."""
        self._losses.append(step.loss)
        if step.iteration % max(1, step.total // _POINTS) and step.iteration != step.total:
            return
        matrix = ConfusionMatrix(self._labels)
        for labels, answer in step.answers():
            matrix.update(*(one.cpu().numpy().astype(np.uint8) for one in (labels, answer)))
        self._compared.append(matrix.counts)
        together = ConfusionMatrix.of(np.sum(self._compared, axis=0))
        if not together.counts.any():
            return
        loss, miou = float(np.mean(self._losses)), together.scores().miou
        self._points.append(TrainingPoint(step.iteration, loss, step.lr, step.kept, miou))
        self._losses.clear()
        write_curve(self._folder, self._points)
