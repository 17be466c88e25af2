"""Label files: which classes each image shows, in every format that is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from clipes.datasets.base import (
    class_index,
    image_id,
    printable,
    same_class,
    suffixes_agree,
    without_suffix,
)
from clipes.datasets.instances import instance_rows, is_instances
from clipes.datasets.one_hot import one_hot_rows
from clipes.datasets.problems import Kind, Problem, ProblemError
from clipes.datasets.rows import Label, RawLabels
from clipes.datasets.splitting import Split, choose_split
from clipes.datasets.tables import read_table
from clipes.errors import DatasetError
from clipes.names import folded

LABEL_FILES = ("labels.csv", "labels.json", "labels.txt", "labels.npz")
"""Label files that are found without being named, in the folder of a data set."""

_SPELLINGS_TOLD = 5


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
        remarks: How the file was understood where it could be understood otherwise.
    """

    path: Path
    rows: dict[str, LabelRow]
    problems: dict[str, Problem]
    classes: tuple[str, ...] = ()
    complete: bool = field(default=False, kw_only=True)
    remarks: tuple[str, ...] = field(default=(), kw_only=True)

    def names(self) -> tuple[str, ...]:
        """Return the class names the file lists, else those that occur, sorted.

        Of several spellings of a name, the most frequent one is the class.

        Raises:
            DatasetError: All are numbers, so that the names have to come from elsewhere.
        """
        if self.classes:
            return self.classes
        found = self._counts()
        if found and all(name.isdigit() for name in found):
            raise DatasetError(
                f"{self.path} holds class numbers, and the names of the classes are not known",
                "put the names into classes.txt in the root folder, one a line",
            )
        spelt: dict[str, str] = {}
        for name, _ in found.most_common():  # of equally frequent ones, the first in the file
            spelt.setdefault(folded(name), name)
        return tuple(sorted(spelt.values()))

    def remarks_on(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Return the remarks, with those on labels that are other spellings of ``classes``."""
        counts = self._counts()
        meant = {name: same_class(name, classes) for name in counts if name not in classes}
        told = [
            f"{self.path}: '{printable(name)}' ({counts[name]}) taken for '{known}'"
            f"{f' ({counts[known]})' if counts[known] else ''}"
            for name, known in meant.items()
            if known is not None
        ]
        more = len(told) - _SPELLINGS_TOLD
        rest = [f"{self.path}: {more} more labels are other spellings of classes"] * (more > 0)
        return (*self.remarks, *told[:_SPELLINGS_TOLD], *rest)

    def _counts(self) -> Counter[str]:
        return Counter(str(label) for row in self.rows.values() for label in row.labels)

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


def _one_picture(one: str, other: str) -> bool:
    """Tell whether two paths of one id may be of one picture: neither says another folder."""
    folders = [
        PurePosixPath(name.strip().replace("\\", "/")).parts[-2::-1] for name in (one, other)
    ]
    agree = all(here == there for here, there in zip(*folders, strict=False))
    return agree and suffixes_agree(one, other)


def read_labels(
    path: Path,
    classes: Sequence[str] = (),
    ids: Sequence[str] | None = None,
    to_id: Callable[[str], str] = image_id,
    same: Callable[[str, str], bool] = _one_picture,
) -> LabelFile:
    """Read a label file.

    The suffix tells the format:

    - ``.csv`` with the header ``image,labels``, or what else people call these columns;
    - ``.json``: COCO's instances, ``{image: [labels]}`` or
      ``[{"image": image, "labels": [labels]}]``;
    - ``.npz``: ``ids`` (n,) and ``labels`` (n, C), 1 where image i shows class k, and maybe
      ``classes`` (C,); ``.npy``: ``labels`` alone, in the order of ``ids``;
    - anything else: ``image label label``, one image a line.

    Labels are class names, in whatever spelling (see ``folded``), or class numbers from 0. How a
    text of several labels is split: ``clipes.datasets.splitting``. Rows of one image add up.

    Args:
        path: The file.
        classes: The class names, where they are known.
        ids: The images of the split in order, where there is a split.
        to_id: Returns the id of the image that a row names, or raises a ``DatasetError``.
        same: Tells whether two names of one id are names of one picture.

    Raises:
        DatasetError: The file cannot be read, is not in the format its suffix promises, or does not
            say where one label ends.
    """
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        raw = one_hot_rows(path, classes, ids)
    elif suffix == ".json" and is_instances(path):
        raw = instance_rows(path, classes)
    else:
        raw = read_table(path)
    return _by_id(path, raw, classes, to_id, same)


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
    path: Path,
    raw: RawLabels,
    classes: Sequence[str],
    to_id: Callable[[str], str],
    same: Callable[[str, str], bool],
) -> LabelFile:
    """Index rows by image; those of one image add up, two images of one id are a problem."""
    rows: dict[str, LabelRow] = {}
    problems = dict(raw.problems)
    split, about_marks = choose_split(path, raw, classes)
    remarks = (*raw.remarks, *about_marks)
    joined: dict[str, None] = {}
    for image, labels in raw.rows:
        try:
            id_ = to_id(image)
        except DatasetError as error:
            name = printable(image)
            problems[name] = Problem(name, f"{path}: {error}", Kind.unusable_entry)
            continue
        found = labels if raw.classes else _split_all(labels, split)
        # Where the classes are unknown, a number can only be a name.
        row = LabelRow(image, tuple(found if classes else map(str, found)))
        first = rows.setdefault(id_, row)
        if first.image != image and not same(first.image, image):
            both = f"{printable(first.image)} and {printable(image)}"
            reason = f"{path} lists it twice, as {both}; remove or rename one"
            problems[id_] = Problem(id_, reason, Kind.duplicate_id)
        elif first != row:
            # Of several names, one with a suffix says more: a third row may have another.
            name = image if without_suffix(first.image) == first.image else first.image
            rows[id_] = LabelRow(name, tuple(dict.fromkeys((*first.labels, *row.labels))))
            if first.labels != row.labels:
                joined[image] = None
    if not raw.rows and not problems:
        raise DatasetError(f"{path} lists no image", "put one image with its labels on each line")
    if joined:
        first_name = printable(next(iter(joined)))
        more = f" and {len(joined) - 1} more" if len(joined) > 1 else ""
        remarks += (f"{path}: rows of one image add up, as those of {first_name}{more}",)
    usable = {id_: row for id_, row in rows.items() if id_ not in problems}
    return LabelFile(path, usable, problems, raw.classes, complete=raw.complete, remarks=remarks)


def _split_all(labels: str | Sequence[Label], split: Split) -> list[Label]:
    """Split a text of labels, or each of a list of them; numbers are whole."""
    several: list[Label] = []
    for label in [labels] if isinstance(labels, str) else labels:
        several += split(label) if isinstance(label, str) else [label]
    return several


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
