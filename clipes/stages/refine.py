"""Stage 2: maps and images to pseudo-masks and confidence maps, in parallel processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from joblib import Parallel, delayed

from clipes.artifacts import Run
from clipes.config import CrfParams
from clipes.errors import ClipesError
from clipes.images import read_image
from clipes.pseudo import pseudo_label
from clipes.runner import Summary
from clipes.types import Failure, Progress, Sample


def refine(
    samples: Sequence[Sample],
    run: Run,
    crf: CrfParams,
    *,
    background_exponent: float,
    crf_backend: str,
    workers: int,
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
        workers: Number of processes.
        progress: Called after each image.
        report: Called with each image that cannot be processed; the others go on.
    """
    todo = [sample for sample in samples if not run.has_pseudo(sample.id)]
    failures = []
    progress(0, len(todo))
    jobs = (
        delayed(_refine_one)(sample, run, crf, background_exponent, crf_backend) for sample in todo
    )
    parallel = Parallel(n_jobs=min(workers, max(1, len(todo))), return_as="generator_unordered")
    for index, failure in enumerate(parallel(jobs)):
        if failure is not None:
            failures.append(failure)
            report(failure)
        progress(index + 1, len(todo))
    return Summary(len(todo) - len(failures), len(samples) - len(todo), tuple(failures))


def _refine_one(
    sample: Sample, run: Run, crf: CrfParams, background_exponent: float, crf_backend: str
) -> Failure | None:
    """Refine one image; runs in a worker process, so errors come back as values."""
    try:
        pseudo = pseudo_label(
            read_image(sample.image),
            run.load_cams(sample.id),
            crf,
            background_exponent=background_exponent,
            backend=crf_backend,
        )
        run.save_pseudo(sample.id, pseudo)
    except ClipesError as error:
        return Failure(sample.id, str(error))
    return None
