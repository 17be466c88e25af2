"""Which masks need a person, told without ground truth.

Each sign is cheap, can be said in words, and was seen to go with a low mIoU. The weights are round
numbers between those that rank either half of voc_sample best; ``benchmarks/review.py`` chooses
them again on each half and holds them to the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.datasets.base import RARE
from clipes.masks.pseudo import with_background
from clipes.masks.values import value_of
from clipes.types import CamMaps, PseudoLabel, UInt8Array

UNSURE, AMBIGUOUS, DISAGREEMENT, DRIFT, TINY, FULL, EMPTY = 15.0, 6.0, 0.5, 1.0, 0.7, 0.6, 2.0
"""What each sign adds to the score: per share of the pixels (the first two), per class that is in
dispute, for the class that drifted most, per class that is tiny or empty, and for an image without
background."""

CONTESTED = 2.0
"""What the label adds that a segmenter sees elsewhere than the mask does, more than any other."""

SCARCITY = 2.0
"""What the only image of a class adds, by as much as its mask counts for the class: one of n images
adds the n-th part. It says nothing of the mask, but what a person's minute is worth."""

TINY_AREA = 0.005
"""Share of the image below which a class counts as tiny."""

FULL_AREA = 0.9
"""Share of the image above which the classes together leave too little background."""

_CLOSE = 0.2  # two scores of a map this close: either label could have won
_MANY_AMBIGUOUS, _MUCH_DISPUTED, _MANY_UNSURE = 0.2, 0.4, 0.04  # worth saying; the score adds all
_FAR = 0.75  # likewise, of the drift


@dataclass(frozen=True, slots=True)
class ClassSigns:
    """What is seen of one class that the label names.

    Attributes:
        label: The class, 0-based.
        area: Share of the image that the mask gives it.
        disagreement: 1 - IoU of the map's mask and the CRF's; None before the CRF.
        drift: 1 - IoU of where the map and where the word alone put it; None where words alone were
            asked.
        images: How many images of the run show it, this one included; 0 where that is not known.
    """

    label: int
    area: float
    disagreement: float | None
    drift: float | None = None
    images: int = 0


@dataclass(frozen=True, slots=True)
class Signs:
    """What is seen of one image; all shares in [0, 1].

    Attributes:
        classes: Of each class that the label names.
        ambiguous: Share of the patches at which the map's two highest scores are close.
        unsure: Share of the pixels with a confidence below 0.95; None before the CRF.
        contests: 1 - IoU of the mask and that of a segmenter which learnt from such (``clipes
            relabel``), of the background and of each class; empty where there is none.
    """

    classes: tuple[ClassSigns, ...]
    ambiguous: float
    unsure: float | None
    contests: tuple[float, ...] = ()

    @property
    def labelled(self) -> float:
        """Share of the image that is not background."""
        return sum(one.area for one in self.classes)

    @property
    def empty(self) -> int:
        """Number of classes that the mask does not hold at all."""
        return sum(not one.area for one in self.classes)

    @property
    def tiny(self) -> int:
        """Number of classes that the mask hardly holds, empty ones included."""
        return sum(one.area < TINY_AREA for one in self.classes)

    @property
    def disputed(self) -> float:
        """Sum of the disagreement over the classes, 0 where it is not known."""
        return sum(one.disagreement or 0.0 for one in self.classes)

    @property
    def drift(self) -> float:
        """The largest drift of a class, 0 where it is not known."""
        return max((one.drift or 0.0 for one in self.classes), default=0.0)

    @property
    def contested(self) -> float:
        """The largest of ``contests``, 0 where there are none."""
        return max(self.contests, default=0.0)

    @property
    def scarcity(self) -> float:
        """Share that the image has in those of its rarest class."""
        return max((1 / one.images for one in self.classes if one.images), default=0.0)


