"""Looks through a data set before an hour is spent on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clipes.datasets import Dataset, open_dataset
from clipes.datasets.base import is_rare
from clipes.datasets.problems import Kind, Problem
from clipes.disk.images import read_mask
from clipes.disk.large import decoded_size
from clipes.errors import ImageError
from clipes.listener import Listener
from clipes.masks.values import RULE, classes_in, strange_values, values_in
from clipes.names import folded
from clipes.run.loop import in_order
from clipes.stages.cam import DataRequest
from clipes.types import IGNORE, Sample, UInt8Array, size_text
from clipes.words.features import stand_in
from clipes.words.vocabulary import SHIPPED, load_vocabulary


@dataclass(frozen=True)
class ClassCount:
    """A class, the number of usable images that are labelled with it, and whether that is few."""

    name: str
    images: int
    rare: bool


@dataclass(frozen=True)
class Findings:
    """What was found in a data set.

    Attributes:
        name: Kind of data set.
        root: Its folder.
        images: Number of images that were looked at or should have been.
        masks: How many of them have a mask.
        problems: What is wrong with which image, in the order of the images.
        classes: The classes in mask order; none if the images were opened without labels.
        remarks: How the files were understood.
    """

    name: str
    root: Path
    images: int
    masks: int
    problems: tuple[Problem, ...]
    classes: tuple[ClassCount, ...] = ()
    remarks: tuple[str, ...] = ()

    def by_kind(self) -> dict[Kind, list[Problem]]:
        """Return the problems of each kind that occurs, in the order of the kinds."""
        found = {kind: [p for p in self.problems if p.kind is kind] for kind in Kind}
        return {kind: problems for kind, problems in found.items() if problems}

    def stops(self) -> bool:
        """Tell whether cam, refine or eval would fail on any image."""
        return any(problem.kind.stops for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Return the findings as plain data."""
        return {
            "dataset": self.name,
            "root": str(self.root),
            "images": self.images,
            "masks": self.masks,
            "ok": not self.stops(),
            "remarks": list(self.remarks),
            "classes": [
                {"name": item.name, "images": item.images, "rare": item.rare}
                for item in self.classes
            ],
            "problems": [
                {
                    "kind": kind.value,
                    "stops": kind.stops,
                    "count": len(problems),
                    "images": [{"id": item.id, "reason": item.reason} for item in problems],
                }
                for kind, problems in self.by_kind().items()
            ],
        }


def open_checked(request: DataRequest) -> Dataset:
    """Open a data set as ``cam`` would, but without what CLIP needs.

    Args:
        request: The images. Where their labels are to be tags, they have none.
    """
    return open_dataset(
        request.dataset,
        root=request.root,
        split=request.split,
        labels=None if request.automatic else request.labels,
        classes=load_vocabulary(request.prompts).classes if request.prompts else None,
        difficult=request.difficult,
        labelled=not request.automatic,
    )


def check(data: Dataset, listener: Listener, *, workers: int | None = None) -> Findings:
    """Decode every image and mask of a data set and compare masks with labels.

    Args:
        data: The data set; without labels, masks are only compared with the classes.
        listener: Who is told how the files were understood, and how it goes.
        workers: Threads: decoding, which is what takes the time, runs outside the interpreter.
            None for as many as there are cores.
    """
    remarks = (*data.remarks, *_misspelt(data.classes))
    for remark in remarks:
        listener.say(remark)
    values: set[int] = set()
    some_masks = any(sample.mask is not None for sample in data.samples)
    found: list[Problem] = [
        *data.failures,
        *(Problem(id_, "its labels name no class", Kind.shows_nothing) for id_ in data.empty),
    ]
    work = partial(check_sample, classes=data.classes, some_masks=some_masks)
    with listener.progress("check") as progress:
        for problems, held in in_order(work, data.samples, workers=workers, progress=progress):
            found += problems
            values |= held
    found += _no_class(data.samples, values)
    return Findings(
        data.name,
        data.root,
        len(data.samples) + len(data.failures) + len(data.empty),
        sum(sample.mask is not None for sample in data.samples),
        tuple(found),
        count_classes(data),
        remarks,
    )


def _misspelt(classes: Sequence[str]) -> list[str]:
    """Return what is to be said of names that are no shipped class, but nearly one."""
    known = stand_in()
    shipped = {folded(name) for words in SHIPPED for name in load_vocabulary(words).classes}
    new = [name for name in known.lacks(classes) if folded(name) not in shipped]
    near = {name: known.meant(name) for name in new}
    return [
        f"classes: '{name}' is a class that nobody knows; did you mean '{other}'?"
        for name, other in near.items()
        if other is not None
    ]


def count_classes(data: Dataset) -> tuple[ClassCount, ...]:
    """Return how many samples show each class, in mask order; none if no sample has a label."""
    counts = Counter(label for sample in data.samples for label in sample.labels)
    named = enumerate(data.classes) if counts else ()
    total = len(data.samples)
    return tuple(
        ClassCount(name, counts[label], is_rare(counts[label], total)) for label, name in named
    )


def _no_class(samples: Sequence[Sample], values: set[int]) -> list[Problem]:
    """Return the problem of masks that hold, all together, no ``values`` of a class.

    One image may show background only; where all do, eval has nothing to score.
    """
    masked = [sample for sample in samples if sample.mask is not None]
    if not values or not values <= {0, IGNORE}:
        return []
    held = " and ".join(map(str, sorted(values)))
    reason = (
        f"{len(masked)} masks such as {masked[0].mask} hold only {held}, eval fails; "
        f"{RULE}: a single class is 1, not 255"
    )
    return [Problem(masked[0].id, reason, Kind.shows_no_class)]


def check_sample(
    sample: Sample, classes: Sequence[str], some_masks: bool
) -> tuple[list[Problem], set[int]]:
    """Return what is wrong with one image, its mask, and how it fits its labels.

    Args:
        sample: The image.
        classes: Class names in mask order.
        some_masks: Whether the data set has masks, so that the lack of one is worth a remark.

    Returns:
        The problems, and the values that the mask holds, 255 among them; none if it cannot be read.
    """
    found: list[Problem] = []

    def note(kind: Kind, reason: str) -> None:
        found.append(Problem(sample.id, reason, kind))

    size = None
    try:
        size = decoded_size(sample.image)
    except ImageError as error:
        note(Kind.unreadable_image, str(error))
    if sample.mask is None:
        if some_masks:
            note(Kind.no_mask, "eval leaves it out")
        return found, set()
    try:
        mask = read_mask(sample.mask)
    except ImageError as error:
        note(Kind.unreadable_mask, str(error))
        return found, set()
    if size is not None and mask.shape != size:
        note(
            Kind.size_mismatch,
            f"image {size_text(size)}, mask {sample.mask} {size_text(mask.shape)}",
        )
    _compare(mask, sample, classes, note)
    return found, {*values_in(mask), *([IGNORE] if (mask == IGNORE).any() else [])}


def _compare(
    mask: UInt8Array, sample: Sample, classes: Sequence[str], note: Callable[[Kind, str], None]
) -> None:
    """Compare the values of a mask with the classes and, if there are any, with the labels."""
    if wrong := strange_values(values_in(mask), len(classes)):
        note(Kind.mask_value, f"{sample.mask} {wrong}")
    if not sample.labels:
        return
    shown = classes_in(mask, len(classes))
    for kind, missing in (
        (Kind.not_in_labels, shown - set(sample.labels)),
        (Kind.not_in_mask, set(sample.labels) - shown),
    ):
        if missing:
            note(kind, ", ".join(classes[label] for label in sorted(missing)))
