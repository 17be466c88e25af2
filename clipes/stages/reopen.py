"""What a later stage starts from: the data set and the settings a run was made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipes.artifacts import Run
from clipes.config import AUTO_LABELS, CamParams, CrfParams, PatchParams, Preset
from clipes.datasets import Dataset, open_dataset
from clipes.errors import ArtifactError


def reopen(run: Run, root: Path | None, split: str | None = None) -> Dataset:
    """Open the data set a run was made from, wherever ``root`` or run.json say it is.

    ``split`` names another list of its images than the one the run was made from.
    """
    section = run.stage("cam")
    match section:
        case {
            "settings": {
                "dataset": str(kind),
                "split": str() | None as first_split,
                "labels": str() | None as labels,
                "classes": [*classes],
            } as settings
        } if all(isinstance(name, str) for name in classes):
            difficult = settings.get("difficult", True)
        case _:
            raise _damaged(run, "settings")
    if root is None:
        match section:
            case {"facts": {"root": str(place)}}:
                root = Path(place)
            case _:
                raise _damaged(run, "root")
    tagged = labels == AUTO_LABELS
    data = open_dataset(
        kind,
        root=root,
        split=split or first_split,
        labels=run.tags_path if tagged else Path(labels) if labels else None,
        classes=tuple(classes),
        difficult=difficult is not False,
    )
    return data.without_unlabelled() if tagged else data


def preset_of(run: Run) -> Preset:
    """Return the settings a run's maps were made with.

    Raises:
        ArtifactError: run.json does not say.
    """
    match run.stage("cam").get("settings"):
        case {
            "preset": {
                "name": str(name),
                "cam": dict() as cam,
                "crf": dict() as crf,
                "background_exponent": int() | float() as exponent,
            }
        } if cam.keys() <= asdict(CamParams()).keys() and _fits(crf, asdict(CrfParams())):
            match cam.get("patches"):
                case None:
                    return Preset(name, CamParams(**cam), CrfParams(**crf), exponent)
                case dict() as patches if _fits(patches, asdict(PatchParams())):
                    cam = {**cam, "patches": PatchParams(**patches)}
                    return Preset(name, CamParams(**cam), CrfParams(**crf), exponent)
    raise _damaged(run, "preset")


def _fits(stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Tell whether all that is stored is known and of the kind of its default."""
    return all(
        isinstance(value, int | float if isinstance(defaults.get(key), float) else int)
        and key in defaults
        for key, value in stored.items()
    )


def _damaged(run: Run, what: str) -> ArtifactError:
    return ArtifactError(
        f"{run.manifest_path} does not say how the maps were made (no usable '{what}')",
        "make the run again in another folder",
    )
