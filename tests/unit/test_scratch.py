"""What is kept for later comes back as it was, as far as there is room, and leaves nothing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest

from clipes.disk.scratch import Scratch

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs files without a name, limits")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Callable[[int], Scratch]]:
    with ExitStack() as stack:

        def make(limit: int) -> Scratch:
            return stack.enter_context(closing(Scratch(tmp_path, limit)))

        yield make


def arrays(seed: int, count: int = 100) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "half": rng.random((count, 3)).astype(np.float16),
        "turned": rng.random((4, 5), dtype=np.float32).T,
        "sliced": rng.integers(0, 99, (6, 6))[::2, 1::2],
        "none": np.zeros((0, 4), np.float32),
        "one": np.array(7.5),
    }


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        np.testing.assert_array_equal(got[name], array)


def test_what_is_kept_comes_back_as_it_was(scratch):
    kept = scratch(1 << 20)
    for key in ("a", 2, "c"):
        assert key not in kept
        assert kept.keep(key, arrays(len(str(key)) + ord(str(key)[0])))
    for key in ("c", "a", 2, "a"):
        assert key in kept
        assert_same(kept.read(key), arrays(1 + ord(str(key)[0])))
    with pytest.raises(KeyError):
        kept.read("b")
    kept.close()
    assert "a" not in kept


def test_it_keeps_as_much_as_it_may(scratch):
    kept = scratch(1000)
    assert kept.keep("a", {"x": np.ones(600, np.uint8)})
    assert not kept.keep("b", {"x": np.ones(300, np.uint8), "y": np.ones(101, np.uint8)})
    assert "b" not in kept
    assert kept.keep("c", {"x": np.full(400, 3, np.uint8)})
    assert not kept.keep("d", {"x": np.ones(1, np.uint8)})
    assert_same(kept.read("a"), {"x": np.ones(600, np.uint8)})
    assert_same(kept.read("c"), {"x": np.full(400, 3, np.uint8)})


def test_it_takes_a_quarter_of_the_free_disk_at_most(scratch, monkeypatch):
    disk = SimpleNamespace(free=4000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    kept = scratch(1 << 20)
    assert not kept.keep("a", {"x": np.ones(1001, np.uint8)})
    assert kept.keep("a", {"x": np.ones(1000, np.uint8)})


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@linux
@pytest.mark.parametrize("size", [5000, 5100, 7000])
def test_a_full_disk_ends_keeping_and_loses_nothing(size, scratch):
    """The system takes no more than ``size`` bytes: nothing, a part, or the first array of two."""
    kept, first = scratch(1 << 20), {"x": np.arange(5000).astype(np.uint8)}
    assert kept.keep("first", first)
    with files_end_at(size):
        assert not kept.keep("b", {"x": np.ones(2000, np.uint8), "y": np.ones(2000, np.uint8)})
        assert "b" not in kept
        assert_same(kept.read("first"), first)
    assert not kept.keep("c", {"x": np.ones(1, np.uint8)})  # it does not try again
    assert_same(kept.read("first"), first)


@linux
def test_nothing_is_seen_in_the_folder(scratch, tmp_path):
    kept = scratch(1 << 20)
    kept.keep("a", arrays(0))
    assert list(tmp_path.iterdir()) == []
    kept.close()
    assert list(tmp_path.iterdir()) == []


def test_several_threads_keep_and_read(scratch):
    kept, wrong = scratch(1 << 24), []

    def work(start: int) -> None:
        for key in range(start, 40, 4):
            kept.keep(key, arrays(key))
            try:
                assert_same(kept.read(key), arrays(key))
            except AssertionError as error:
                wrong.append(error)

    threads = [Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for key in range(40):
        assert_same(kept.read(key), arrays(key))
