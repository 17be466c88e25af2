"""What the kinds of data sets share: where they are looked for, lists of images, class names."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from clipes.datasets.problems import Kind, Problem, ProblemError
from clipes.disk.files import check_id, list_files
from clipes.disk.images import READS_AVIF
from clipes.errors import DatasetError, SplitError
from clipes.names import folded, nearest
from clipes.types import MAX_CLASSES, Sample

_AVIF = (".avif",)
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jfif", ".jpe", ".gif"),
    *(_AVIF if READS_AVIF else ()),
)
"""Suffixes, in lower case, of the files taken for images."""

UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".svg", ".psd", ".ppm", ".pgm", ".tga", ".exr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
    *(() if READS_AVIF else _AVIF),
)
"""Suffixes of pictures that are not read: worth a word where they lie among images."""

MAX_LIST_BYTES = 64 * 2**20
"""Largest list of images, labels or classes that is read: about a million lines."""

RARE, RARE_SHARE = 5, 100
"""A class is rare if fewer images show it than the first, or at most one in the second.

What a class looks like is a mean over its images. That of n is off by 1 / sqrt(n) of what one image
is off by: with 5, by less than half. And a name that was misread or misspelt is on few images. Of
what is on one in a hundred, a training sees little that is drawn image by image.
"""

_KNOWN_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *UNREAD_SUFFIXES))
_SPLIT_FOLDER = Path("ImageSets", "Segmentation")

_LEADING_IMAGE = re.compile(
    rf"(.+?(?:{'|'.join(map(re.escape, (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES)))}))"
    r"(?:(?:[,;]\s*|\s+)(.*))?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Dataset:
    """The images of a data set that can be worked on, and those that cannot.

    Attributes:
        name: Kind of data set.
        root: Folder it was found in.
        classes: Class names in mask order; class k has mask value k + 1.
        samples: Images with at least one label, or without any if none were asked for; ids are
            unique.
        failures: Images left out, each with the reason.
        empty: Ids of images left out because they are known to show none of the classes.
        remarks: What is worth knowing about it as a whole, a line each: how files were understood
            that could be understood otherwise; what was seen and not used, how many, and why.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    failures: tuple[Problem, ...]
    empty: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def without_unlabelled(self) -> Dataset:
        """Return this data set with images that lack labels taken for ones that show no class."""
        empty = tuple(item.id for item in self.failures if item.kind is Kind.no_labels)
        failures = tuple(item for item in self.failures if item.kind is not Kind.no_labels)
        return replace(self, failures=failures, empty=(*self.empty, *empty))


def find_base(root: Path | None) -> Path:
    """Return the folder in which data sets are looked for.

    Raises:
        DatasetError: It was named by ``root`` or ``$CLIPES_DATA``, but does not exist.
    """
    named = root if root is not None else os.environ.get("CLIPES_DATA")
    if not named:
        return Path("datasets")
    base = Path(named)
    if not base.is_dir():
        source = "--root" if root is not None else "CLIPES_DATA"
        raise DatasetError(f"there is no folder {base}", f"check the path given by {source}")
    return base


