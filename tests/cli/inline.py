"""The command line in this process: torch is imported once for all tests."""

from __future__ import annotations

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