def read_signs(
    cams: CamMaps,
    cam_mask: UInt8Array,
    pseudo: PseudoLabel | None,
    exponent: float,
    images: Mapping[int, int],
    again: UInt8Array | None = None,
) -> Signs:
    """Look at what was made for one image.

    Args:
        cams: Its maps.
        cam_mask: (H0, W0) mask that the maps make alone.
        pseudo: Its mask and confidence, where they were made; else ``cam_mask`` is judged.
        exponent: alpha of the background score.
        images: How many images of the run show a class, by its 0-based number.
        again: (H0, W0) mask of a segmenter that learnt from such masks; None where there is none.
    """
    mask = cam_mask if pseudo is None else pseudo.mask
    labels = cams.labels.tolist()
    values = [value_of(label) for label in labels]
    parted = _disagreement(cam_mask, mask, values, nowhere=1.0)
    areas = np.bincount(mask.ravel(), minlength=256)
    classes = [
        ClassSigns(
            label,
            float(areas[value] / mask.size),
            None if pseudo is None else disagreement,
            None if cams.drift is None else float(cams.drift[index]),
            images.get(label, 0),
        )
        for index, (label, value, disagreement) in enumerate(
            zip(labels, values, parted, strict=True)
        )
    ]
    scores = np.sort(with_background(cams.maps.astype(np.float32), exponent), axis=0)
    return Signs(
        tuple(classes),
        float((scores[-1] - scores[-2] < _CLOSE).mean()),
        None if pseudo is None else float((pseudo.confidence < CONFIDENCE_THRESHOLD).mean()),
        () if again is None else _disagreement(mask, again, [0, *values], nowhere=0.0),
    )


def _disagreement(
    one: UInt8Array, other: UInt8Array, values: Sequence[int], *, nowhere: float
) -> tuple[float, ...]:
    """Return 1 - IoU of two masks for each value; ``nowhere`` for one that is in neither."""
    pairs = np.bincount((one.astype(np.uint16) << 8 | other).ravel(), minlength=1 << 16)
    table = pairs.reshape(256, 256)
    both = np.diag(table)
    unions = table.sum(1) + table.sum(0) - both
    return tuple(1 - float(both[k] / unions[k]) if unions[k] else nowhere for k in values)


def score(signs: Signs) -> float:
    """Return how much an image needs a person: 0 not at all, about 1 usual, no upper end."""
    return (
        UNSURE * (signs.unsure or 0.0)
        + AMBIGUOUS * signs.ambiguous
        + DISAGREEMENT * signs.disputed
        + DRIFT * signs.drift
        + TINY * signs.tiny
        + FULL * (signs.labelled > FULL_AREA)
        + EMPTY * signs.empty
        + CONTESTED * signs.contested
        + SCARCITY * signs.scarcity
    )


def reasons(signs: Signs, classes: Sequence[str]) -> tuple[str, ...]:
    """Return what stands out in an image, in words, what weighs most first, rare classes last.

    Args:
        signs: What was seen of it.
        classes: Class names in mask order.
    """
    found = sorted(_reasons(signs, classes), key=lambda reason: -reason[0])
    return tuple(words for _, words in found)


def _reasons(signs: Signs, classes: Sequence[str]) -> Iterator[tuple[float, str]]:
    for one in signs.classes:
        name, disputed = classes[one.label], one.disagreement or 0.0
        if 0 < one.images < RARE:
            among = "the only image" if one.images == 1 else f"one of {one.images} images"
            yield 0.0, f"{among} of {name}"  # nothing is wrong with that
        if not one.area:
            yield EMPTY + TINY, f"{name}: nothing labelled"
            continue
        if one.area < TINY_AREA:
            yield TINY, f"{name}: only {_percent(one.area, 2)} of the image"
        if disputed >= _MUCH_DISPUTED:
            yield DISAGREEMENT * disputed, f"map and CRF disagree on {_percent(disputed)} of {name}"
        if one.drift is not None and one.drift >= _FAR:
            yield (
                DRIFT * one.drift,
                f"map and word alone disagree on {_percent(one.drift)} of {name}",
            )
    if signs.contested >= _MUCH_DISPUTED:
        names = ("the background", *(classes[one.label] for one in signs.classes))
        share, name = max(zip(signs.contests, names, strict=True))
        yield CONTESTED * share, f"mask and segmenter disagree on {_percent(share)} of {name}"
    if signs.labelled > FULL_AREA:
        yield FULL, f"hardly any background: {_percent(signs.labelled)} of the image is labelled"
    if signs.unsure is not None and signs.unsure >= _MANY_UNSURE:
        words = f"{_percent(signs.unsure, 1)} of the pixels below confidence"
        yield UNSURE * signs.unsure, f"{words} {CONFIDENCE_THRESHOLD:g}"
    if signs.ambiguous >= _MANY_AMBIGUOUS:
        yield (
            AMBIGUOUS * signs.ambiguous,
            f"map undecided on {_percent(signs.ambiguous)} of the image",
        )


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"
