"""Files of intermediate results that nobody sees and nobody has to clean up."""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from clipes.disk.files import room_on_disk
from clipes.errors import WriteError

_Place: TypeAlias = tuple[int, str, tuple[int, ...]]


class Scratch:
    """Keeps arrays on disk as long as this process lives, as many as there is room for.

    The file has no name where the system allows that, so that it is gone with the process, however
    that ends. What was written lately is in the system's memory anyway.

    Args:
        folder: Where there is room; None for what the system takes for such files.
        limit: Most bytes.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        # Without a buffer: what a full disk did not take would be written again with each `seek`.
        self._file: Any = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115
        self._room = room_on_disk(folder or Path(tempfile.gettempdir()), limit)
        self._kept: dict[Hashable, dict[str, _Place]] = {}
        self._end = 0
        self._lock = Lock()

    def __contains__(self, key: Hashable) -> bool:
        """Tell whether something was kept under ``key``."""
        return key in self._kept

    def keep(self, key: Hashable, arrays: Mapping[str, npt.NDArray[Any]]) -> bool:
        """Keep arrays under a new key if there is room, and tell whether there was."""
        size = sum(array.nbytes for array in arrays.values())
        with self._lock:
            if size > self._room:
                return False
            places: dict[str, _Place] = {}
            self._file.seek(self._end)
            start = self._end
            try:
                for name, array in arrays.items():
                    places[name] = (start, array.dtype.str, array.shape)
                    if self._file.write(np.ascontiguousarray(array).data) != array.nbytes:
                        raise OSError("the disk took a part of it")
                    start += array.nbytes
            except OSError:  # the disk is full: others write to it, too
                self._room = 0
                return False
            self._room, self._end = self._room - size, start
            self._kept[key] = places
        return True

    def read(self, key: Hashable) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that were kept under ``key``.

        Raises:
            KeyError: There are none.
            OSError: They cannot be read.
        """
        places = self._kept[key]
        found = {}
        with self._lock:
            for name, (start, dtype, shape) in places.items():
                found[name] = array = np.empty(shape, dtype)
                self._file.seek(start)
                if self._file.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:
                    raise OSError("a file of intermediate results is shorter than it was")
        return found

    def close(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._file.close()


class ScratchArray:
    """An array on disk that nobody sees, so large that memory is not to hold it.

    Its room on disk is taken at once: a disk that fills up later would end the process without a
    word.

    Args:
        folder: Where there is disk; None for what the system takes for such files.
        shape: Of the array.
        dtype: Of its elements.

    Attributes:
        values: The array, all 0 at first; parts of it come into memory as they are used.

    Raises:
        WriteError: There is not enough room.
    """

    def __init__(self, folder: Path | None, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            place = folder or tempfile.gettempdir()
            raise WriteError(
                f"no room for {size / 1e9:.1f} GB of intermediate results in {place}: "
                f"{error.strerror or error}",
                "make room",
            ) from error
        self.values: npt.NDArray[Any] = np.frombuffer(self._map, dtype).reshape(shape)

    def release(self) -> None:
        """Give back the memory of all parts; they stay on disk."""
        if hasattr(mmap, "MADV_DONTNEED") and sys.platform == "linux":
            self._map.madvise(mmap.MADV_DONTNEED)  # elsewhere it may lose what was written
