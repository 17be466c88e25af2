"""Which example a position of an endless training stands for.

Drawn by position, not one after the other, so that neither the number of threads that load nor a
restart changes what is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from clipes.types import Int64Array

# numpy's seeds pad short lists with zeros: none of a kind may be a shorter one and zeros.
_CLASS, _VIEW = 1, 2


class Draws(Protocol):
    """Examples by position."""

    def at(self, position: int) -> tuple[int, np.random.Generator]:
        """Return the index of an example, and the chance of its view."""


class Passes:
    """Pass after pass over all examples, each in its own order.

    Every (seed, pass, example) has its own chance.

    Args:
        count: Number of examples.
        seed: Chooses orders and chances.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._order: tuple[int, Int64Array] = (-1, np.empty(0, np.int64))

    def at(self, position: int) -> tuple[int, np.random.Generator]:
        """Return the index of an example, and the chance of its view."""
        turn, place = divmod(position, self._count)
        kept, order = self._order  # once: another thread may be at another pass
        if kept != turn:
            order = np.random.default_rng([self._seed, turn]).permutation(self._count)
            self._order = turn, order
        index = int(order[place])
        return index, np.random.default_rng([self._seed, turn, 1 + index])


class EvenClasses:
    """Every class once in each round, with its images in turn, pass after pass.

    So the images of rare classes come more often. An image of several classes stands for each.

    Args:
        labels: The classes of each example; those without one are never drawn.
        seed: Chooses orders and chances.
    """

    def __init__(self, labels: Sequence[Sequence[int]], seed: int) -> None:
        self._seed = seed
        present = sorted({label for one in labels for label in one})
        self._members = [
            [index for index, one in enumerate(labels) if label in one] for label in present
        ]

    def at(self, position: int) -> tuple[int, np.random.Generator]:
        """Return the index of an example, and the chance of its view."""
        turn, place = divmod(position, len(self._members))
        classes = np.random.default_rng([self._seed, turn]).permutation(len(self._members))
        chosen = int(classes[place])
        members = self._members[chosen]
        again, step = divmod(turn, len(members))
        order = np.random.default_rng([self._seed, again, 1 + chosen, _CLASS])
        index = members[int(order.permutation(len(members))[step])]
        return index, np.random.default_rng([self._seed, turn, 1 + place, _VIEW])


def choose_draws(labels: Sequence[Sequence[int]], seed: int, *, even: bool) -> Draws:
    """Return how examples come: classes evenly, or examples in turn, as without any class.

    Args:
        labels: The classes of each example.
        seed: Chooses orders and chances.
        even: Whether classes shall come evenly.
    """
    if even and any(labels):
        return EvenClasses(labels, seed)
    return Passes(len(labels), seed)
