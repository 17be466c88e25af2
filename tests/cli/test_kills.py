"""Killed at random moments and started again, every stage ends with what an unbroken run makes.

Each stage is killed, started again on the same folder, killed again, and so on, with SIGKILL,
SIGTERM and SIGINT, to one process or to its whole group as a terminal and a scheduler do it. After
every kill all that is visible can be read; at the end there are the same files with the same bytes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipes.run.folder import Run
from tests.cli.forked import Process, Starter
from tests.cli.small_data import cam, train, write_photos, write_refined

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="no such signals"),
    pytest.mark.slow,
]

IMAGES = 36
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {143, -signal.SIGTERM},
    signal.SIGINT: {130, -signal.SIGINT},
}


@pytest.fixture(autouse=True)
def _photos(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", IMAGES)


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a run but the logs; of run.json what does not change from run to run."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_file() and not name.startswith(("tensorboard", "training.csv")):
            found[name] = path.read_bytes()
    manifest = json.loads(found.pop("run.json"))
    for stage in manifest["stages"].values():
        del stage["facts"], stage["command"]
    return found | {"run.json": json.dumps(manifest).encode()}


def look(root: Path) -> None:
    """Read every visible output."""
    run = Run(root)
    for path in root.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".npz" and path.parent.name == "cams":
            run.load_cams(path.stem)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                assert np.asarray(image).size
        elif path.suffix == ".pt":
            assert torch.load(path, weights_only=True)["weights"]
        elif path.suffix == ".json":
            json.loads(path.read_text())


def count(folder: Path) -> int:
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def kill_at_some_moment(process: Process, folder: Path, rng: random.Random) -> bool:
    """Kill once a few files more are there and a few milliseconds are over."""
    there, wanted = count(folder), rng.randrange(5)
    deadline = time.monotonic() + 60
    while count(folder) < there + wanted and time.monotonic() < deadline:
        if process.ended():
            return False
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.7 if wanted == 0 else 0.03))
    number, group = rng.choice(SIGNALS), rng.random() < 0.5
    if process.ended():
        return False
    process.kill(number, group=group)
    done = process.wait()
    if done.returncode == 0:  # it was about to end
        return False
    assert done.returncode in CODES[number], (number, done)
    told = [line for line in done.stderr.splitlines() if line.startswith("clipes: ")]
    if done.returncode > 0:
        assert told == ["clipes: stopped; the same command continues where it was"], done.stderr
    assert "Traceback" not in done.stderr
    return True


def kill_again_and_again(
    start: Starter,
    command: Callable[[str], list[str]],
    folder: str,
    kills: int,
    seed: int,
    prepare: Callable[[str], None],
    unbroken: Path,
) -> None:
    rng, cwd = random.Random(seed), unbroken.parent
    killed = chain = 0
    while killed < kills:
        chain += 1
        assert chain <= 2 * kills, "it is always over before it can be killed"
        out = f"chain{chain}"
        prepare(out)
        for _ in range(6):
            if killed == kills:
                break
            process = start.start(*command(out))
            if not kill_at_some_moment(process, cwd / out / folder, rng):
                break
            killed += 1
            look(cwd / out)
        done = start(*command(out))
        assert done.returncode == 0, done.stderr
        found = contents(cwd / out)
        assert not [name for name in found if "/." in name or name.startswith(".")]
        expected = contents(unbroken)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
        look(cwd / out)
        shutil.rmtree(cwd / out)


def test_cam(start: Starter, tmp_path: Path) -> None:
    assert start(*cam("whole")).returncode == 0
    assert len(Run(tmp_path / "whole").ids("cams")) == IMAGES
    kill_again_and_again(start, cam, "cams", 15, 1, lambda _: None, tmp_path / "whole")


@pytest.mark.parametrize(("workers", "kills"), [(1, 15), (2, 10)])
def test_refine(start: Starter, tmp_path: Path, workers: int, kills: int) -> None:
    assert start(*cam("maps")).returncode == 0

    def refine(out: str) -> list[str]:
        return ["refine", out, "--workers", str(workers)]

    def prepare(out: str) -> None:
        shutil.copytree(tmp_path / "maps", tmp_path / out)

    prepare("whole")
    assert start(*refine("whole")).returncode == 0
    kill_again_and_again(start, refine, "pseudo", kills, 2, prepare, tmp_path / "whole")


def refining(start: Starter, folder: Path) -> Process:
    """Return a ``refine`` with two workers that has made some of its masks."""
    process = start.start("refine", "maps", "--workers", "2")
    deadline = time.monotonic() + 60
    while count(folder / "maps" / "pseudo") < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    return process


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_with_a_killed_parent(start: Starter, tmp_path: Path) -> None:
    assert start(*cam("maps")).returncode == 0
    process = refining(start, tmp_path)
    assert len(session(process.pid)) >= 3
    process.kill(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert session(process.pid) == []


def test_a_killed_worker_is_one_line(start: Starter, tmp_path: Path) -> None:
    assert start(*cam("maps")).returncode == 0
    for _ in range(10):
        process = refining(start, tmp_path)
        for pid in session(process.pid):
            if "popen_loky" in (Path("/proc") / str(pid) / "cmdline").read_text():
                os.kill(pid, signal.SIGKILL)
                break
        done = process.wait()
        if done.returncode:
            break
        shutil.rmtree(tmp_path / "maps" / "pseudo")  # it was about to end: once more
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "clipes: a worker process was killed, mostly a sign of too little memory" in done.stderr
    assert start("refine", "maps").returncode == 0
    assert len(Run(tmp_path / "maps").ids("pseudo")) == IMAGES


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_interpreter_ends_quietly_too(start: Starter, tmp_path: Path, number: int) -> None:
    """As ``python -m clipes``: with what Python does at its end while threads are at work."""
    for attempt in range(5):  # on a busy machine all may be done before the signal arrives
        command = [sys.executable, "-m", "clipes", *cam(f"run{attempt}"), "--workers", "2"]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that a shell runs in the background inherit a SIGINT that is ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 120
        while count(tmp_path / f"run{attempt}" / "cams") < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        if process.returncode != 0:
            break
    assert process.returncode == 128 + number
    assert stderr.splitlines()[-1] == "clipes: stopped; the same command continues where it was"
    assert "Traceback" not in stderr


def session(leader: int) -> list[int]:
    """Return the processes that a command started, itself included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold spaces.
            state, _, _, sid = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(sid) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_train_seg(start: Starter, tmp_path: Path) -> None:
    write_refined(tmp_path / "maps", tmp_path / "few", 6)
    turn = itertools.count()

    def command(out: str) -> list[str]:
        workers = str(next(turn) % 2)  # with a thread that loads every other time
        return [*train("maps", out), "--workers", workers]

    assert start(*command("whole")).returncode == 0
    kill_again_and_again(start, command, "checkpoints", 10, 3, lambda _: None, tmp_path / "whole")
