"""Which of several processes this is, as torchrun and SLURM say in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

from clipes.errors import UsageError

_SCHEDULERS = (("RANK", "WORLD_SIZE", "RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"))
"""Which process, of how many, and what is set in each of them alone.

A batch script has SLURM's two numbers as well, although there is only one of it; ``srun``, which
starts the others, also sets the third.
"""


def rank_and_count(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Return what a scheduler says: which process this is, from 0, and of how many; None if alone.

    >>> rank_and_count({"RANK": "1", "WORLD_SIZE": "2"}), rank_and_count({})
    (('1', '2'), None)
    """
    for rank, count, started in _SCHEDULERS:
        if {rank, count, started} <= environment.keys():
            return environment[rank], environment[count]
    return None


def local_rank() -> int:
    """Return which of this machine's processes this is, as torchrun says: the number of its GPU.

    Raises:
        UsageError: LOCAL_RANK is no number.
    """
    text = os.environ.get("LOCAL_RANK") or "0"
    if not text.isdecimal():
        raise UsageError(f"LOCAL_RANK is '{text}', no number of a GPU", "unset it")
    return int(text)
