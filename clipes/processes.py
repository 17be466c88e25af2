"""Which of several processes this is, as torchrun and SLURM say in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

_SCHEDULERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


def rank_and_count(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return what a scheduler says: which process this is, from 0, and of how many; None if alone.

    >>> rank_and_count({"RANK": "1", "WORLD_SIZE": "2"}), rank_and_count({})
    (('1', '2'), None)
    """
    for rank, count in _SCHEDULERS:
        if rank in environment and count in environment:
            return environment[rank], environment[count]
    return None


def local_rank() -> int:
    """Return which of this machine's processes this is, as torchrun says: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
