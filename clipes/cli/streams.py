"""Standard streams that take any character, and say in one line why they take no more."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar, cast

from clipes.errors import WriteError

_T = TypeVar("_T")


@contextmanager
def robust_streams() -> Iterator[None]:
    """Let no name in another script, no full disk and no closed stream end in a traceback.

    Raises:
        WriteError: Standard output cannot be written.
        SystemExit: Who reads it has seen enough.
    """
    before = sys.stdout, sys.stderr
    # The shell's ">&-" leaves a program without the stream.
    output, sys.stderr = before[0] or _nowhere(), before[1] or _nowhere()
    for stream in (output, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = cast(TextIO, _Output(output))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Output:
    """Standard output, whose errors are told from those of other files.

    Args:
        stream: What takes the text.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the stream has)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        # Libraries write nothing to learn the kind of a stream, and pass over what they are told.
        return 0 if text == "" else self._tried(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except OSError as error:
            # Lest the interpreter tries again at its end, and complains at length.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if error.errno == errno.EPIPE:  # a reader such as head has seen enough
                raise SystemExit(1) from None
            raise WriteError(
                f"cannot write to standard output: {error.strerror}",
                "make room, or send it elsewhere",
            ) from error


def _nowhere() -> TextIO:
    return io.TextIOWrapper(io.FileIO(os.devnull, "w"), encoding="utf-8")
