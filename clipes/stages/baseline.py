"""Scores held against those of an earlier run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipes.disk.records import read_record
from clipes.errors import ArtifactError, ClipesError
from clipes.stages.evaluate import Scored


class RegressionError(ClipesError):
    """A score fell below its baseline."""


@dataclass(frozen=True)
class _Before:
    """What a baseline says of a stage; mIoU in [0, 1]."""

    miou: float
    images: int


@dataclass(frozen=True)
class _Baseline:
    """What ``compare`` needs of the scores that ``scores_to_json`` writes."""

    classes: tuple[str, ...]
    stages: dict[str, _Before]


@dataclass(frozen=True)
class Change:
    """How a stage's mIoU moved; in percent.

    Attributes:
        stage: What was scored.
        before: mIoU of the baseline.
        now: mIoU of this run; None if the stage has no output here.
    """

    stage: str
    before: float
    now: float | None

    def fell(self, tolerance: float) -> bool:
        """Tell whether the score is gone or more than ``tolerance`` points lower."""
        return self.now is None or self.now < self.before - tolerance


def find_baseline(path: Path, run: str) -> Path | None:
    """Return the baseline file: ``path`` itself, or ``<run>.json`` in the folder ``path``.

    Raises:
        ArtifactError: There is no such file or folder.
    """
    if path.is_dir():
        file = path / f"{run}.json"
        return file if file.is_file() else None
    if not path.is_file():
        raise ArtifactError(
            f"there is no baseline {path}", "make one with 'clipes eval RUN --json FILE'"
        )
    return path


def compare(scored: Scored, path: Path) -> list[Change]:
    """Return how every stage of a baseline moved.

    Args:
        scored: Scores of now.
        path: What ``clipes eval --json`` wrote then.

    Raises:
        ArtifactError: The file is no such thing, or other classes or images were scored.
    """
    remedy = "make it again with 'clipes eval RUN --json FILE'"
    baseline = read_record(path, _Baseline, "the baseline", remedy)
    if baseline.classes != scored.classes:
        raise ArtifactError(f"{path} is of other classes than this run", "give this run's baseline")
    changes = []
    for name, before in baseline.stages.items():
        now = scored.stages.get(name)
        if now is not None and now.images != before.images:
            raise ArtifactError(
                f"{path}: '{name}' was scored on {before.images} images, now on {now.images}",
                "compare runs on the same images",
            )
        changes.append(Change(name, 100 * before.miou, None if now is None else 100 * now.miou))
    return changes


def require(changes: list[Change], tolerance: float) -> None:
    """Refuse scores that fell.

    Args:
        changes: Of the stages.
        tolerance: How far mIoU may fall, in percentage points.

    Raises:
        RegressionError: A stage fell further, or has no output.
    """
    fallen = [
        f"{change.stage} is missing"
        if change.now is None
        else f"{change.stage} fell from {change.before:.2f} to {change.now:.2f}"
        for change in changes
        if change.fell(tolerance)
    ]
    if fallen:
        raise RegressionError(
            f"mIoU below the baseline by more than {tolerance:g} points: {', '.join(fallen)}",
            "find the cause, or commit a new baseline with its reason",
        )
