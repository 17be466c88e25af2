"""What every stage that goes through images has in common: shards, resuming, failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clipes.errors import UsageError
from clipes.types import Failure, Sample


@dataclass(frozen=True)
class Summary:
    """How a stage went.

    Attributes:
        done: Images processed now.
        skipped: Images that were done before.
        failures: Images that could not be processed, with the reason.
    """

    done: int
    skipped: int
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th image from the ``index``-th (0-based) on.

    Attributes:
        index: 0 to count - 1.
        count: Number of shards.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``i/n`` with i from 0 to n - 1.

        Raises:
            UsageError: It is not of that form.
        """
        first, slash, second = text.partition("/")
        if slash and first.isdecimal() and second.isdecimal() and int(first) < int(second):
            return cls(int(first), int(second))
        raise UsageError(
            f"'{text}' is not a shard", "write i/n with i from 0 to n - 1, such as 0/4"
        )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Shard:
        """Return this process's part under torchrun or SLURM, else the whole.

        Args:
            environment: RANK and WORLD_SIZE, as torchrun sets them, or SLURM_PROCID and
                SLURM_NTASKS.

        Raises:
            UsageError: They are set, but make no shard.
        """
        for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if rank in environment and size in environment:
                return cls.parse(f"{environment[rank]}/{environment[size]}")
        return cls()

    def of(self, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        """Return this shard's samples."""
        return tuple(samples[self.index :: self.count])
