"""What every stage that goes through images has in common: shards, workers, resuming, failures.

No torch in here: the workers of ``clipes refine`` import this module.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import TypeAlias, TypeVar, cast

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError

from clipes.errors import BackendError, ClipesError, UsageError, WriteError
from clipes.listener import Listener
from clipes.processes import rank_and_count
from clipes.types import Failure, Progress, Sample

Work: TypeAlias = Callable[[Sample], "str | None"]
"""Makes and saves the output of one image; returns a remark on it, or None."""

_Outcome: TypeAlias = "Failure | WriteError | str | None"
_Attempt: TypeAlias = Callable[[Sequence[Sample]], "list[_Outcome]"]

_Key = TypeVar("_Key")
_Input = TypeVar("_Input")
_Output = TypeVar("_Output")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_IMAGES_PER_WORKER = 32  # joblib's Ray backend hands over results in bundles, not one by one
_SECONDS_BETWEEN_LOOKS = 0.5  # of a worker at its parent


@dataclass(frozen=True)
class Summary:
    """How a stage went.

    Attributes:
        done: Images processed now.
        skipped: Images that were done before.
        failures: Images that could not be processed, with the reason.
        remarks: What is worth knowing about images processed now, and of how many it holds.
    """

    done: int
    skipped: int
    failures: tuple[Failure, ...]
    remarks: Mapping[str, int] = field(default_factory=dict)

    def told(self) -> list[str]:
        """Return the remarks, a line each."""
        return [f"{count} of {self.done} images {remark}" for remark, count in self.remarks.items()]

    def counts(self, verb: str = "made", unusable: int = 0) -> str:
        """Return how many images there are of each kind.

        Args:
            verb: What was done to those processed now.
            unusable: How many failed before they could be worked on.
        """
        failed = len(self.failures) + unusable
        return f"{self.done} {verb}, {self.skipped} there before, {failed} failed"


@dataclass(frozen=True)
class Outcome:
    """How a stage went over a data set.

    Attributes:
        summary: Of the images that could be worked on.
        unusable: Images that the data set lacks something of.
    """

    summary: Summary
    unusable: Sequence[Failure]


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
            environment: RANK and WORLD_SIZE, as torchrun sets them, or SLURM_PROCID,
                SLURM_NTASKS and SLURM_STEP_ID, as srun does.

        Raises:
            UsageError: They are set, but make no shard.
        """
        place = rank_and_count(environment)
        return cls() if place is None else cls.parse("/".join(place))

    def of(self, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        """Return this shard's samples."""
        return tuple(samples[self.index :: self.count])


def never(_sample: Sample) -> bool:
    """Tell that an image is not done: those that are were sorted out before."""
    return False


def say_made_again(masks: Sequence[tuple[str, str]], listener: Listener) -> None:
    """Say how many masks that are there are made again, each an id and the reason, if any are."""
    if masks:
        id_, reason = masks[0]
        listener.say(f"made again: {len(masks)} masks, the first is {id_}: {reason}")


def waiting(
    samples: Sequence[Sample], is_done: Callable[[Sample], bool], listener: Listener
) -> list[Sample]:
    """Return the samples that are not done, in order; to look at what was made takes its time."""
    found = []
    with listener.progress("look") as progress:
        for index, sample in enumerate(samples):
            if not is_done(sample):
                found.append(sample)
            progress(index + 1, len(samples))
    return found


def part_of(progress: Progress, before: int, total: int) -> Progress:
    """Return what follows a part of the work whose ``before`` images are done, of ``total``."""
    return lambda done, _: progress(before + done, total)


def in_order(
    work: Callable[[_Item], _Result],
    items: Sequence[_Item],
    *,
    workers: int | None = 1,
    progress: Progress,
) -> Generator[_Result, None, None]:
    """Yield what work returns for each item, in order; an error is raised when its turn comes.

    Work that is to go on after a failure returns it as a value. It is done in threads: decoding,
    encoding and most of the counting are compiled code that does not hold the others up; two
    threads are as fast as two processes, and need neither a start nor a second memory.

    Args:
        work: Returns the result of one item.
        items: Images, or groups of them.
        workers: How many at once; None for as many as there are cores.
        progress: Called as ``(done, number of items)``, after what was yielded was made use of.

    Raises:
        ClipesError: Work on an item raised it; what came before was yielded.
    """
    progress(0, len(items))
    count = -1 if workers is None else workers
    results = Parallel(count, backend="threading", return_as="generator")(
        delayed(_tried)(work, item) for item in items
    )
    with _closing(results) as arriving:
        for done, (result, error) in enumerate(arriving, start=1):
            if error is not None:
                raise error
            yield cast(_Result, result)
            progress(done, len(items))


def _tried(
    work: Callable[[_Item], _Result], item: _Item
) -> tuple[_Result | None, ClipesError | None]:
    try:
        return work(item), None
    except ClipesError as error:
        return None, error


def for_each(
    work: Work,
    samples: Sequence[Sample],
    *,
    is_done: Callable[[Sample], bool] = never,
    backend: str = "threading",
    workers: int | None = 1,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Do ``work`` for every sample that is not done yet, several at a time.

    Few images are under way at any time, so memory does not grow with their number.

    Args:
        work: What is to be done. Beyond threads it must be picklable.
        samples: The images.
        is_done: Whether the output of an image is there; asked again right before the work, as
            another process may have made it.
        backend: One of ``clipes.choices.RefineBackend``. Ray and Dask use the cluster that
            RAY_ADDRESS or DASK_SCHEDULER_ADDRESS names, else one on this machine.
        workers: How many images at once; None for as many as the cluster holds (ray, dask) or this
            machine has cores.
        progress: Called after each image.
        report: Called with each image that cannot be processed; the others go on.

    Raises:
        BackendError: Ray or Dask is asked for and not installed, or cannot be reached; or a worker
            process was killed.
        WriteError: An output cannot be written. No other could be, so the rest is not tried.
    """
    todo = [sample for sample in samples if not is_done(sample)]
    attempt = partial(_attempt, work, is_done)
    outcomes = _spread(attempt, in_groups(todo, 1), backend, workers)
    return _counted(outcomes, len(todo), len(samples) - len(todo), progress, report)


def for_each_batch(
    read: Callable[[Sample], _Input],
    compute: Callable[[Sequence[_Input]], Sequence[_Output]],
    save: Callable[[Sample, _Output], str | None],
    samples: Sequence[Sample],
    *,
    size: int,
    is_done: Callable[[Sample], bool],
    workers: int,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Read and save every image alone, but compute on several together, for a GPU's sake.

    An image that cannot be read, computed on or saved does not hinder the others of its batch.
    Everything runs in threads.

    Args:
        read: Returns what is computed on.
        compute: Returns one result for each.
        save: Takes a result; returns a remark on the image, or None.
        samples: The images.
        size: How many images are computed on together; the last batch may be smaller.
        is_done: As for ``for_each``.
        workers: How many batches are under way at once.
        progress: As for ``for_each``.
        report: As for ``for_each``.

    Raises:
        WriteError: As ``for_each``.
    """
    todo = [sample for sample in samples if not is_done(sample)]
    attempt = partial(_attempt_batch, read, compute, save, is_done)
    outcomes = _spread(attempt, in_groups(todo, size), "threading", workers)
    return _counted(outcomes, len(todo), len(samples) - len(todo), progress, report)


def in_groups(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """Return the samples in groups of ``size``, in order; the last may be smaller."""
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def _counted(
    groups: Generator[list[_Outcome], None, None],
    todo: int,
    skipped: int,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Go through outcomes as they come in, tell of them, and count them."""
    failures = []
    remarks: Counter[str] = Counter()
    progress(0, todo)
    with _closing(groups) as arriving:
        for index, outcome in enumerate(chain.from_iterable(arriving)):
            if isinstance(outcome, WriteError):
                raise outcome
            if isinstance(outcome, Failure):
                failures.append(outcome)
                report(outcome)
            elif outcome is not None:
                remarks[outcome] += 1
            progress(index + 1, todo)
    return Summary(todo - len(failures), skipped, tuple(failures), remarks)


@contextmanager
def _closing(
    results: Generator[_Result, None, None],
) -> Iterator[Iterable[_Result]]:
    """Close a generator of results without joblib's warning that some are not used."""
    try:
        yield results
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            results.close()


def _attempt(
    work: Work, is_done: Callable[[Sample], bool], group: Sequence[Sample]
) -> list[_Outcome]:
    """Do the work of some images; runs in a worker."""
    return [None if is_done(sample) else _outcome(work, sample) for sample in group]


def _attempt_batch(
    read: Callable[[Sample], _Input],
    compute: Callable[[Sequence[_Input]], Sequence[_Output]],
    save: Callable[[Sample, _Output], str | None],
    is_done: Callable[[Sample], bool],
    group: Sequence[Sample],
) -> list[_Outcome]:
    """Do the work of a batch; as ``_attempt``."""
    inputs: dict[Sample, _Input] = {}

    def take(sample: Sample) -> None:
        if not is_done(sample):
            inputs[sample] = read(sample)

    outcomes = {sample: _outcome(take, sample) for sample in group}
    results, errors = compute_together(compute, inputs)
    for sample, error in errors.items():
        outcomes[sample] = Failure(sample.id, str(error))
    for sample in results:
        outcomes[sample] = _outcome(lambda sample: save(sample, results[sample]), sample)
    return list(outcomes.values())


def compute_together(
    compute: Callable[[Sequence[_Input]], Sequence[_Output]], inputs: Mapping[_Key, _Input]
) -> tuple[dict[_Key, _Output], dict[_Key, ClipesError]]:
    """Compute on several inputs together, and if that fails, on each alone.

    Returns:
        The results, and the errors of inputs that have none.
    """
    if not inputs:
        return {}, {}
    try:
        return dict(zip(inputs, compute(list(inputs.values())), strict=True)), {}
    except ClipesError as error:
        if len(inputs) == 1:
            return {}, dict.fromkeys(inputs, error)
    results: dict[_Key, _Output] = {}
    errors: dict[_Key, ClipesError] = {}
    for key, one in inputs.items():
        result, error_of_one = compute_together(compute, {key: one})
        results |= result
        errors |= error_of_one
    return results, errors


def _outcome(work: Work, sample: Sample) -> _Outcome:
    """Do work on an image; errors come back as values, which other processes can hand over."""
    try:
        return work(sample)
    except WriteError as error:
        return error
    except ClipesError as error:
        return Failure(sample.id, str(error))


def _spread(
    attempt: _Attempt,
    todo: Sequence[Sequence[Sample]],
    backend: str,
    workers: int | None,
) -> Generator[list[_Outcome], None, None]:
    """Yield the outcomes of each attempt on a group, as they come in."""
    if not todo:
        return
    jobs: Iterable[object] = (delayed(attempt)(group) for group in todo)
    count = -1 if workers is None else min(workers, len(todo))
    if backend == "ray":
        with _ray_cluster() as cores, parallel_config(backend="ray", n_jobs=count):
            jobs = iter(jobs)
            while outcomes := Parallel()(islice(jobs, _IMAGES_PER_WORKER * cores)):
                yield from outcomes
    elif backend == "dask":
        with _dask_client(), parallel_config(backend="dask", n_jobs=count):
            yield from Parallel(return_as="generator_unordered")(jobs)
    elif backend == "loky":
        start = {"initializer": _follow, "initargs": (os.getpid(),)}
        try:
            yield from Parallel(count, backend, return_as="generator_unordered", **start)(jobs)
        except TerminatedWorkerError as error:
            raise BackendError(
                "a worker process was killed, mostly a sign of too little memory",
                "run the same command again, it continues; --workers says how many there are",
            ) from error
    else:
        yield from Parallel(count, backend=backend, return_as="generator_unordered")(jobs)


def _follow(parent: int) -> None:
    """Let this worker process end when its parent does, and not before.

    Signals that a terminal or a scheduler sends to all processes are the parent's to answer. A
    parent that is killed cannot tell its workers; they notice.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _ray_cluster() -> Iterator[int]:
    """Connect to a Ray cluster, or start one here; yield its number of processors."""
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise BackendError("backend 'ray' needs Ray", "pip install 'clipes[ray]'") from error
    with redirect_stdout(sys.stderr):  # where Ray says what its workers do
        try:
            ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise BackendError(f"no Ray cluster: {error}", "look at RAY_ADDRESS") from error
        try:
            register_ray()
            yield int(ray.cluster_resources().get("CPU", 1))
        finally:
            ray.shutdown()


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
