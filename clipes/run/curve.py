"""``training.csv`` of a run folder: how a training went, 100 to 200 points of it."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipes.disk.files import atomic_write
from clipes.errors import ArtifactError

CURVE = "training.csv"
"""Name of the file, in the folder of a training."""

_COLUMNS = ("iteration", "loss", "rate", "kept", "miou")
_MOST = 10_000  # points that are read: fifty times as many as a training writes


@dataclass(frozen=True)
class TrainingPoint:
    """What is known after some updates.

    Attributes:
        iteration: Updates made.
        loss: Mean over the updates since the point before, or since the training went on.
        rate: The learning rate.
        kept: Share of the labelled pixels that were trained on.
        miou: Of the last answers, held to the labels that are learnt, in [0, 1]: no ground truth.
    """

    iteration: int
    loss: float
    rate: float
    kept: float
    miou: float


def write_curve(folder: Path, points: Sequence[TrainingPoint]) -> None:
    """Write the points of a training, in place of those that were there.

    Raises:
        WriteError: The disk is full or the folder cannot be written.
    """
    with (
        atomic_write(folder / CURVE) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(_COLUMNS)
        for point in points:
            numbers = (point.loss, point.rate, point.kept, point.miou)
            table.writerow([point.iteration, *(f"{number:.6g}" for number in numbers)])


def read_curve(folder: Path, until: float = math.inf) -> list[TrainingPoint]:
    """Return the points of a training up to an update; none if it wrote none.

    Raises:
        ArtifactError: The file is damaged.
    """
    path = folder / CURVE
    if not path.is_file():
        return []
    points: list[TrainingPoint] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            if tuple(table.fieldnames or ()) != _COLUMNS:
                raise ValueError("no such columns")
            for row in table:
                iteration, *numbers = (row[name] for name in _COLUMNS)
                point = TrainingPoint(int(iteration), *map(float, numbers))
                before = points[-1].iteration if points else 0
                if point.iteration <= before or not all(map(math.isfinite, map(float, numbers))):
                    raise ValueError("no such number")
                if len(points) == _MOST or point.iteration > until:
                    break
                points.append(point)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ArtifactError(f"{path} is damaged", "delete it, no other file needs it") from error
    return points
