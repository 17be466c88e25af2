"""Stage 2: maps and images to pseudo-masks and confidence maps, on many cores or machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from clipes.artifacts import Run
from clipes.config import CrfParams
from clipes.errors import ArtifactError
from clipes.freshness import Freshness
from clipes.images import read_image
from clipes.origin import MaskOrigin
from clipes.pseudo import SHRUNK, pseudo_label, workable_size
from clipes.runner import Summary, for_each
from clipes.types import Failure, Progress, Sample


@dataclass(frozen=True)
class RefineSettings:
    """All that changes masks but the maps and the images.

    Attributes:
        crf: Settings of the CRF.
        background_exponent: alpha of the background score.
        backend: Implementation of the CRF.
    """

    crf: CrfParams
    background_exponent: float
    backend: str = "numba"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, for run.json."""
        return asdict(self)


def waiting(
    samples: Sequence[Sample], current: Freshness, progress: Progress
) -> tuple[Sample, ...]:
    """Return the samples whose masks are missing or out of date.

    Args:
        samples: Images.
        current: Tells which masks are.
        progress: Called after each image.
    """
    found = []
    for index, sample in enumerate(samples):
        if not current.has_pseudo(sample):
            found.append(sample)
        progress(index + 1, len(samples))
    return tuple(found)


def refine(
    samples: Sequence[Sample],
    run: Run,
    settings: RefineSettings,
    current: Freshness,
    *,
    backend: str,
    workers: int | None,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Make and save the mask and confidence map of every sample that has none up to date.

    Masks that were edited by hand are never written over: if their maps have changed, that is
    reported.

    Args:
        samples: Images; only those with maps in ``run`` can be refined.
        run: The run folder.
        settings: Of the CRF.
        current: Tells which masks are out of date.
        backend: What the images are spread over, see ``clipes.runner``.
        workers: How many images at once; None for as many as there are cores.
        progress: Called after each image.
        report: Called with each image that cannot be processed; the others go on.
    """
    # Workers on other machines, or started before a change of folder, have another idea of ".".
    run = Run(run.root.absolute())
    samples = [replace(sample, image=sample.image.absolute()) for sample in samples]
    return for_each(
        partial(_refine_one, run=run, settings=settings, current=current.at(run)),
        samples,
        is_done=current.at(run).has_pseudo,
        backend=backend,
        workers=workers,
        progress=progress,
        report=report,
    )


def _refine_one(
    sample: Sample, run: Run, settings: RefineSettings, current: Freshness
) -> str | None:
    if reason := current.maps(sample):
        raise ArtifactError(reason, "run 'clipes cam' again")
    if run.has_pseudo(sample.id) and current.is_edited(sample) and (why := current.mask(sample)):
        raise ArtifactError(
            f"{why}: {run.pseudo_path(sample.id)}",
            "it may be a person's work: delete it to have it made again",
        )
    cams, maps = run.load_cams(sample.id), run.maps_origin(sample.id)
    pseudo = pseudo_label(
        read_image(sample.image),
        cams,
        settings.crf,
        background_exponent=settings.background_exponent,
        backend=settings.backend,
    )
    origin = MaskOrigin.of(maps, settings.to_dict()).text() if maps else ""
    run.save_pseudo(sample.id, pseudo, origin=origin)
    size = workable_size(cams.size, 1 + len(cams.labels))
    return None if size == cams.size else SHRUNK
