"""TensorBoard: curves of loss, rate and kept pixels, and panels of what was seen and answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipes.seg.train import Step

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
            self._writer.add_image("views", step.picture(), step.iteration, dataformats="HWC")
            self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()
