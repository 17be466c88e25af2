"""Masks that a person corrected in another tool, into ``corrected/``: they win over the run's."""

from __future__ import annotations

import getpass
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath

import numpy as np

from clipes.datasets.base import without_suffix
from clipes.disk.images import read_header, read_mask
from clipes.errors import ArtifactError, ImageError
from clipes.formats import READERS
from clipes.formats.base import common_folder, name_below
from clipes.formats.read import Found
from clipes.listener import Listener
from clipes.run.folder import Run
from clipes.run.loop import Summary, for_each
from clipes.run.origin import CorrectionOrigin, Picture
from clipes.run.reopen import reopen
from clipes.types import Failure, PseudoLabel, Sample, UInt8Array

AS_IT_WAS = "are as they were: seen, and left so"
"""Said of images whose mask is the one that counted before."""

_DEEPEST = 20  # folders of a name that are looked at


@dataclass(frozen=True)
class ImportRequest:
    """All that ``clipes import`` is told.

    Attributes:
        name: One of ``READERS``.
        path: The tool's file or folder.
        by: Who corrected them.
        root: Where the data set is, if not where run.json says.
        command: The command line, for run.json.
    """

    name: str
    path: Path
    by: str
    root: Path | None = None
    command: str = ""


def import_masks(request: ImportRequest, run: Run, listener: Listener) -> tuple[Path, Summary]:
    """Read corrected masks of a run's images.

    Each image of the file counts as corrected, whether its mask changed or not: a person who looked
    and agreed says something, too. One that was imported before is replaced.

    Args:
        request: What is asked for.
        run: The run folder.
        listener: Who is told of each image that cannot be read, and how it goes.

    Returns:
        The folder of the masks, and how many were read; its remarks count those ``AS_IT_WAS``.

    Raises:
        ArtifactError: The file has no image, or the folder cannot be written.
        DatasetError: The file is none of the format.
    """
    data = reopen(run, request.root)
    found = list(READERS[request.name](request.path, data.classes))
    if not found:
        raise ArtifactError(f"{request.path} has no image", "name what the tool exported")
    known, failures = _matched(found, data.samples)
    for failure in failures:
        listener.report(failure)
    settings = {"format": request.name, "path": str(request.path.absolute()), "by": request.by}
    run.begin("import", settings, request.command, anew=True)
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def read(sample: Sample) -> str | None:
        size, _ = read_header(sample.image)
        mask = known[sample.id].draw(size)
        same = _counts_already(mask, run, sample)
        picture = Picture.of(sample.image)
        origin = CorrectionOrigin(picture.sha256, picture.size, request.by, when, request.name)
        sure = PseudoLabel(mask, np.ones(size, np.float32))
        run.corrected.save_pseudo(sample.id, sure, origin=origin.text())
        return AS_IT_WAS if same else None

    todo = [sample for sample in data.samples if sample.id in known]
    with listener.progress("import") as progress:
        summary = for_each(read, todo, progress=progress, report=listener.report)
    return run.corrected.root, replace(summary, failures=(*failures, *summary.failures))


def login_name() -> str:
    """Return who is at the keyboard, as far as the system says."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user, as in some containers
        return "unknown"


def _counts_already(mask: UInt8Array, run: Run, sample: Sample) -> bool:
    """Tell whether a mask is the one of its image that counts now."""
    before = run.corrected if run.corrected.has_pseudo(sample.id) else run
    try:
        return np.array_equal(mask, read_mask(before.pseudo_path(sample.id)))
    except ImageError:  # none, or damaged: it is no longer asked for
        return False


def _matched(
    found: Iterable[Found], samples: Sequence[Sample]
) -> tuple[dict[str, Found], list[Failure]]:
    """Return what was found by the id of its image, and what belongs to none."""
    names, folders = _names(samples), {sample.image.parent.name for sample in samples}
    known: dict[str, Found] = {}
    failures = []
    for one in found:
        sample = _called(one.name, names, folders)
        if sample is None:
            failures.append(Failure(one.name, "no image of the run is called that, or several are"))
        elif sample.id in known:
            failures.append(Failure(one.name, "it is there twice: the first counts"))
        else:
            known[sample.id] = one
    return known, failures


def _called(name: str, names: Mapping[str, Sample | None], folders: set[str]) -> Sample | None:
    """Return the image of which a tool says ``name``; None if there is none, or are several.

    Tools put folders of their own before a path. But one that has the name of a folder of the run's
    images is none of a tool's: its image is another than the namesake elsewhere.

    Args:
        name: What the tool says.
        names: As ``_names`` returns it.
        folders: Names of the folders in which the run's images lie.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts[-_DEEPEST:]
    sample = next((names[key] for key in _keys(parts) if key in names), None)
    if sample is None or not folders.intersection(parts[-2:-1]):
        return sample
    return sample if parts[-2] == sample.image.parent.name else None


def _keys(parts: Sequence[str]) -> Iterator[str]:
    """Yield what an image may be called whose path has these parts, the most exact first.

    Some tools drop the suffix, or have that of a mask.
    """
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        yield tail
        yield without_suffix(tail)


def _names(samples: Sequence[Sample]) -> dict[str, Sample | None]:
    """Return the images by all that they may be called; None where that is not one image."""
    if not samples:
        return {}
    folder = common_folder(samples)
    exact: dict[str, Sample | None] = {}
    loose: dict[str, Sample | None] = {}
    for sample in samples:
        below = name_below(folder, sample)
        exact[below] = exact[without_suffix(below)] = exact[sample.id] = sample
        for name in {sample.image.name, without_suffix(sample.image.name)}:
            loose[name] = None if name in loose else sample
    return {**loose, **exact}
