"""What a later stage starts from: the data set and the settings a run was made with."""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from clipes.config import AUTO_LABELS, Preset
from clipes.datasets import Dataset, open_dataset
from clipes.disk.files import list_files
from clipes.errors import ArtifactError, DatasetError, WriteError
from clipes.run.folder import Run
from clipes.types import Sample


def reopen_all(run: Run, root: Path | None, split: str) -> Dataset:
    """Open a list of images to be predicted: labels tell which file is meant, but none are needed.

    Arguments and errors as for ``reopen``.
    """
    plain = reopen(run, root, split, labelled=False)
    try:
        known = reopen(run, root, split).samples
    except DatasetError:  # the label file is gone, or damaged: it says nothing
        known = ()
    samples = {sample.id: sample for sample in (*plain.samples, *known)}
    failures = tuple(item for item in plain.failures if item.id not in samples)
    return replace(plain, samples=tuple(samples.values()), failures=failures)


def reopen(
    run: Run, root: Path | None, split: str | None = None, *, labelled: bool = True
) -> Dataset:
    """Open the data set a run was made from, wherever ``root`` or run.json say it is.

    Where ``root`` is another place than run.json says, run.json says so from then on.

    Args:
        run: The run folder.
        root: Where the data set is, if not where run.json says.
        split: Another list of its images than the one the run was made from.
        labelled: False lists the images without looking for labels.

    Raises:
        ArtifactError: run.json does not say how the maps were made.
        SplitError: There is no such list of images.
        DatasetError: The data set is not there, or cannot be used.
    """
    record = run.cam_record()
    settings, recorded = record.settings, record.facts.root
    if root is None:
        root = _recorded_root(run, recorded)
    tagged = labelled and settings.labels == AUTO_LABELS
    labels = None
    if labelled:
        labels = run.tags_path if tagged else _label_file(settings.labels, recorded, root)
    data = open_dataset(
        settings.dataset,
        root=root,
        split=split or settings.split,
        labels=labels,
        classes=settings.classes,
        difficult=settings.difficult or not labelled,
        labelled=labelled,
    )
    if recorded != (place := str(data.root.absolute())):
        with suppress(WriteError):  # a finished run may be read-only: then --root is said each time
            run.note_fact("cam", "root", place)
    return data.without_unlabelled() if tagged else data


def orphans(run: Run, data: Dataset, stage: str) -> str:
    """Return what to say of a run's files that belong to no image any more; empty if none do.

    Args:
        run: The run folder.
        data: Its data set.
        stage: The folder of the files: cams, pseudo.
    """
    known = {sample.id for sample in data.samples}
    known |= {failure.id for failure in data.failures} | set(data.empty)
    found = [path for path in list_files(run.root / stage) if path.stem not in known]
    if not found:
        return ""
    return (
        f"{len(found)} files in {run.root / stage} belong to no image of the data set any more and "
        f"are not used, the first is {found[0].name}"
    )


def unmade(samples: Sequence[Sample], present: Container[str], what: str, remedy: str) -> str:
    """Return what to say of images that lack what a stage starts from; empty if none do.

    Args:
        samples: The images.
        present: Ids of those that have it.
        what: What it is: ``maps``.
        remedy: How it is made.
    """
    missing = [sample.id for sample in samples if sample.id not in present]
    if not missing:
        return ""
    return (
        f"left out: {len(missing)} of {len(samples)} images have no {what} yet, the first is "
        f"{missing[0]}; {remedy}"
    )


def left_out(data: Dataset) -> str:
    """Return what to say of images that the data set lacks something of; empty if there are none.

    For stages whose result is one for all images; the others name each of them.
    """
    if not data.failures:
        return ""
    first = data.failures[0]
    return (
        f"left out: {len(data.failures)} of the data set's images cannot be used, the first is "
        f"{first.id}: {first.reason}"
    )


def _recorded_root(run: Run, recorded: str) -> Path:
    if not recorded:
        raise ArtifactError(
            f"{run.manifest_path} does not say where the data set is", "say it once with --root"
        )
    if not Path(recorded).is_dir():
        raise DatasetError(
            f"the data set of {run.root} is no longer at {recorded}",
            "say once where it is now with --root",
        )
    return Path(recorded)


def _label_file(labels: str | None, recorded: str, root: Path) -> Path | None:
    """Return the label file a run was made with; one in the data set has moved with it."""
    if labels is None:
        return None
    path = Path(labels)
    if not path.is_file() and recorded:
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
    preset = run.cam_record().settings.preset
    if preset is None:
        raise ArtifactError(
            f"{run.manifest_path} does not say how the maps were made: it names no preset",
            "make the run again in another folder",
        )
    return preset
