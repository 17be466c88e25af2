"""One kind of output against its ground truth: image by image, into confusion matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from clipes.disk.images import read_mask
from clipes.errors import ArtifactError
from clipes.masks.scores import ConfusionMatrix, Scores
from clipes.masks.values import RULE, pixels_of, value_count
from clipes.run.loop import in_order
from clipes.types import IGNORE, Progress, UInt8Array

_NO_CLASS = frozenset((0, IGNORE))


@dataclass(frozen=True)
class Output:
    """Something that can be scored.

    Attributes:
        name: What it is called where it cannot be scored.
        path: The file of an image's output.
        masks: Its masks, by the name of what is scored.
    """

    name: str
    path: Callable[[str], Path]
    masks: Callable[[str], Mapping[str, UInt8Array]]


@dataclass
class _Counts:
    """Sums over images, of a size that does not depend on their number.

    Attributes:
        found: The values that occur in the ground truth.
        matrices: By the name of what is scored.
    """

    found: set[int] = field(default_factory=set)
    matrices: dict[str, ConfusionMatrix] = field(default_factory=dict)

    def add(self, other: _Counts) -> None:
        """Add the sums of other images."""
        self.found |= other.found
        for name, matrix in other.matrices.items():
            known = self.matrices.get(name)
            self.matrices[name] = matrix if known is None else known + matrix


def score_output(
    output: Output,
    some: Mapping[str, Path],
    truths: Iterable[Path],
    n_classes: int,
    progress: Progress,
    say: Callable[[str], None],
) -> tuple[dict[str, Scores], set[int]]:
    """Score one output, and say what of it cannot be scored.

    Args:
        output: The output.
        some: The ground truth of the images of which there is output, by id; may be empty.
        truths: All ground truth that there is, also of images without output.
        n_classes: Number of classes.
        progress: Called after each image.
        say: Told what is left out.

    Returns:
        The scores by name, and the values that occur in the ground truth ``some``.

    Raises:
        ArtifactError: A mask does not fit its ground truth, or ``truths`` show no class.
    """
    if not some:
        return {}, set()
    counts = _count(output, some, n_classes, progress)
    if counts.found <= _NO_CLASS:
        _require_class(truths)
        say(
            f"{output.name}: no scores, the ground truth of its {len(some)} images, such as "
            f"{next(iter(some.values()))}, shows no class"
        )
        return {}, counts.found
    scores: dict[str, Scores] = {}
    for name, matrix in counts.matrices.items():
        if matrix.counts.any():
            scores[name] = matrix.scores()
        else:
            say(
                f"{name}: no scores, no pixel of its {matrix.images} images has both a ground "
                "truth and a label"
            )
    return scores, counts.found


def require_scores(
    output: Output, truths: Mapping[str, Path], n_classes: int, progress: Progress
) -> dict[str, Scores]:
    """Return the scores of one output by name, where nothing else could be scored.

    Args:
        output: The output.
        truths: The ground truth of its images, by id; at least one.
        n_classes: Number of classes.
        progress: Called after each image.

    Raises:
        ArtifactError: A mask does not fit its ground truth, ``truths`` show no class, or no pixel
            has both a truth and a label.
    """
    counts = _count(output, truths, n_classes, progress)
    if counts.found <= _NO_CLASS:
        _require_class(truths.values())
    return {name: matrix.scores() for name, matrix in counts.matrices.items()}


def _count(
    output: Output, truths: Mapping[str, Path], n_classes: int, progress: Progress
) -> _Counts:
    """Stream masks into one confusion matrix per name.

    Raises:
        ArtifactError: A mask does not fit its ground truth.
    """
    counts = _Counts()
    work = partial(_count_one, output=output, n_classes=n_classes)
    with closing(in_order(work, [*truths.items()], workers=None, progress=progress)) as results:
        for one in results:
            counts.add(one)
    return counts


def _count_one(item: tuple[str, Path], output: Output, n_classes: int) -> _Counts:
    """Return the counts of one image."""
    id_, path = item
    truth = read_mask(path)
    counts = _Counts(_values_in(truth))
    for name, mask in output.masks(id_).items():
        counts.matrices[name] = ConfusionMatrix(value_count(n_classes))
        try:
            counts.matrices[name].update(truth, mask)
        except ArtifactError as error:
            files = f"ground truth {path}, {name} {output.path(id_)}"
            raise ArtifactError(f"{id_}: {error.what} ({files})", error.remedy) from error
    return counts


def _values_in(truth: UInt8Array) -> set[int]:
    """Return the values that an (H, W) mask holds, 255 included."""
    return set(np.flatnonzero(pixels_of(truth)).tolist())


def _require_class(truths: Iterable[Path]) -> None:
    """Refuse ground truth without any class; it is read up to the first mask that shows one.

    Raises:
        ArtifactError: There is none.
    """
    files = [*truths]
    found: set[int] = set()
    for path in files:
        found |= _values_in(read_mask(path))
        if not found <= _NO_CLASS:
            return
    values = " and ".join(map(str, sorted(found)))
    raise ArtifactError(
        f"the ground truth shows no class: {len(files)} masks such as {files[0]} hold only "
        f"{values}",
        f"{RULE}: a single class is 1, not 255",
    )
