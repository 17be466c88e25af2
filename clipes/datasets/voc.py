"""Pascal VOC 2012, and data sets laid out like it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from clipes.datasets.base import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    Dataset,
    check_classes,
    class_index,
    collect,
    find_base,
    index_files,
    read_split,
)
from clipes.datasets.labels import read_labels
from clipes.datasets.pictures import flat_mask_remarks, not_read, not_there
from clipes.datasets.problems import Kind, ProblemError
from clipes.errors import DatasetError
from clipes.types import Sample

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The classes of Pascal VOC in the order of its masks."""

_MAX_XML_BYTES = 2**20
_MASK_FOLDERS = ("SegmentationClass", "SegmentationClassAug")  # the last that has one wins
_PLACES = (
    "",
    "VOC2012",
    "VOCdevkit/VOC2012",
    "voc",
    "voc/VOC2012",
    "voc/VOCdevkit/VOC2012",
    "voc2012",
    "VOCtrainval_11-May-2012/VOCdevkit/VOC2012",
)


def open_voc(
    *,
    root: Path | None = None,
    split: str | None = None,
    labels: Path | None = None,
    classes: tuple[str, ...] | None = None,
    difficult: bool = True,
    labelled: bool = True,
) -> Dataset:
    """List the images of Pascal VOC, or of a data set laid out like it.

    Args:
        root: The folder that holds ``JPEGImages``, or one above it; if None, ``$CLIPES_DATA``, else
            ``datasets/``.
        split: Name of a list in ``ImageSets/Segmentation`` (``train`` if None), or path of one.
        labels: Label file read instead of ``Annotations``.
        classes: Class names in mask order; VOC's if None.
        difficult: Whether objects marked difficult count (in CLIP-ES they do).
        labelled: False lists the images without looking for labels.

    Returns:
        The images in the order of the split. Labels stand in the order in which the annotation
        first names them; masks come from ``SegmentationClassAug``, else ``SegmentationClass``.

    Raises:
        DatasetError: The data set, its split or its annotations are not there.
    """
    root = _find(root)
    names = VOC_CLASSES if classes is None else check_classes(classes, "classes")
    ids, failures = read_split(root, "train" if split is None else split)
    annotations = root / "Annotations"
    table = read_labels(labels, names, ids) if labelled and labels is not None else None
    if labelled and table is None and not annotations.is_dir():
        raise DatasetError(
            f"there is no folder {annotations}", "add it, or name a label file with --labels"
        )
    images = index_files(root / "JPEGImages", *IMAGE_SUFFIXES)
    unread = index_files(root / "JPEGImages", *UNREAD_SUFFIXES)
    capitals = {known.casefold(): known for known in images}
    folders = [root / name for name in _MASK_FOLDERS]
    masks = {id_: path for f in folders for id_, path in index_files(f, ".png").items()}

    def make(id_: str) -> Sample:
        if id_ not in images and id_ in unread:
            raise not_read(unread[id_])
        if id_ not in images:
            near = capitals.get(id_.casefold())
            raise not_there(id_, root / "JPEGImages", near, "it from the split")
        present: tuple[int, ...] = ()
        if table is not None:
            present = table.indices(id_, names)
        elif labelled:
            present = read_annotation(annotations / f"{id_}.xml", names, difficult=difficult)
        return Sample(id_, images[id_], present, masks.get(id_))

    remarks = table.remarks_on(names) if table is not None else ()
    data = collect("voc", root, names, ids, make, failures, remarks)
    used = {sample.mask for sample in data.samples}
    about_masks = flat_mask_remarks(folders, used, (*ids, "IMAGE")[0])
    return replace(data, remarks=(*data.remarks, *about_masks))


def read_annotation(
    path: Path, classes: tuple[str, ...], *, difficult: bool = True
) -> tuple[int, ...]:
    """Return the classes of the objects in a VOC annotation.

    Args:
        path: The XML file.
        classes: Class names in mask order.
        difficult: Whether objects marked difficult count.

    Returns:
        0-based classes, in the order of their first appearance.

    Raises:
        ProblemError: The file is missing or malformed, or it names no object or an unknown class.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_XML_BYTES + 1)
        if len(data) > _MAX_XML_BYTES:
            raise ProblemError(
                Kind.bad_annotation,
                f"{path} is larger than {_MAX_XML_BYTES // 2**20} MB",
                "is it an annotation?",
            )
        objects = fromstring(data).findall("object")
    except FileNotFoundError as error:
        raise ProblemError(
            Kind.bad_annotation,
            f"no annotation {path}",
            "add it, or name a label file with --labels",
        ) from error
    # The encoding named in the file may be unknown (LookupError) or of no use here (ValueError).
    except (OSError, ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise ProblemError(
            Kind.bad_annotation, f"cannot read {path}: {error}", "replace the file"
        ) from error
    present: dict[int, None] = {}
    for item in objects:
        if difficult or (item.findtext("difficult") or "").strip() != "1":
            name = (item.findtext("name") or "").strip()
            try:
                present[class_index(name, classes)] = None
            except ProblemError as error:
                raise ProblemError(error.kind, f"{path}: {error.what}", error.remedy) from error
    if objects and not present:
        raise ProblemError(Kind.shows_nothing, f"{path} names only difficult objects")
    if not present:
        raise ProblemError(
            Kind.no_labels,
            f"{path} names no object",
            "drop the image, or name a label file with --labels",
        )
    return tuple(present)


def _find(root: Path | None) -> Path:
    base = find_base(root)
    places = [base / place for place in _PLACES]
    for place in places:
        if (place / "JPEGImages").is_dir():
            return place
    raise DatasetError(
        f"no VOC data set: looked for a folder JPEGImages in {', '.join(map(str, places))}",
        "download VOC2012 (host.robots.ox.ac.uk/pascal/VOC/voc2012) and name its folder with "
        "--root or CLIPES_DATA",
    )
