"""Where to compute."""

from __future__ import annotations

import ctypes
import sys

import torch

from clipes.errors import UsageError


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
