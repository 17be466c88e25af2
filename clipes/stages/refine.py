"""Stage 2: maps and images to pseudo-masks and confidence maps, on many cores or machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from clipes.artifacts import Run
from clipes.config import CrfParams
from clipes.images import read_image
from clipes.pseudo import SHRUNK, pseudo_label, workable_size
from clipes.runner import Summary, for_each
from clipes.types import Failure, Progress, Sample


def refine(
    samples: Sequence[Sample],
    run: Run,
    crf: CrfParams,
    *,
    background_exponent: float,
    crf_backend: str,
    backend: str,
    workers: int | None,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Make and save the mask and confidence map of every sample that has none yet.

    Args:
        samples: Images; only those with maps in ``run`` can be refined.
        run: The run folder.
        crf: Settings of the CRF.
        background_exponent: alpha of the background score.
        crf_backend: Implementation of the CRF.
        backend: What the images are spread over, see ``clipes.runner``.
        workers: How many images at once; None for as many as there are cores.
        progress: Called after each image.
        report: Called with each image that cannot be processed; the others go on.
    """
    # Workers on other machines, or started before a change of folder, have another idea of ".".
    run = Run(run.root.absolute())
    samples = [replace(sample, image=sample.image.absolute()) for sample in samples]
    return for_each(
        partial(
            _refine_one,
            run=run,
            crf=crf,
            background_exponent=background_exponent,
            crf_backend=crf_backend,
        ),
        samples,
        is_done=partial(_has_pseudo, run),
        backend=backend,
        workers=workers,
        progress=progress,
        report=report,
    )


def _has_pseudo(run: Run, sample: Sample) -> bool:
    return run.has_pseudo(sample.id)


def _refine_one(
    sample: Sample, run: Run, crf: CrfParams, background_exponent: float, crf_backend: str
) -> str | None:
    cams = run.load_cams(sample.id)
    pseudo = pseudo_label(
        read_image(sample.image),
        cams,
        crf,
        background_exponent=background_exponent,
        backend=crf_backend,
    )
    run.save_pseudo(sample.id, pseudo)
    size = workable_size(cams.size, 1 + len(cams.labels), backend=crf_backend)
    return None if size == cams.size else SHRUNK
