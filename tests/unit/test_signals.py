"""A signal ends a command as a signal does, whatever the work it interrupts makes of it."""

from __future__ import annotations

import os
import signal

import pytest

from clipes.cli.signals import STOPPED, stopped_by_signals


@pytest.mark.parametrize("disguise", [None, ValueError, SystemError, RuntimeError])
def test_a_signal_is_told_from_what_it_causes(disguise: type[Exception] | None) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            if disguise is not None:  # as closing a zip file that is being written does
                raise disguise("cannot close")

    with pytest.raises(SystemExit) as stop, stopped_by_signals():
        work()
    assert stop.value.code == STOPPED + signal.SIGTERM


def test_an_error_without_a_signal_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="mine"), stopped_by_signals():
        raise ValueError("mine")
