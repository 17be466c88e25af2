"""The command line in this process: torch is imported once for all tests."""

from __future__ import annotations

import subprocess

import pytest

from clipes.cli import main


def exit_code(*arguments: object) -> int:
    """Run a command; return what it exits with."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def ends(code: int, *arguments: object) -> None:
    """Run a command that exits with ``code``."""
    assert exit_code(*arguments) == code


def one_line(said: str) -> str:
    """Return the one line that a command says of its end."""
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    lines = [line for line in said.splitlines() if line.startswith("clipes: ")]
    assert len(lines) == 1, said
    return lines[0]


def failed(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """Return that line of a process that ended with ``code``."""
    assert done.returncode == code, done.stderr
    return one_line(done.stderr)
