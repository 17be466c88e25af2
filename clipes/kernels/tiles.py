"""What the compiled products of the tower share: their arrays, their tiles, their threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from clipes.kernels.choose import processor_features
from clipes.types import Float32Array


@lru_cache(maxsize=1)
def shape_of_tiles() -> tuple[int, int]:
    """Return the lanes of a vector, and the rows of two vectors whose sums fill the registers."""
    return (16, 14) if processor_features().get("avx512f") else (8, 6)


def flat(tensor: Tensor) -> Float32Array:
    """Return a contiguous tensor's memory as a flat array."""
    array: Float32Array = tensor.view(-1).numpy()
    return array


def in_parts(
    work: Callable[..., None], count: int, multiple: int, arguments: tuple[object, ...]
) -> None:
    """Call ``work(first, end, *arguments)`` for parts of ``range(count)``, one for each thread.

    Args:
        work: Compiled, so that it runs without the GIL.
        count: How much there is to do.
        multiple: All parts but the last are multiples of it.
        arguments: The same for all parts.
    """
    units = -(-count // multiple)
    parts = min(torch.get_num_threads(), units)
    bounds = [min(units * part // parts * multiple, count) for part in range(parts + 1)]
    others = [
        _pool(parts - 1).submit(work, first, end, *arguments) for first, end in pairwise(bounds[1:])
    ]
    work(bounds[0], bounds[1], *arguments)
    for other in others:
        other.result()


@lru_cache(maxsize=8)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tiles")
