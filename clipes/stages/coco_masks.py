"""Ground-truth masks drawn from the outlines in COCO's instances files."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from clipes.datasets.base import printable
from clipes.datasets.coco import MASK_FOLDER, find_coco, image_key, instance_files, open_coco
from clipes.datasets.instances import (
    Header,
    ImageKey,
    is_key,
    read_annotations,
    read_header,
)
from clipes.datasets.outlines import Outline, draw, parse_outline
from clipes.datasets.rows import id_or_text, labels_of_classes
from clipes.disk.files import sha256_of
from clipes.disk.images import MAX_PIXELS, read_origin, write_mask
from clipes.errors import DatasetError, ImageError
from clipes.run.loop import Summary
from clipes.run.origin import digest
from clipes.types import Failure, Progress, Sample, UInt8Array

_IMAGES_AT_ONCE = 20_000
"""Images whose outlines are kept at once, about 200 MB of COCO's; each such part reads the file."""

_DRAWN_FROM = "annotations "


def draw_coco_masks(
    root: Path | None,
    split: str | None,
    *,
    progress: Progress,
    say: Callable[[str], None],
    report: Callable[[Failure], None],
) -> tuple[Path, Summary]:
    """Draw the masks of a split of COCO into ``SegmentationClass``, where ``open_coco`` looks.

    Args:
        root: Folder of the data set, as for ``open_coco``.
        split: ``train``, ``val``, or a list of images.
        progress: Called after each image.
        say: Told of masks that are there and cannot be compared with the annotations.
        report: Called with each image whose mask cannot be drawn; the others go on.

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
    summary = draw_masks(files, data.samples, data.classes, folder, progress, say, report)
    return folder, summary


def draw_masks(
    files: Sequence[Path],
    samples: Sequence[Sample],
    classes: tuple[str, ...],
    folder: Path,
    progress: Progress,
    say: Callable[[str], None],
    report: Callable[[Failure], None],
) -> Summary:
    """Draw ``folder/<id>.png`` for every sample that has none drawn from these files.

    Crowds are 255; of overlapping objects the smaller lies above, see ``outlines.draw``. Masks that
    do not say that they were drawn here may be anyone's work, and stay.

    Args:
        files: Instances files; each sample is looked for in all of them.
        samples: Images.
        classes: Class names in mask order.
        folder: Where the masks go.
        progress: Called after each image.
        say: Told of masks that may be anyone's.
        report: Called with each image whose mask cannot be drawn.

    Raises:
        DatasetError: A file is no instances file.
        ArtifactError: A mask cannot be written.
    """
    origins = {path: _origin(path, classes) for path in files}
    todo = {image_key(s.id): s for s in _waiting(samples, folder, {*origins.values()}, say)}
    total = len(todo)
    failures: list[Failure] = []
    done = 0
    progress(0, total)

    def finish(sample: Sample, mask: UInt8Array | DatasetError, origin: str = "") -> None:
        nonlocal done
        done += 1
        path = folder / f"{sample.id}.png"
        if isinstance(mask, DatasetError):
            path.unlink(missing_ok=True)  # it was drawn here, from what the files no longer say
            failures.append(Failure(sample.id, str(mask)))
            report(failures[-1])
        else:
            write_mask(path, mask, origin=origin)
        progress(done, total)

    for path in files:
        header = read_header(path)
        keys = {key: image_key(id_or_text(item.name)) for key, item in header.pictures.items()}
        wanted = iter([(key, todo.pop(name)) for key, name in keys.items() if name in todo])
        while part := dict(islice(wanted, _IMAGES_AT_ONCE)):
            outlines = _read_outlines(header, part, classes)
            for key, sample in part.items():
                finish(sample, _mask(header, key, outlines.pop(key, [])), origins[path])
    for sample in todo.values():
        finish(sample, DatasetError(f"not listed in {', '.join(map(str, files))}"))
    return Summary(total - len(failures), len(samples) - total, tuple(failures))


def _origin(path: Path, classes: tuple[str, ...]) -> str:
    """Return what a mask says that was drawn from a file.

    Raises:
        DatasetError: The file cannot be read.
    """
    try:
        return f"{_DRAWN_FROM}{digest([sha256_of(path), classes])}"
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error}", "check the path") from error


def _waiting(
    samples: Sequence[Sample], folder: Path, origins: Container[str], say: Callable[[str], None]
) -> list[Sample]:
    """Return the samples without a mask, or with one that was drawn here from other files."""
    waiting, unknown = [], []
    for sample in samples:
        path = folder / f"{sample.id}.png"
        origin = _origin_of(path)
        if origin is None or (origin.startswith(_DRAWN_FROM) and origin not in origins):
            waiting.append(sample)
        elif origin not in origins:
            unknown.append(path)
    if unknown:
        say(
            f"{len(unknown)} of {len(samples)} masks do not say what they were drawn from and are "
            f"kept, the first is {unknown[0]}; delete them to have them drawn"
        )
    return waiting


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
    values = {
        category: 1 + (name if isinstance(name, int) else classes.index(name))
        for category, name in zip(header.categories, names, strict=True)
        if isinstance(name, int) or name in classes
    }
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
    header: Header, key: ImageKey, outlines: Sequence[Outline | DatasetError]
) -> UInt8Array | DatasetError:
    size = _size(header, key)
    if size is None:
        return DatasetError(f"{header.path} does not say how large it is")
    for outline in outlines:
        if isinstance(outline, DatasetError):
            return outline
    return draw([item for item in outlines if isinstance(item, Outline)], size)


def _size(header: Header, key: ImageKey) -> tuple[int, int] | None:
    """Return (H, W) of an image, None if the file does not say, or says what none can be."""
    size = header.pictures[key].size
    return size if size is not None and size[0] * size[1] <= MAX_PIXELS else None
