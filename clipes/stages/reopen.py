"""What a later stage starts from: the data set and the settings a run was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipes.artifacts import Run
from clipes.config import AUTO_LABELS, CamParams, CrfParams, Preset
from clipes.datasets import Dataset, open_dataset
from clipes.errors import ArtifactError


def reopen(run: Run, root: Path | None, split: str | None = None) -> Dataset:
    """Open the data set a run was made from, wherever ``root`` or run.json say it is.

    ``split`` names another list of its images than the one the run was made from.
    """
    section = run.stage("cam")
    settings, facts = section.get("settings", {}), section.get("facts", {})
    try:
        labels = settings["labels"]
        tagged = labels == AUTO_LABELS
        if tagged:
            labels = run.tags_path
        data = open_dataset(
            settings["dataset"],
            root=root or Path(facts["root"]),
            split=split or settings["split"],
            labels=Path(labels) if labels else None,
            classes=tuple(settings["classes"]),
            difficult=settings.get("difficult", True),
        )
        return data.without_unlabelled() if tagged else data
    except (KeyError, TypeError) as error:
        raise _damaged(run, error) from error


def preset_of(run: Run) -> Preset:
    """Return the settings a run's maps were made with."""
    try:
        stored: dict[str, Any] = run.stage("cam")["settings"]["preset"]
        return Preset(
            stored["name"],
            CamParams(**stored["cam"]),
            CrfParams(**stored["crf"]),
            stored["background_exponent"],
        )
    except (KeyError, TypeError) as error:
        raise _damaged(run, error) from error


def _damaged(run: Run, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{run.manifest_path} does not say how the maps were made ({error})",
        "make the run again in another folder",
    )