def read_list(path: Path) -> str:
    """Return the text of a list of images, labels or classes.

    Raises:
        DatasetError: The file cannot be read, is larger than ``MAX_LIST_BYTES`` or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LIST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise DatasetError(f"cannot read {path}: {error}", "check the path") from error
    if len(data) > MAX_LIST_BYTES:
        raise DatasetError(
            f"{path} is larger than {MAX_LIST_BYTES // 2**20} MB", "is it the right file? Split it"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text", "save it as UTF-8") from error


def split_line(line: str) -> tuple[str, str]:
    """Split a line into the image it starts with and the rest.

    A name that ends in an image suffix, or before a tab, may contain spaces; any other ends at the
    first space. After an image suffix a comma or semicolon may stand for the space.

    >>> split_line("my cat.jpg cat sofa"), split_line("2007_000032 14"), split_line("a.jpg,cat,dog")
    (('my cat.jpg', 'cat sofa'), ('2007_000032', '14'), ('a.jpg', 'cat,dog'))
    """
    line = line.strip()
    match = _LEADING_IMAGE.match(line)
    if match:
        return match[1], match[2] or ""
    first, *rest = line.split("\t" if "\t" in line else None, maxsplit=1)
    return first.strip(), "".join(rest).strip()


def image_id(name: str) -> str:
    """Return the id of an image that a list or the disk calls ``name``: the stem of its file name.

    Raises:
        DatasetError: That is no plain name, or the path leads upwards.

    >>> image_id("/JPEGImages/2007_000032.jpg"), image_id("v1.5")
    ('2007_000032', 'v1.5')
    """
    path = PurePosixPath(name.strip().replace("\\", "/"))
    if ".." in path.parts:
        raise DatasetError(f"{name[:60]!r} leads out of the data set", "name the image itself")
    # macOS stores accents decomposed, label files rarely do.
    return check_id(unicodedata.normalize("NFC", without_suffix(path.name)))


def path_id(path: str) -> str:
    """Return the id of an image of a folder: its path below that folder, joined by ``_``.

    It is made of the path alone: no other image can change it by coming or going.

    Raises:
        DatasetError: That is no plain name.

    >>> path_id("1.jpg"), path_id("cat/a/1.jpg")
    ('1', 'cat_a_1')
    """
    return image_id(path.replace("\\", "/").replace("/", "_"))


def without_suffix(name: str) -> str:
    """Return the name or path of a picture without the suffix that says so; others as they are."""
    stem, _, suffix = name.rpartition(".")
    known = f".{suffix.lower()}" in _KNOWN_SUFFIXES and stem and not stem.endswith("/")
    return stem if known else name


def suffixes_agree(one: str, other: str) -> bool:
    """Tell whether two names of pictures have the same suffix, or one has none.

    >>> [suffixes_agree("a.jpg", other) for other in ("x/a", "a.JPG", "a.png")]
    [True, True, False]
    """
    found = {name.strip()[len(without_suffix(name.strip())) :].lower() for name in (one, other)}
    return len(found - {""}) < 2


def printable(text: str) -> str:
    """Return the start of any text in a form that can stand in a message."""
    text = text[:60]
    return text if text.isprintable() else ascii(text)[1:-1]


def find_split(root: Path, split: str) -> Path | None:
    """Return the list of images ``split``: one that comes with the data set, else a path."""
    return next((place for place in _split_places(root, split) if place.is_file()), None)


def recorded_split(root: Path, split: str | None) -> str | None:
    """Return the name of a list of a data set, or its path from wherever it is asked for later."""
    if split is None or find_split(root, split) != Path(split):
        return split
    return str(Path(split).resolve())


def read_split(
    root: Path, split: str, to_id: Callable[[str], str] = image_id
) -> tuple[list[str], list[Problem]]:
    """Read a list of images, one a line: ids, file names, or CLIP-ES's pairs of paths.

    An id may hold spaces, or end as pictures do: that of ``IMG_1.HEIC.jpg`` is ``IMG_1.HEIC``. So a
    line that is an image's name without suffix, of those right in the folder of the images, is
    taken as a whole before it is split.

    Args:
        root: Folder of the data set.
        split: Name of a ``.txt`` file in ``ImageSets/Segmentation`` or in ``root``, or a path.
        to_id: Returns the id of the image that a line names, or raises a ``DatasetError``.

    Returns:
        The ids, in order and without repeats, and a failure for each line that names none.

    Raises:
        SplitError: There is no such list.
        DatasetError: It cannot be read, or is empty.
    """
    path = find_split(root, split)
    if path is None:
        places = ", ".join(map(str, _split_places(root, split)))
        raise SplitError(
            f"no list of images '{split}': looked for {places}",
            # Not --split: train-seg has --val for a list, too.
            f"name one of {_known_splits(root)} or the path of a list",
        )
    images = _images_of(root)
    ids: dict[str, None] = {}
    failures = []
    for number, line in enumerate(read_list(path).splitlines(), start=1):
        if not line.strip():
            continue
        whole = images.get(unicodedata.normalize("NFC", line.strip()))
        name = whole.name if whole is not None else split_line(line)[0]
        try:
            ids[to_id(name)] = None
        except DatasetError as error:
            reason = f"{path} line {number}: {error}"
            failures.append(Problem(printable(name), reason, Kind.unusable_entry))
    if not ids and not failures:
        raise DatasetError(f"{path} lists no image", "put one id a line")
    return list(ids), failures


def check_classes(names: Sequence[str], source: str) -> tuple[str, ...]:
    """Return class names if masks and prompts can be made with them.

    Args:
        names: Class names in mask order.
        source: Where they come from, for the message.

    Raises:
        DatasetError: There are none, or more than 254, or one is repeated, in whatever spelling,
            not printable, or means the background.
    """
    if not names:
        raise DatasetError(f"{source} names no class", "put one class name on each line")
    if len(names) > MAX_CLASSES:
        raise DatasetError(
            f"{source} names {len(names)} classes", f"an 8-bit mask has room for {MAX_CLASSES}"
        )
    seen: dict[str, str] = {}
    for name in names:
        if not name.strip() or not name.isprintable():
            raise DatasetError(f"{source}: {name[:60]!r} is no class name", "correct it")
        if name.strip("_").lower() == "background":
            raise DatasetError(
                f"{source}: '{name}' is no class", "remove it: mask value 0 is background anyway"
            )
        first = seen.get(folded(name))
        if first is not None:
            other = "" if first == name else f", as '{first}' too"
            raise DatasetError(f"{source}: class '{name}' is there twice{other}", "remove one")
        seen[folded(name)] = name
    return tuple(names)


def class_index(name: str, classes: Sequence[str]) -> int:
    """Return the 0-based index of the class ``name``, in whatever spelling, see ``folded``.

    Raises:
        ProblemError: There is none of that name.
    """
    if name in classes:
        return classes.index(name)
    same = same_class(name, classes)
    if same is not None:
        return classes.index(same)
    near = nearest(name, classes)
    raise ProblemError(
        Kind.unknown_class,
        f"unknown class {name[:60]!r}",
        f"did you mean '{near}'?" if near else "correct it, or add it to the classes",
    )


def same_class(name: str, classes: Sequence[str]) -> str | None:
    """Return the class that ``name`` is a spelling of, None if there is none."""
    wanted = folded(name)
    return next((known for known in classes if folded(known) == wanted), None)


def index_files(folder: Path, *suffixes: str) -> dict[str, Path]:
    """Return the files right in ``folder`` by stem; of several, the earliest suffix wins."""
    files = list_files(folder, *suffixes)
    files.sort(key=lambda path: suffixes.index(path.suffix.lower()), reverse=True)
    return {unicodedata.normalize("NFC", path.stem): path for path in files}


def collect(
    name: str,
    root: Path,
    classes: tuple[str, ...],
    ids: Iterable[str],
    make: Callable[[str], Sample],
    failures: Iterable[Problem] = (),
    remarks: Sequence[str] = (),
) -> Dataset:
    """Make the data set of the samples of ``ids``.

    Args:
        name: Kind of data set.
        root: Folder it was found in.
        classes: Class names in mask order.
        ids: Its images.
        make: Makes the sample of an id; what raises a ``ProblemError`` is left out.
        failures: Problems that are known already.
        remarks: How files were understood.
    """

    def attempt(id_: str) -> Sample | Problem:
        try:
            return make(id_)
        except ProblemError as error:
            return error.of(id_)

    results = [attempt(id_) for id_ in ids]
    problems: dict[str, Problem] = {}
    # A name that is no id is met on the disk and in a list of labels, and is to be told once.
    for problem in (*failures, *(result for result in results if isinstance(result, Problem))):
        problems.setdefault(problem.id, problem)
    return Dataset(
        name,
        root,
        classes,
        tuple(result for result in results if isinstance(result, Sample)),
        tuple(problem for problem in problems.values() if problem.kind.stops),
        tuple(problem.id for problem in problems.values() if not problem.kind.stops),
        tuple(remarks),
    )


def is_rare(images: int, of: int) -> bool:
    """Tell whether some images show a class, but few.

    Args:
        images: Number of those that do.
        of: Number of all.
    """
    return 0 < images < RARE or 0 < RARE_SHARE * images <= of


def _split_places(root: Path, split: str) -> list[Path]:
    return [root / _SPLIT_FOLDER / f"{split}.txt", root / f"{split}.txt", Path(split)]


def _images_of(root: Path) -> dict[str, Path]:
    """Return the pictures right in the folder of a data set's images, by name without suffix."""
    folders = [root / name for name in ("images", "JPEGImages") if (root / name).is_dir()]
    suffixes = (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES)
    return {k: path for f in folders or [root] for k, path in index_files(f, *suffixes).items()}


def _known_splits(root: Path) -> str:
    folder = root / _SPLIT_FOLDER
    return ", ".join(sorted(index_files(folder, ".txt"))[:8]) or f"the lists in {folder} (none yet)"
