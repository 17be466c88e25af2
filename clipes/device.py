"""Where to compute."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clipes.errors import BackendError, UsageError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device to compute on; of several GPUs, that of the local rank.

    Raises:
        UsageError: It is unknown or not here.
    """
    if name in ("auto", "cuda"):
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        if name == "auto":
            return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device '{name}'", "use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device '{name}': no CUDA device here", "use --device cpu")
    return device


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Raise a ``BackendError`` where the GPU has too little memory for the block.

    Args:
        what: What the block works on, for the message.
        remedy: What to do about it.

    Raises:
        BackendError: It has too little.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise BackendError(f"the GPU has too little memory for {what}", remedy) from error


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT, _LARGEST = 1 << 30, 1 << 25  # bytes; glibc allows no more than 32 MiB for the latter


def keep_freed_memory() -> None:
    """Let this process reuse the memory of one image for the next.

    By default glibc gives large arrays back to the system as soon as they are freed, and the next
    image pays for the same pages again: up to a tenth of its time. Does nothing elsewhere.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)


# They read, decode and save, and take the GPU in turns.
_LEAST_WORKERS_PER_GPU, _MOST_WORKERS_PER_GPU = 4, 16
_BATCH_ON_GPU = 32  # images of all sizes; those of one size are computed on together


def share_processor(device: torch.device, workers: int | None) -> int:
    """Divide this process's threads among images that are worked on at once.

    On processors, as many images as threads, one thread each, is fastest: no thread waits for
    another (``clipes bench`` shows both ways). Sets torch's number of threads.

    Args:
        device: Where the tower runs.
        workers: How many images at once, None to choose.

    Returns:
        How many images at once.
    """
    threads = torch.get_num_threads()
    if workers is None:
        workers = threads
        if device.type != "cpu":  # torchrun leaves a process one thread
            workers = min(max(threads, _LEAST_WORKERS_PER_GPU), _MOST_WORKERS_PER_GPU)
    torch.set_num_threads(max(1, threads // workers))
    return workers


def batch_size(device: torch.device, asked: int | None) -> int:
    """Return how many images to read before CLIP looks at those of one size together.

    On processors one alone is fastest: what is computed stays in the cache.
    """
    if asked is not None:
        return asked
    return 1 if device.type == "cpu" else _BATCH_ON_GPU
