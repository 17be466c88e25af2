"""What a later stage starts from: the data set and the settings a run was made with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipes.artifacts import Run
from clipes.config import AUTO_LABELS, CamParams, CrfParams, PatchParams, Preset
from clipes.datasets import Dataset, open_dataset
from clipes.errors import ArtifactError, DatasetError, WriteError


def reopen(run: Run, root: Path | None, split: str | None = None) -> Dataset:
    """Open the data set a run was made from, wherever ``root`` or run.json say it is.

    Where ``root`` is another place than run.json says, run.json says so from then on.

    Args:
        run: The run folder.
        root: Where the data set is, if not where run.json says.
        split: Another list of its images than the one the run was made from.

    Raises:
        ArtifactError: run.json does not say how the maps were made.
        DatasetError: The data set is not there, or cannot be used.
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
    recorded = section.get("facts", {}).get("root")
    if root is None:
        root = _recorded_root(run, recorded)
    tagged = labels == AUTO_LABELS
    data = open_dataset(
        kind,
        root=root,
        split=split or first_split,
        labels=run.tags_path if tagged else _label_file(labels, recorded, root),
        classes=tuple(classes),
        difficult=difficult is not False,
    )
    if recorded != (place := str(data.root.absolute())):
        with suppress(WriteError):  # a finished run may be read-only: then --root is said each time
            run.note_fact("cam", "root", place)
    return data.without_unlabelled() if tagged else data


def _recorded_root(run: Run, recorded: object) -> Path:
    if not isinstance(recorded, str):
        raise _damaged(run, "root")
    if not Path(recorded).is_dir():
        raise DatasetError(
            f"the data set of {run.root} is no longer at {recorded}",
            "say once where it is now with --root",
        )
    return Path(recorded)


def _label_file(labels: str | None, recorded: object, root: Path) -> Path | None:
    """Return the label file a run was made with; one in the data set has moved with it."""
    if labels is None:
        return None
    path = Path(labels)
    if not path.is_file() and isinstance(recorded, str):
        place = Path(recorded)
        for moved in (path, path.absolute()):
            if moved.is_relative_to(place) and (root / moved.relative_to(place)).is_file():
                return root / moved.relative_to(place)
    return path


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
