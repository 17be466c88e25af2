"""Ctrl-C, a scheduler, a shutdown: end where it is, and clean up on the way."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from clipes.errors import BackendError

STOPPING = (signal.SIGINT, signal.SIGTERM)
"""What ends a command."""

STOPPED = 128
"""As shells have it, the exit code is this and the signal's number."""


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let Ctrl-C, a scheduler or a shutdown end the block where it is, cleaning up on the way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        sys.unraisablehook = _pass_over  # what was cut short complains when it is forgotten
        raise SystemExit(STOPPED + number)

    # Who starts a process may let it ignore them, as shells do in the background.
    heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    # Compiled code may turn the SystemExit into a SystemError or a RuntimeError; worker processes
    # that were told to stop, too, are a BackendError; a zip file that is being written raises a
    # ValueError when it is closed on the way.
    except (SystemError, RuntimeError, ValueError, BackendError) as error:
        if not received:
            raise
        raise SystemExit(STOPPED + received[0]) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once() -> None:
    """Let Ctrl-C end the process without a word from now on: its work is done.

    Python still joins threads, and would show where it was when it was interrupted.
    """
    heeded = signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    if heeded and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _pass_over(_: object) -> None:
    """Say nothing of errors in destructors."""
