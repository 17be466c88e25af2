"""What every stage that goes through images has in common: shards, workers, resuming, failures.

No torch in here: the workers of ``clipes refine`` import this module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice

from joblib import Parallel, delayed, parallel_config

from clipes.errors import BackendError, ClipesError, UsageError
from clipes.types import Failure, Progress, Sample

BACKENDS = ("threading", "loky", "ray", "dask")
"""What images can be spread over: threads, processes of this machine, a Ray or Dask cluster."""

_IMAGES_PER_WORKER = 32  # joblib's Ray backend hands over results in bundles, not one by one


@dataclass(frozen=True)
class Summary:
    """How a stage went.

    Attributes:
        done: Images processed now.
        skipped: Images that were done before.
        failures: Images that could not be processed, with the reason.
    """

    done: int
    skipped: int
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th image from the ``index``-th (0-based) on.

    Attributes:
        index: 0 to count - 1.
        count: Number of shards.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``i/n`` with i from 0 to n - 1.

        Raises:
            UsageError: It is not of that form.
        """
        first, slash, second = text.partition("/")
        if slash and first.isdecimal() and second.isdecimal() and int(first) < int(second):
            return cls(int(first), int(second))
        raise UsageError(
            f"'{text}' is not a shard", "write i/n with i from 0 to n - 1, such as 0/4"
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Shard:
        """Return this process's part under torchrun or SLURM, else the whole.

        Args:
            environment: RANK and WORLD_SIZE, as torchrun sets them, or SLURM_PROCID and
                SLURM_NTASKS.

        Raises:
            UsageError: They are set, but make no shard.
        """
        for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if rank in environment and size in environment:
                return cls.parse(f"{environment[rank]}/{environment[size]}")
        return cls()

    def of(self, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        """Return this shard's samples."""
        return tuple(samples[self.index :: self.count])


def for_each(
    work: Callable[[Sample], None],
    samples: Sequence[Sample],
    *,
    is_done: Callable[[Sample], bool],
    backend: str,
    workers: int | None,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Do ``work`` for every sample that is not done yet, several at a time.

    Few images are under way at any time, so memory does not grow with their number.

    Args:
        work: Makes and saves the output of one image. Beyond threads it must be picklable.
        samples: The images.
        is_done: Whether the output of an image is there; asked again right before the work, as
            another process may have made it.
        backend: One of ``BACKENDS``. Ray and Dask use the cluster that RAY_ADDRESS or
            DASK_SCHEDULER_ADDRESS names, else one on this machine.
        workers: How many images at once; None for as many as the cluster holds (ray, dask) or this
            machine has cores.
        progress: Called after each image.
        report: Called with each image that cannot be processed; the others go on.

    Raises:
        BackendError: Ray or Dask is asked for and not installed, or cannot be reached.
    """
    todo = [sample for sample in samples if not is_done(sample)]
    failures = []
    progress(0, len(todo))
    attempt = partial(_attempt, work, is_done)
    for index, failure in enumerate(_spread(attempt, todo, backend, workers)):
        if failure is not None:
            failures.append(failure)
            report(failure)
        progress(index + 1, len(todo))
    return Summary(len(todo) - len(failures), len(samples) - len(todo), tuple(failures))


def _attempt(
    work: Callable[[Sample], None], is_done: Callable[[Sample], bool], sample: Sample
) -> Failure | None:
    """Do the work of one image; runs in a worker, so errors come back as values."""
    try:
        if not is_done(sample):
            work(sample)
    except ClipesError as error:
        return Failure(sample.id, str(error))
    return None


def _spread(
    attempt: Callable[[Sample], Failure | None],
    todo: Sequence[Sample],
    backend: str,
    workers: int | None,
) -> Iterator[Failure | None]:
    """Yield the outcome of each attempt, as they come in."""
    if not todo:
        return
    jobs: Iterable[object] = (delayed(attempt)(sample) for sample in todo)
    count = -1 if workers is None else min(workers, len(todo))
    if backend == "ray":
        bundle = _IMAGES_PER_WORKER * _join_ray()
        with parallel_config(backend="ray", n_jobs=count):
            jobs = iter(jobs)
            while outcomes := Parallel()(islice(jobs, bundle)):
                yield from outcomes
    elif backend == "dask":
        with _dask_client(), parallel_config(backend="dask", n_jobs=count):
            yield from Parallel(return_as="generator_unordered")(jobs)
    else:
        yield from Parallel(count, backend=backend, return_as="generator_unordered")(jobs)


def _join_ray() -> int:
    """Connect to a Ray cluster, or start one here; return its number of processors."""
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise BackendError("backend 'ray' needs Ray", "pip install 'clipes[ray]'") from error
    try:
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise BackendError(f"no Ray cluster: {error}", "look at RAY_ADDRESS") from error
    register_ray()
    return int(ray.cluster_resources().get("CPU", 1))


def _dask_client() -> AbstractContextManager[object]:
    try:
        from distributed import Client
    except ImportError as error:
        raise BackendError("backend 'dask' needs Dask", "pip install 'clipes[dask]'") from error
    try:
        client: AbstractContextManager[object] = Client()
    except (OSError, ValueError) as error:
        raise BackendError(f"no Dask cluster: {error}", "look at DASK_SCHEDULER_ADDRESS") from error
    return client
