"""Ground-truth masks drawn from the outlines in COCO's instances files."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from clipes.datasets.base import class_index, printable
from clipes.datasets.coco import MASK_FOLDER, find_coco, image_key, instance_files, open_coco
from clipes.datasets.instances import (
    Header,
    ImageKey,
    is_key,
    read_annotations,
    read_header,
)
from clipes.datasets.outlines import Outline, draw, parse_outline
from clipes.datasets.problems import ProblemError
from clipes.datasets.rows import id_or_text, labels_of_classes
from clipes.disk.files import sha256_of
from clipes.disk.images import MAX_PIXELS, read_origin, write_mask
from clipes.errors import DatasetError, ImageError
from clipes.listener import Listener
from clipes.masks.values import value_of
from clipes.run.loop import Summary, for_each, part_of, waiting
from clipes.run.origin import digest
from clipes.types import Failure, Sample, UInt8Array

_IMAGES_AT_ONCE = 20_000
"""Images whose outlines are kept at once, about 200 MB of COCO's; each such part reads the file."""

_DRAWN_FROM = "annotations "


def draw_coco_masks(
    root: Path | None, split: str | None, listener: Listener
) -> tuple[Path, Summary]:
    """Draw the masks of a split of COCO into ``SegmentationClass``, where ``open_coco`` looks.

    Args:
        root: Folder of the data set, as for ``open_coco``.
        split: ``train``, ``val``, or a list of images.
        listener: Who is told of masks that are there and cannot be compared with the annotations,
            of images whose mask cannot be drawn, and how it goes.

    Returns:
        The folder of the masks, and how many were drawn.

    Raises:
        DatasetError: The data set or its instances file is not there.
    """
    data = open_coco(root=root, split=split)
    base = find_coco(root)
    files = instance_files(base, split)
    if not files:
        raise DatasetError(
            f"no instances file in {base / 'annotations'}", "download COCO's annotations"
        )
    folder = base / MASK_FOLDER
    return folder, draw_masks(files, data.samples, data.classes, folder, listener)


def draw_masks(
    files: Sequence[Path],
    samples: Sequence[Sample],
    classes: tuple[str, ...],
    folder: Path,
    listener: Listener,
) -> Summary:
    """Draw ``folder/<id>.png`` for every sample that has none drawn from these files.

    Crowds are 255; of overlapping objects the smaller lies above, see ``outlines.draw``. Masks that
    do not say that they were drawn here may be anyone's work, and stay.

    Args:
        files: Instances files; each sample is looked for in all of them.
        samples: Images.
        classes: Class names in mask order.
        folder: Where the masks go.
        listener: As for ``draw_coco_masks``.

    Raises:
        DatasetError: A file is no instances file.
        WriteError: A mask cannot be written.
    """
    origins = {path: _origin(path, classes) for path in files}
    todo = _undrawn(samples, folder, {*origins.values()}, listener)
    failures: list[Failure] = []
    done = 0
    with listener.progress("masks") as progress:
        for part, mask_of, path in _parts(files, todo, classes):
            summary = for_each(
                partial(_draw_one, mask_of=mask_of, folder=folder, origin=origins.get(path, "")),
                part,
                workers=None,
                progress=part_of(progress, done, len(todo)),
                report=listener.report,
            )
            done += len(part)
            failures += summary.failures
    return Summary(len(todo) - len(failures), len(samples) - len(todo), tuple(failures))


def _draw_one(
    sample: Sample, mask_of: Callable[[Sample], UInt8Array], folder: Path, origin: str
) -> None:
    path = folder / f"{sample.id}.png"
    try:
        mask = mask_of(sample)
    except DatasetError:
        path.unlink(missing_ok=True)  # it was drawn here, from what the files no longer say
        raise
    write_mask(path, mask, origin=origin)


