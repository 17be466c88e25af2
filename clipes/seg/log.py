"""TensorBoard: curves of loss, rate and kept pixels, and panels of what was seen and answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipes.disk.images import voc_palette
from clipes.seg.augment import MEAN, STD
from clipes.seg.loss import shrink
from clipes.seg.train import Step
from clipes.types import UInt8Array

_PANELS = 2  # images of a batch that are shown
_SCALARS_EVERY = 10
_PANELS_EVERY = 500


class TensorBoard:
    """Writes steps as event files; without the package ``tensorboard`` it only says so.

    Args:
        folder: For the event files.
        say: Told if they cannot be written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("no TensorBoard log: the package is not installed; pip install 'clipes[train]'")
            return
        self._writer = SummaryWriter(str(folder))

    def write(self, step: Step) -> None:
        """Write a step, if it is its turn."""
        if self._writer is None:
            return
        if step.iteration % _SCALARS_EVERY == 0 or step.iteration == 1:
            self._writer.add_scalar("loss", step.loss, step.iteration)
            self._writer.add_scalar("lr", step.lr, step.iteration)
            self._writer.add_scalar("kept", step.kept, step.iteration)
        if step.iteration % _PANELS_EVERY == 0 or step.iteration == step.total:
            self._writer.add_image("views", panel(step), step.iteration, dataformats="HWC")
            self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()


def panel(step: Step) -> UInt8Array:
    """Return rows of view, trained labels and answer, side by side: (n H, 3 W, 3) uint8."""
    palette = voc_palette()
    count = min(_PANELS, len(step.images))
    size = (step.images.shape[2], step.images.shape[3])
    labels = step.labels[:count].cpu().numpy()
    answers = shrink(step.logits[:count].argmax(1), size).cpu().numpy()
    colours = step.images[:count].cpu() * torch.tensor(STD)[:, None, None]
    colours = (colours + torch.tensor(MEAN)[:, None, None]).clamp(0, 1) * 255
    views = colours.round().byte().permute(0, 2, 3, 1).numpy()
    rows = [
        np.concatenate([views[i], palette[labels[i]], palette[answers[i]]], axis=1)
        for i in range(count)
    ]
    return np.concatenate(rows)
