"""The command line in processes of its own, without the seconds that importing torch takes.

A starter process imports everything once and forks for each command: what runs is ``clipes.cli``'s
``main`` with its own standard streams, exit code and signals, as after ``python -m clipes``.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Process:
    """A command that was started."""

    pid: int
    stdout: Path
    stderr: Path
    ask: Callable[..., Any]

    def kill(self, number: int, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)

    def ended(self) -> bool:
        return bool(self.ask(poll=self.pid))

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Return how it ended; the code of a signal is negative, as subprocess has it."""
        code = self.ask(wait=self.pid)
        out, err = (path.read_text(errors="replace") for path in (self.stdout, self.stderr))
        return subprocess.CompletedProcess([], code, out, err)


class Starter:
    """Starts commands in a folder."""

    def __init__(self, ask: Callable[..., Any], cwd: Path, environment: Mapping[str, str]) -> None:
        self._ask = ask
        self._cwd = cwd
        self._environment = dict(environment)
        self._count = 0

    def start(self, *arguments: object, **environment: str) -> Process:
        self._count += 1
        out, err = (self._cwd / f".command-{self._count}.{kind}" for kind in ("out", "err"))
        pid = self._ask(
            start=[str(argument) for argument in arguments],
            cwd=str(self._cwd),
            environment=self._environment | environment,
            streams=[str(out), str(err)],
        )
        return Process(pid, out, err, self._ask)

    def __call__(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.start(*arguments, **environment).wait()


@contextmanager
def forking() -> Iterator[Callable[..., Any]]:
    """Run the process that starts commands; yield what talks to it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.cli.forked"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:

        def ask(**question: object) -> Any:
            process.stdin.write(json.dumps(question) + "\n")
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def _serve() -> None:
    import numpy as np

    import clipes.cli
    import clipes.seg.weights
    import clipes.stages.cam
    import clipes.stages.evaluate
    import clipes.stages.refine
    import clipes.stages.setup
    import clipes.stages.tag
    import clipes.stages.train_seg  # noqa: F401
    from clipes.masks.crf import dense_crf

    dense_crf(np.full((2, 4, 4), 0.5, np.float32), np.zeros((4, 4, 3), np.uint8))  # compiled once
    ended: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            answer: object = _fork(question)
        elif "poll" in question:
            if question["poll"] not in ended:
                pid, status = os.waitpid(question["poll"], os.WNOHANG)
                if pid:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = question["poll"] in ended
        else:
            pid = question["wait"]
            if pid not in ended:
                ended[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer = ended[pid]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _fork(question: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.environ.clear()
    os.environ.update(question["environment"])
    os.chdir(question["cwd"])
    for number, path in enumerate(question["streams"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["clipes", *question["start"]]
    from clipes.cli import main

    code: object = 1
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:  # as the interpreter does
        traceback.print_exc()
    # All that the interpreter does at its end, but for taking torch apart.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    _serve()
