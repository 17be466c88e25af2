"""Masks that a person corrected in another tool, into ``corrected/``: they win over the run's."""

from __future__ import annotations

import getpass
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from clipes.datasets.base import printable, without_suffix
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

_DEEPEST = 65  # folders of a name that are looked at: no image lies deeper


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
    names = _Names(samples)
    called = [(*names.find(one.name), one) for one in found]
    known: dict[str, Found] = {}
    failures = []
    for _, sample, one in sorted(called, key=lambda it: it[0]):
        if sample is None:
            failures.append(Failure(one.name, "no image of the run is called that, or several are"))
        elif sample.id in known:
            first = f"it is there twice: '{printable(known[sample.id].name)}' counts"
            failures.append(Failure(one.name, first))
        else:
            known[sample.id] = one
    return known, failures


class _Names:
    """What tools call the images of a run.

    They put folders of their own before the whole path of an image, or leave out folders at its
    front, but put none in their place: ``dog/1.jpg`` is another image than ``cat/1.jpg``. Some drop
    the suffix, or have that of a mask.

    Args:
        samples: The images.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        folder = common_folder(samples) if samples else Path()
        self._exported: dict[str, Sample] = {}  # as an export calls them
        self._whole: dict[str, Sample] = {}
        self._short: dict[str, Sample | None] = {}  # None where that is not one image
        self._folders: set[str] = set()
        for sample in samples:
            own = _own_path(sample)
            self._whole |= dict.fromkeys((sample.id, without_suffix(own), own), sample)
            self._folders.add(own.rpartition("/")[0])
            while "/" in own:
                own = own.partition("/")[2]
                for name in {own, without_suffix(own)}:
                    self._short[name] = None if name in self._short else sample
            below = _composed(name_below(folder, sample))
            self._exported |= dict.fromkeys((without_suffix(below), below), sample)
        self._folders.discard("")

    def find(self, name: str) -> tuple[int, Sample | None]:
        """Return the image that a tool calls ``name``; None if there is none, or are several.

        Returns:
            How far the name is from its whole path, which is for comparison, and the image.
        """
        parts = [part for part in _composed(name).split("/") if part not in ("", ".", "..")]
        parts = parts[-_DEEPEST:]
        said = "/".join(parts)
        sample = self._exported.get(said) or self._exported.get(without_suffix(said))
        if sample is not None:
            return 0, sample
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            sample = self._whole.get(tail) or self._whole.get(without_suffix(tail))
            if sample is not None:
                return start, sample
            # What precedes may be a tool's folder, but not one of the images' own.
            if "/".join(parts[start:-1]) in self._folders:
                return _DEEPEST, None
        return _DEEPEST, self._short.get(said) or self._short.get(without_suffix(said))


def _own_path(sample: Sample) -> str:
    """Return the end of an image's path that its id is made of, with slashes."""
    parts = _composed(str(sample.image)).split("/")
    tails = ("/".join(parts[start:]) for start in reversed(range(len(parts))))
    made_of = (tail for tail in tails if _joined(tail) == sample.id)
    return next(made_of, parts[-1])


def _joined(path: str) -> str:
    return without_suffix(path.strip()).replace("/", "_")


def _composed(path: str) -> str:
    """Return a path with slashes, and accents as ids have them: macOS stores them decomposed."""
    return unicodedata.normalize("NFC", path.replace("\\", "/"))
