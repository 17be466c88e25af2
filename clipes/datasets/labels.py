"""Label files: which classes each image shows, in every format that is read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clipes.datasets.base import class_index, image_id, printable
from clipes.datasets.instances import instance_rows, is_instances
from clipes.datasets.one_hot import one_hot_rows
from clipes.datasets.problems import Kind, Problem, ProblemError
from clipes.datasets.rows import Label, RawLabels
from clipes.datasets.tables import read_table, split_labels
from clipes.errors import DatasetError

LABEL_FILES = ("labels.csv", "labels.json", "labels.txt", "labels.npz")
"""Label files that are found without being named, in the folder of a data set."""


@dataclass(frozen=True)
class LabelRow:
    """What a label file says about one image.

    Attributes:
        image: The image as the file names it.
        labels: Its classes, as the file names them.
    """

    image: str
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class LabelFile:
    """A label file.

    Attributes:
        path: The file.
        rows: Its usable rows by image id, in the order of the file.
        problems: What is wrong with the others, by image id or by what stands there.
        classes: Class names in order, if the file lists them.
        complete: Whether an image without labels shows none of the classes; else its labels were
            forgotten.
    """

    path: Path
    rows: dict[str, LabelRow]
    problems: dict[str, Problem]
    classes: tuple[str, ...] = ()
    complete: bool = field(default=False, kw_only=True)

    def names(self) -> tuple[str, ...]:
        """Return the class names the file lists, else those that occur, sorted.

        Raises:
            DatasetError: All are numbers, so that the names have to come from elsewhere.
        """
        if self.classes:
            return self.classes
        found = {str(label) for row in self.rows.values() for label in row.labels}
        if found and all(name.isdigit() for name in found):
            raise DatasetError(
                f"{self.path} holds class numbers, and the names of the classes are not known",
                "put the names into classes.txt in the root folder, one a line",
            )
        return tuple(sorted(found))

    def indices(self, image: str, classes: tuple[str, ...]) -> tuple[int, ...]:
        """Return the 0-based classes of the image with the id ``image``, without repeats.

        Raises:
            ProblemError: The file says nothing usable about it, or names a class not in
                ``classes``.
        """
        if image in self.problems:
            raise ProblemError(self.problems[image].kind, self.problems[image].reason)
        row = self.rows.get(image)
        if row is None or not row.labels:
            if row is not None and self.complete:
                raise ProblemError(Kind.shows_nothing, f"{self.path} gives it no class")
            raise ProblemError(
                Kind.no_labels,
                f"no labels in {self.path}",
                "list the classes it shows there, or drop the image",
            )
        try:
            found = [_index(label, classes) for label in row.labels]
        except ProblemError as error:
            raise ProblemError(error.kind, f"{self.path}: {error.what}", error.remedy) from error
        return tuple(dict.fromkeys(found))


def read_labels(
    path: Path,
    classes: Sequence[str] = (),
    ids: Sequence[str] | None = None,
    to_id: Callable[[str], str] = image_id,
) -> LabelFile:
    """Read a label file.

    The suffix tells the format:

    - ``.csv`` with the header ``image,labels``; labels separated by ``;``, ``|`` or spaces;
    - ``.json``: COCO's instances, ``{image: [labels]}`` or
      ``[{"image": image, "labels": [labels]}]``;
    - ``.npz``: ``ids`` (n,) and ``labels`` (n, C), 1 where image i shows class k, and maybe
      ``classes`` (C,); ``.npy``: ``labels`` alone, in the order of ``ids``;
    - anything else: ``image label label``, one image a line.

    Labels are class names, or class numbers from 0. In text, a class name that contains spaces
    needs known ``classes`` or a separator other than space: a text that holds ``;`` or ``|`` is
    split there only, and so is a whole file of which at least one row does, as long as the classes
    are unknown.

    Args:
        path: The file.
        classes: The class names, where they are known.
        ids: The images of the split in order, where there is a split.
        to_id: Returns the id of the image that a row names, or raises a ``DatasetError``.

    Raises:
        DatasetError: The file cannot be read or is not in the format its suffix promises.
    """
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        raw = one_hot_rows(path, classes, ids)
    elif suffix == ".json" and is_instances(path):
        raw = instance_rows(path, classes)
    else:
        raw = read_table(path)
    return _by_id(path, raw, classes, to_id)


def find_label_file(root: Path) -> Path | None:
    """Return the label file that lies in ``root``, or None.

    Raises:
        DatasetError: There are several.
    """
    found = [root / name for name in LABEL_FILES if (root / name).is_file()]
    if len(found) > 1:
        raise DatasetError(
            f"{root} holds {' and '.join(path.name for path in found)}",
            "remove all but one, or choose with --labels",
        )
    return found[0] if found else None


def _by_id(
    path: Path, raw: RawLabels, classes: Collection[str], to_id: Callable[[str], str]
) -> LabelFile:
    """Index rows by image; an image that two rows are about is a problem."""
    rows: dict[str, LabelRow] = {}
    problems = dict(raw.problems)
    spaced = not classes and raw.has_separator()
    for image, labels in raw.rows:
        try:
            id_ = to_id(image)
        except DatasetError as error:
            name = printable(image)
            problems[name] = Problem(name, f"{path}: {error}", Kind.unusable_entry)
            continue
        if id_ in rows:
            both = f"{printable(rows[id_].image)} and {printable(image)}"
            reason = f"{path} lists it twice, as {both}; remove or rename one"
            problems[id_] = Problem(id_, reason, Kind.duplicate_id)
        found = split_labels(labels, classes, spaced) if isinstance(labels, str) else labels
        # Where the classes are unknown, a number can only be a name.
        rows[id_] = LabelRow(image, tuple(found if classes else map(str, found)))
    if not raw.rows and not problems:
        raise DatasetError(f"{path} lists no image", "put one image with its labels on each line")
    usable = {id_: row for id_, row in rows.items() if id_ not in problems}
    return LabelFile(path, usable, problems, raw.classes, complete=raw.complete)


def _index(label: Label, classes: tuple[str, ...]) -> int:
    """Return the index of a class given by name or, where no name fits, by number."""
    if label in classes:
        return classes.index(str(label))
    # int() refuses very long digits, and no class number has more than three.
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) <= 3:
        label = int(label)
    if isinstance(label, str):
        return class_index(label, classes)
    if 0 <= label < len(classes):
        return label
    raise ProblemError(
        Kind.unknown_class,
        f"there is no class {str(label)[:20]}",
        f"class numbers go from 0 to {len(classes) - 1}",
    )
