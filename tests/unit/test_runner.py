"""Work on many images: every one once, failures told, whatever it is spread over."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import pytest

from clipes.errors import BackendError, ImageError, WriteError
from clipes.run.loop import for_each, for_each_batch, in_order, never, part_of, waiting
from clipes.types import Sample
from tests.heard import Heard


def samples(count: int) -> list[Sample]:
    return [Sample(f"{number:03}", Path("x.jpg"), (0,), None) for number in range(count)]


def touch(folder: Path, sample: Sample) -> None:
    if sample.id.endswith("3"):
        raise ImageError(f"{sample.id} is broken")
    with (folder / sample.id).open("a") as file:
        file.write("made\n")


def there(folder: Path, sample: Sample) -> bool:
    return (folder / sample.id).exists()


def run(folder: Path, count: int, backend: str, workers: int | None = 2):
    seen, told = [], []
    summary = for_each(
        partial(touch, folder),
        samples(count),
        is_done=partial(there, folder),
        backend=backend,
        workers=workers,
        progress=lambda done, total: seen.append((done, total)),
        report=told.append,
    )
    return summary, seen, told


@pytest.mark.parametrize("backend", ["threading", "loky"])
@pytest.mark.parametrize("workers", [1, 3])
def test_each_image_is_done_once_and_failures_are_told(backend, workers, tmp_path):
    (tmp_path / "005").write_text("made\n")
    summary, seen, told = run(tmp_path, 25, backend, workers)
    assert (summary.done, summary.skipped) == (21, 1)
    assert sorted(failure.id for failure in told) == ["003", "013", "023"]
    assert list(summary.failures) == told
    assert told[0].reason.endswith("is broken")
    assert seen == [(done, 24) for done in range(25)]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"made\n"}
    again, seen, _ = run(tmp_path, 25, backend, workers)
    assert (again.done, again.skipped, len(seen)) == (0, 22, 4)


def full_disk(folder: Path, sample: Sample) -> str:
    if sample.id >= "004":
        (folder / f"tried-{sample.id}").touch()
        raise WriteError(f"cannot write {sample.id}", "make room")
    (folder / sample.id).touch()
    return "are small"


@pytest.mark.parametrize(("backend", "workers"), [("threading", 1), ("threading", 3), ("loky", 2)])
def test_what_cannot_be_written_ends_the_run(backend, workers, tmp_path):
    told = []
    arguments = {"backend": backend, "workers": workers, "progress": lambda *_: None}
    arguments |= {"is_done": partial(there, tmp_path), "report": told.append}
    with pytest.raises(WriteError, match=r"cannot write \d+; make room"):
        for_each(partial(full_disk, tmp_path), samples(900), **arguments)
    assert told == []
    made = [path for path in tmp_path.iterdir() if path.name < "004"]
    assert len(made) > 4 - workers  # the others may not have begun with their first image
    assert len(list(tmp_path.glob("tried-*"))) < 700  # those that were under way
    for path in tmp_path.iterdir():
        path.unlink()
    summary = for_each(partial(full_disk, tmp_path), samples(4), **arguments)
    assert (summary.done, summary.remarks) == (4, {"are small": 4})


def test_nothing_to_do_starts_nothing(tmp_path):
    summary, seen, _ = run(tmp_path, 0, "ray")
    assert (summary.done, summary.skipped, seen) == (0, 0, [(0, 0)])


def test_what_another_process_made_meanwhile_is_left_alone(tmp_path):
    def make_all(sample: Sample) -> None:
        for other in samples(5):
            (tmp_path / other.id).write_text("made\n")
        made.append(sample.id)

    made: list[str] = []
    for_each(
        make_all,
        samples(5),
        is_done=partial(there, tmp_path),
        backend="threading",
        workers=1,
        progress=lambda *_: None,
        report=lambda _: None,
    )
    assert made == ["000"]


@pytest.mark.parametrize(("backend", "module"), [("ray", "ray"), ("dask", "distributed")])
def test_a_missing_cluster_library_is_one_line(backend, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=rf"needs .*; pip install 'clipes\[{backend}\]'"):
        run(tmp_path, 2, backend)


@pytest.mark.parametrize("workers", [1, 4, None])
def test_results_come_in_order_and_so_does_the_first_error(workers):
    def work(number: int) -> int:
        time.sleep(0.01 * (number % 3))  # the third is done after the fourth
        if number in (17, 19):
            raise ImageError(f"{number} is broken")
        return number**2

    seen, found = [], []
    arguments = {"workers": workers, "progress": lambda done, total: seen.append((done, total))}
    assert list(in_order(work, range(17), **arguments)) == [number**2 for number in range(17)]
    assert seen == [(done, 17) for done in range(18)]
    with pytest.raises(ImageError, match="17 is broken"):
        found.extend(in_order(work, range(40), **arguments))
    assert seen[-1] == (17, 40)


def test_what_waits_is_looked_for_and_followed():
    heard = Heard()
    found = waiting(samples(5), lambda sample: sample.id in ("001", "004"), heard.listener)
    assert [sample.id for sample in found] == ["000", "002", "003"]
    assert heard.steps["look"][-1] == (5, 5)


def test_a_part_is_followed_as_a_part_of_the_whole():
    seen = []
    part_of(lambda *step: seen.append(step), 30, 100)(7, 20)
    assert seen == [(37, 100)]


def test_a_batch_of_which_nothing_can_be_read_is_not_computed(tmp_path):
    def read(sample: Sample) -> int:
        raise ImageError(f"{sample.id} is broken")

    told = []
    summary = for_each_batch(
        read,
        lambda inputs: pytest.fail(f"computed on {inputs}"),
        lambda sample, made: None,
        samples(5),
        size=2,
        is_done=never,
        workers=1,
        progress=lambda *_: None,
        report=told.append,
    )
    assert (summary.done, len(told)) == (0, 5)


def run_batches(folder: Path, read, compute, save, count: int, *, workers: int = 2, **how):
    how |= {"is_done": partial(there, folder), "workers": workers, "progress": lambda *_: None}
    return for_each_batch(read, compute, save, samples(count), **how)


@pytest.mark.parametrize("size", [1, 4, 50])
def test_a_batch_is_computed_together_and_read_and_saved_alone(size, tmp_path):
    batches, told = [], []

    def read(sample: Sample) -> int:
        if sample.id == "003":
            raise ImageError("cannot be read")
        return int(sample.id)

    def compute(numbers: list[int]) -> list[int]:
        batches.append(len(numbers))
        return [number * number for number in numbers]

    def save(sample: Sample, square: int) -> str | None:
        if sample.id == "005":
            raise ImageError("cannot be saved")
        (tmp_path / sample.id).write_text(str(square))
        return "are even" if square % 2 == 0 else None

    (tmp_path / "007").write_text("there before")
    summary = run_batches(tmp_path, read, compute, save, 10, size=size, report=told.append)
    assert (summary.done, summary.skipped, summary.remarks) == (7, 1, {"are even": 5})
    assert [failure.id for failure in sorted(told, key=lambda one: one.id)] == ["003", "005"]
    assert sum(batches) == 8
    assert max(batches) == min(size, 8)
    assert (tmp_path / "009").read_text() == "81"
    assert (tmp_path / "007").read_text() == "there before"


def test_what_cannot_be_computed_does_not_hinder_its_batch(tmp_path):
    told, batches = [], []

    def compute(numbers: list[int]) -> list[int]:
        batches.append(len(numbers))
        if 6 in numbers:
            raise BackendError("too large")
        return numbers

    def save(sample: Sample, _: int) -> None:
        (tmp_path / sample.id).touch()

    summary = run_batches(
        tmp_path,
        lambda sample: int(sample.id),
        compute,
        save,
        8,
        size=4,
        workers=1,
        report=told.append,
    )
    assert summary.done == 7
    assert [(failure.id, failure.reason) for failure in told] == [("006", "too large")]
    assert batches == [4, 4, 1, 1, 1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {one.id for one in samples(8)} - {"006"}


def test_a_batch_that_cannot_be_written_ends_the_run(tmp_path):
    def save(sample: Sample, _: int) -> None:
        (tmp_path / sample.id).touch()
        raise WriteError(f"cannot write {sample.id}", "make room")

    with pytest.raises(WriteError, match=r"cannot write \d+; make room"):
        run_batches(tmp_path, lambda sample: 0, list, save, 900, size=5, report=lambda _: None)
    assert len(list(tmp_path.iterdir())) < 700