def _parts(
    files: Sequence[Path], samples: Sequence[Sample], classes: tuple[str, ...]
) -> Iterator[tuple[list[Sample], Callable[[Sample], UInt8Array], Path]]:
    """Yield samples, what draws them, and the file they are in, as many as memory holds."""
    unlisted = {image_key(sample.id): sample for sample in samples}
    for path in files:
        header = read_header(path)
        names = {key: image_key(id_or_text(item.name)) for key, item in header.pictures.items()}
        listed = iter([(k, unlisted.pop(name)) for k, name in names.items() if name in unlisted])
        while part := dict(islice(listed, _IMAGES_AT_ONCE)):
            keys = {sample.id: key for key, sample in part.items()}
            outlines = _read_outlines(header, part, classes)
            mask_of = partial(_mask, header=header, keys=keys, outlines=outlines)
            yield list(part.values()), mask_of, path
    yield list(unlisted.values()), partial(_refuse, files=files), Path()


def _refuse(_sample: Sample, files: Sequence[Path]) -> UInt8Array:
    raise DatasetError(f"not listed in {', '.join(map(str, files))}")


def _origin(path: Path, classes: tuple[str, ...]) -> str:
    """Return what a mask says that was drawn from a file.

    Raises:
        DatasetError: The file cannot be read.
    """
    try:
        return f"{_DRAWN_FROM}{digest([sha256_of(path), classes])}"
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error}", "check the path") from error


def _undrawn(
    samples: Sequence[Sample], folder: Path, origins: Container[str], listener: Listener
) -> list[Sample]:
    """Return the samples without a mask, or with one that was drawn here from other files."""
    unknown = []

    def is_drawn(sample: Sample) -> bool:
        path = folder / f"{sample.id}.png"
        origin = _origin_of(path)
        if origin is None or origin in origins:
            return origin is not None
        if not origin.startswith(_DRAWN_FROM):
            unknown.append(path)
        return not origin.startswith(_DRAWN_FROM)

    found = waiting(samples, is_drawn, listener)
    if unknown:
        listener.say(
            f"{len(unknown)} of {len(samples)} masks do not say what they were drawn from and are "
            f"kept, the first is {unknown[0]}; delete them to have them drawn"
        )
    return found


def _origin_of(path: Path) -> str | None:
    """Return what a mask says that it was drawn from; None if there is no mask."""
    try:
        return read_origin(path) if path.exists() else None
    except ImageError:
        return ""  # damaged: whoever reads it says so


def _read_outlines(
    header: Header, images: Container[ImageKey], classes: tuple[str, ...]
) -> dict[ImageKey, list[Outline | DatasetError]]:
    """Return the outlines of some images, an error for each that is of no use."""
    names = labels_of_classes(tuple(header.categories.values()), classes)
    values = {}
    for category, name in zip(header.categories, names, strict=True):
        with suppress(ProblemError):  # none of the classes: a failure only where an object is one
            index = name if isinstance(name, int) else class_index(name, classes)
            values[category] = value_of(index)
    found: dict[ImageKey, list[Outline | DatasetError]] = {}
    for entry in read_annotations(header.path):
        key = entry.get("image_id")
        if is_key(key) and key in images and (size := _size(header, key)):
            found.setdefault(key, []).append(_outline(entry, values, size))
    return found


def _outline(
    entry: dict[str, Any], values: dict[int, int], size: tuple[int, int]
) -> Outline | DatasetError:
    category = entry.get("category_id")
    if not isinstance(category, int) or category not in values:
        return DatasetError(f"category {printable(str(category))} is none of the classes")
    try:
        return parse_outline(entry, values[category], size)
    except DatasetError as error:
        return error


def _mask(
    sample: Sample,
    header: Header,
    keys: Mapping[str, ImageKey],
    outlines: dict[ImageKey, list[Outline | DatasetError]],
) -> UInt8Array:
    """Draw an image's mask; its outlines are forgotten.

    Raises:
        DatasetError: The file does not say its size, or an outline is of no use.
    """
    key = keys[sample.id]
    size = _size(header, key)
    if size is None:
        raise DatasetError(f"{header.path} does not say how large it is")
    found = []
    for outline in outlines.pop(key, []):
        if isinstance(outline, DatasetError):
            raise outline
        found.append(outline)
    return draw(found, size)


def _size(header: Header, key: ImageKey) -> tuple[int, int] | None:
    """Return (H, W) of an image, None if the file does not say, or says what none can be."""
    size = header.pictures[key].size
    return size if size is not None and size[0] * size[1] <= MAX_PIXELS else None
