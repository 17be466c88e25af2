"""Claims between real processes, and what is removed of those that are gone."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from clipes.disk import claim as module
from clipes.disk.claim import claim, remove_leftovers, temporary_sibling
from clipes.errors import ArtifactError, WeightsError, WriteError
from clipes.weights.cache import workspace

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no advisory locks")

HOLD = """
import os, sys, time
from contextlib import ExitStack
from pathlib import Path
from clipes.disk.claim import claim, temporary_sibling
folder, shared = Path(sys.argv[1]), sys.argv[2] == "shared"
with claim(folder, "clipes test", shared=shared):
    temporary_sibling(folder / "x.npz").touch()
    fork = sys.argv[2] == "forked"
    if fork and not os.fork():
        print("held", flush=True)  # by its parent: where this runs, the fork has let go
        time.sleep(60)
    if not fork:
        print("held", flush=True)
    sys.stdin.readline()
"""

Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Start processes that claim a folder until a line is written to them."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path, kind: str = "exclusive") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, folder, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):  # where all of them are over
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()


@contextmanager
def refused(folder: Path) -> Iterator[None]:
    with pytest.raises(ArtifactError) as caught:
        yield
    assert str(caught.value) == (
        f"another 'clipes test' is working in {folder}; wait for it, or let every process do a "
        "part with --shard"
    )


def test_one_process_at_a_time(tmp_path: Path, hold: Hold) -> None:
    first = hold(tmp_path)
    with refused(tmp_path), claim(tmp_path, "clipes test"):
        pass
    with refused(tmp_path), claim(tmp_path, "clipes test", shared=True):
        pass
    first.stdin.write("go\n")
    first.stdin.flush()
    first.wait()
    with claim(tmp_path, "clipes test"):
        pass


def test_shards_share(tmp_path: Path, hold: Hold) -> None:
    hold(tmp_path, "shared")
    hold(tmp_path, "shared")
    with claim(tmp_path, "clipes test", shared=True):
        pass
    with refused(tmp_path), claim(tmp_path, "clipes test"):
        pass


@pytest.mark.parametrize("kind", ["exclusive", "shared", "forked"])
def test_a_killed_process_holds_nothing(tmp_path: Path, hold: Hold, kind: str) -> None:
    process = hold(tmp_path, kind)  # its fork, if it has one, lives on
    process.kill()
    process.wait()
    assert len(list(tmp_path.iterdir())) == 1
    with claim(tmp_path, "clipes test"):
        assert list(tmp_path.iterdir()) == []


def test_an_exception_ends_a_claim(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claim(tmp_path / "new", "clipes test"):
        raise KeyError
    with claim(tmp_path / "new", "clipes test"):
        assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_a_process_can_be_waited_for(tmp_path: Path, hold: Hold) -> None:
    process = hold(tmp_path)
    told: list[float] = []

    def on_wait() -> None:
        told.append(time.monotonic())
        process.stdin.write("go\n")
        process.stdin.flush()

    with claim(tmp_path, "clipes test", on_wait=on_wait):
        assert len(told) == 1
        process.wait(timeout=10)
    with claim(tmp_path, "clipes test", on_wait=on_wait):
        assert len(told) == 1


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(WriteError, match=r"cannot write to .*file.*; check its permissions"),
        claim(tmp_path / "file" / "below", "clipes test"),
    ):
        pass


def test_where_there_are_no_locks_nothing_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold
) -> None:
    hold(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "fcntl", None)  # as on Windows
        with claim(tmp_path, "clipes test"):
            pass

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    with claim(tmp_path, "clipes test"):
        pass


@pytest.fixture
def dead() -> int:
    """The number of a process that is over."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_what_is_left_over_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: int, hold: Hold
) -> None:
    host, mine = module._HOST, temporary_sibling(tmp_path / "mine.npz")
    day = 24 * 3600
    gone = {
        f".p1-{host}-{dead}-0123456789ab.npz": 0,
        f".p2-{host}-{dead}-0123456789ab": 0,
        f".p3-{host}-{os.getpid()}-0123456789ab.png": 0,  # an earlier process of this number
        f".p4-00000000-{os.getpid()}-0123456789ab.png": day + 60,
    }
    kept = {
        mine.name: 0,
        f".p5-{host}-{os.getppid()}-0123456789ab.npz": 30 * day,
        f".p6-00000000-{dead}-0123456789ab.png": day - 60,
        f".p7-{host}-99999999999999999999-0123456789ab.png": 0,
        ".hidden": 30 * day,
        f".p-{host}-{dead}-short.png": 30 * day,
        f"p8-{host}-{dead}-0123456789ab.npz": 30 * day,
        "p9.npz": 30 * day,
    }
    for name, age in (gone | kept).items():
        path = tmp_path / name
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    assert remove_leftovers(tmp_path) == len(gone)
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
    assert remove_leftovers(tmp_path / "absent") == 0

    busy = tmp_path / "busy"
    hold(busy)
    assert remove_leftovers(busy) == 0
    assert len(list(busy.iterdir())) == 1


def test_folders_go_too_and_what_cannot_go_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: int
) -> None:
    folder = tmp_path / f".fetch-{module._HOST}-{dead}-0123456789ab"
    target = tmp_path / "target"
    for path in (folder, target):
        path.mkdir()
        (path / "part").touch()
    link = tmp_path / f".link-{module._HOST}-{dead}-0123456789ab"
    link.symlink_to(target)
    assert remove_leftovers(tmp_path) == 2
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "part").exists()

    folder.mkdir()

    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr(module.shutil, "rmtree", refuse)
    assert remove_leftovers(tmp_path) == 0


FETCH = """
import sys
from pathlib import Path
from clipes.weights.cache import workspace
cache = Path(sys.argv[1])
with workspace(cache, lambda: print("waits", flush=True)) as work:
    if not (cache / "weights" / "file").exists():
        (work / "part").touch()
        print("works", flush=True)
        sys.stdin.readline()
        (work / "part").rename(cache / "weights" / "file")
print("ends", flush=True)
"""


def test_weights_are_fetched_once_and_a_killed_fetch_leaves_nothing(tmp_path: Path) -> None:
    def next_lines(*processes: subprocess.Popen[str]) -> list[str]:
        return [process.stdout.readline().strip() for process in processes]

    with ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", FETCH, tmp_path]
        three = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(3)]
        for process in three:
            stack.callback(process.kill)
        said = next_lines(*three)
        assert sorted(said) == ["waits", "waits", "works"]
        killed = three.pop(said.index("works"))
        killed.kill()
        killed.wait()
        ready, _, _ = select.select([process.stdout for process in three], [], [], 60)
        first, second = sorted(three, key=lambda process: process.stdout not in ready)
        assert next_lines(first) == ["works"]
        first.stdin.write("go\n")
        first.stdin.flush()
        assert next_lines(first, second) == ["ends", "ends"]
    # Whoever comes next removes what the killed one left.
    with workspace(tmp_path) as work:
        assert {path.name for path in work.parent.iterdir()} == {"file", work.name}


def test_an_error_leaves_no_workspace(tmp_path: Path) -> None:
    def fail() -> None:
        with workspace(tmp_path) as work:
            (work / "part").touch()
            raise WeightsError("no network")

    with pytest.raises(WeightsError, match="no network"):
        fail()
    assert list((tmp_path / "weights").iterdir()) == []
