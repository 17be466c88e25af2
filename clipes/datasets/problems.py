"""What can be wrong with one image of a data set, by kind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clipes.errors import DatasetError
from clipes.types import Failure


class Kind(str, Enum):
    """Kinds of problems, in the order they are told in."""

    unusable_entry = "unusable entry"
    duplicate_id = "duplicate id"
    missing_image = "missing image"
    unreadable_image = "unreadable image"
    bad_annotation = "bad annotation"
    unknown_class = "unknown class"
    no_labels = "no labels"
    unreadable_mask = "unreadable mask"
    size_mismatch = "mask of another size"
    mask_value = "mask value out of range"
    shows_no_class = "masks show no class"
    not_in_labels = "class in mask, not in labels"
    not_in_mask = "class in labels, not in mask"
    no_mask = "no mask, others have one"
    shows_nothing = "shows none of the classes"

    @property
    def stops(self) -> bool:
        """Whether cam, refine or eval fails on such an image; the others are remarks."""
        return self not in _REMARKS


_REMARKS = {Kind.not_in_labels, Kind.not_in_mask, Kind.no_mask, Kind.shows_nothing}


@dataclass(frozen=True)
class Problem(Failure):
    """One image, or entry of a list, and what is wrong with it.

    Attributes:
        kind: Of what kind that is.
    """

    kind: Kind


class ProblemError(DatasetError):
    """Something is wrong with one image, the others can go on.

    Args:
        kind: Of what kind it is.
        what: As in ``ClipesError``.
        remedy: As in ``ClipesError``.
    """

    def __init__(self, kind: Kind, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.args = (kind, what, remedy)  # what pickle makes the copy from
        self.kind = kind

    def of(self, image: str) -> Problem:
        """Return this as the problem of an image."""
        return Problem(image, str(self), self.kind)
