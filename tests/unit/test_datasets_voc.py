from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clipes.datasets import DATASETS, VOC_CLASSES, open_dataset, open_voc
from clipes.datasets.base import image_id, read_split
from clipes.datasets.problems import Kind
from clipes.datasets.voc import read_annotation
from clipes.errors import ClipesError, DatasetError, UsageError

CAT, DOG, PERSON = (VOC_CLASSES.index(name) for name in ("cat", "dog", "person"))

a_few = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def annotation(*objects: str | tuple[str, int]) -> str:
    pairs = [item if isinstance(item, tuple) else (item, 0) for item in objects]
    body = "".join(
        f"<object><name>{name}</name><part><name>head</name></part>"
        f"<difficult>{difficult}</difficult></object>"
        for name, difficult in pairs
    )
    return f"<annotation><folder>VOC2012</folder>{body}</annotation>"


def make_voc(root: Path, images: dict[str, str], split: str | None = None) -> Path:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for id_, xml in images.items():
        (root / "JPEGImages" / f"{id_}.jpg").touch()
        (root / "Annotations" / f"{id_}.xml").write_text(xml)
    text = "\n".join(images) if split is None else split
    (root / "ImageSets/Segmentation/train.txt").write_text(text)
    return root


@pytest.fixture
def voc(tmp_path):
    images = {
        "2007_000002": annotation("dog", "cat", "dog", ("person", 1)),
        "2007_000001": annotation("person"),
    }
    return make_voc(tmp_path / "VOC2012", images)


def test_labels_stand_in_the_order_of_the_annotation(voc):
    data = open_dataset("voc", root=voc)
    assert [(sample.id, sample.labels) for sample in data.samples] == [
        ("2007_000002", (DOG, CAT, PERSON)),
        ("2007_000001", (PERSON,)),
    ]
    assert data.samples[0].image == voc / "JPEGImages/2007_000002.jpg"
    assert (data.name, data.root, data.classes, data.failures) == ("voc", voc, VOC_CLASSES, ())


def test_of_two_files_with_one_name_the_jpeg_is_the_image(voc):
    (voc / "JPEGImages/2007_000001.png").touch()
    assert open_voc(root=voc).samples[1].image.suffix == ".jpg"


def test_difficult_objects_can_be_left_out(voc):
    assert open_voc(root=voc, difficult=False).samples[0].labels == (DOG, CAT)


def test_augmented_masks_come_first_and_no_mask_is_none(voc):
    (voc / "SegmentationClass/2007_000001.png").touch()
    assert [sample.mask for sample in open_voc(root=voc).samples] == [
        None,
        voc / "SegmentationClass/2007_000001.png",
    ]
    (voc / "SegmentationClassAug").mkdir()
    (voc / "SegmentationClassAug/2007_000001.png").touch()
    assert open_voc(root=voc).samples[1].mask == voc / "SegmentationClassAug/2007_000001.png"


def test_pictures_and_masks_of_other_kinds_are_said(voc):
    masks = voc / "SegmentationClass"
    for name in ("2007_000001.png", "2007_000099.png", "2007_000002.jpg"):
        (masks / name).touch()
    (voc / "JPEGImages/2007_000002.jpg").rename(voc / "JPEGImages/2007_000002.HEIC")
    data = open_voc(root=voc)
    assert [sample.id for sample in data.samples] == ["2007_000001"]
    (problem,) = data.failures
    assert (problem.id, problem.kind) == ("2007_000002", Kind.unreadable_image)
    assert problem.reason.endswith(
        "2007_000002.HEIC is there, but .heic is not read; convert it to JPEG"
    )
    # Masks of images that the list does not name are usual.
    assert data.remarks == (
        f"masks: 1 of 3 files in {masks} are not used, the first is 2007_000002.jpg: a mask is a "
        "PNG called after its image, such as 2007_000002.png",
    )
    (masks / "2007_000001.png").rename(masks / "2007_000001_mask.png")
    assert "masks: 3 of 3 files" in open_voc(root=voc).remarks[0]


@pytest.mark.parametrize("place", ["VOC2012", "VOCdevkit/VOC2012", "voc", "voc2012", "."])
def test_usual_places_are_found(tmp_path, monkeypatch, place):
    make_voc(tmp_path / "data" / place, {"2007_000001": annotation("cat")})
    assert len(open_dataset("voc", root=tmp_path / "data").samples) == 1
    monkeypatch.setenv("CLIPES_DATA", str(tmp_path / "data"))
    assert len(open_dataset("voc").samples) == 1
    monkeypatch.delenv("CLIPES_DATA")
    (tmp_path / "data").rename(tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("voc").samples) == 1


def test_absent_data_says_what_where_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLIPES_DATA", raising=False)
    with pytest.raises(DatasetError) as caught:
        open_dataset("voc")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("JPEGImages", "datasets/VOC2012", "datasets/VOCdevkit/VOC2012", "--root"):
        assert part in message
    monkeypatch.setenv("CLIPES_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DatasetError, match="nowhere; check the path given by CLIPES_DATA"):
        open_dataset("voc")
    with pytest.raises(DatasetError, match="elsewhere; check the path given by --root"):
        open_dataset("voc", root=tmp_path / "elsewhere")


def test_what_is_wrong_with_one_image_does_not_stop_the_others(tmp_path):
    images = {
        "good": annotation("cat"),
        "empty": annotation(),
        "typo": annotation("person", "motobike"),
        "number": annotation("3"),
        "broken": "<annotation><object>",
        "no_xml": "",
        "no_image": annotation("cat"),
    }
    root = make_voc(tmp_path, images)
    (root / "Annotations/no_xml.xml").unlink()
    (root / "JPEGImages/no_image.jpg").unlink()
    data = open_dataset("voc", root=root)
    assert [sample.id for sample in data.samples] == ["good"]
    reasons = {failure.id: failure.reason for failure in data.failures}
    assert list(reasons) == list(images)[1:]
    assert "names no object" in reasons["empty"]
    assert "unknown class 'motobike'; did you mean 'motorbike'?" in reasons["typo"]
    assert "unknown class '3'" in reasons["number"]
    assert "cannot read" in reasons["broken"]
    assert "no annotation" in reasons["no_xml"]
    assert reasons["no_image"].endswith("JPEGImages; add it, or drop it from the split")
    (root / "JPEGImages/No_Image.jpg").touch()
    (again,) = [f for f in open_dataset("voc", root=root).failures if f.id == "no_image"]
    assert again.reason.endswith("JPEGImages; did you mean No_Image? Capitals count")
    assert all(";" in reason and "\n" not in reason for reason in reasons.values())


@pytest.mark.parametrize(
    "line",
    [
        "2007_000001",
        "2007_000001.jpg",
        "  2007_000001  \r",
        "/JPEGImages/2007_000001.jpg /SegmentationClassAug/2007_000001.png",
        "JPEGImages\\2007_000001.jpg",
        "2007_000001 14 5",
    ],
)
def test_split_lines_in_every_usual_form(voc, tmp_path, line):
    path = tmp_path / "mine.lst"
    path.write_text(f"\ufeff\n{line}\n\n{line}\n", encoding="utf-8")
    data = open_dataset("voc", root=voc, split=str(path))
    assert [sample.id for sample in data.samples] == ["2007_000001"]
    assert data.failures == ()


@pytest.mark.parametrize(
    "line", ["../2007_000001", "a/../../b.jpg", "..", ".hidden", "C:x", "a\x00b"]
)
def test_ids_that_are_no_plain_names_become_failures(voc, tmp_path, line):
    path = tmp_path / "mine.txt"
    path.write_text(f"2007_000001\n{line}\n")
    data = open_dataset("voc", root=voc, split=str(path))
    assert [sample.id for sample in data.samples] == ["2007_000001"]
    assert [failure.id.isprintable() for failure in data.failures] == [True]
    assert "line 2" in data.failures[0].reason


def test_an_absent_split_lists_the_present_ones(voc, tmp_path):
    with pytest.raises(DatasetError, match=r"'vall'.*vall\.txt.*name one of train or"):
        open_dataset("voc", root=voc, split="vall")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DatasetError, match="lists no image"):
        open_dataset("voc", root=voc, split=str(tmp_path / "empty.txt"))


def test_a_label_file_replaces_the_annotations(voc, tmp_path):
    (voc / "Annotations/2007_000001.xml").unlink()
    labels = tmp_path / "labels.txt"
    labels.write_text("2007_000001 14 cat 14\n2007_000009 cow\n")
    data = open_dataset("voc", root=voc, labels=labels)
    assert [(sample.id, sample.labels) for sample in data.samples] == [("2007_000001", (14, CAT))]
    assert [failure.id for failure in data.failures] == ["2007_000002"]
    assert "no labels in" in data.failures[0].reason


def test_no_annotations_at_all_is_fatal(voc):
    for path in (voc / "Annotations").iterdir():
        path.unlink()
    (voc / "Annotations").rmdir()
    with pytest.raises(DatasetError, match="Annotations; add it, or name a label file"):
        open_dataset("voc", root=voc)


def test_other_classes_can_be_given(tmp_path):
    root = make_voc(tmp_path, {"a": annotation("zebra", "emu")})
    data = open_dataset("voc", root=root, classes=("emu", "zebra"))
    assert (data.classes, data.samples[0].labels) == (("emu", "zebra"), (1, 0))


def test_entities_and_oversized_annotations_are_refused(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
        "<annotation><object><name>&x;</name></object></annotation>"
    )
    with pytest.raises(DatasetError, match="cannot read"):
        read_annotation(path, VOC_CLASSES)
    path.write_text(annotation("cat") + " " * 2**20)
    with pytest.raises(DatasetError, match="larger than 1 MB"):
        read_annotation(path, VOC_CLASSES)
    path.write_text("<a>" * 100_000 + "</a>" * 100_000)
    with pytest.raises(DatasetError, match="names no object"):
        read_annotation(path, VOC_CLASSES)


@a_few
@given(
    st.one_of(
        st.binary(max_size=80),
        st.text(max_size=80).map(lambda text: annotation(text).encode("utf-8", "ignore")),
        st.text(max_size=20).map(
            lambda text: f'<?xml version="1.0" encoding="{text}"?><a/>'.encode("utf-8", "ignore")
        ),
    )
)
def test_no_annotation_raises_anything_else(tmp_path, content):
    path = tmp_path / "a.xml"
    path.write_bytes(content)
    with suppress(DatasetError):
        assert read_annotation(path, VOC_CLASSES)


@a_few
@given(st.text(max_size=60))
def test_an_id_is_never_a_way_out(tmp_path, name):
    try:
        id_ = image_id(name)
    except DatasetError:
        return
    assert (tmp_path / f"{id_}.png").parent.resolve() == tmp_path.resolve()
    assert ".." not in id_
    assert "/" not in id_
    assert image_id(f"{id_}.jpg") == id_


@a_few
@given(
    st.one_of(
        st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace"))
    )
)
def test_no_split_file_raises_anything_else(tmp_path, content):
    path = tmp_path / "split.txt"
    path.write_bytes(content)
    with suppress(DatasetError):
        ids, failures = read_split(tmp_path, "split")
        assert ids or failures
        assert len(set(ids)) == len(ids)


@a_few
@example("\0")
@given(st.text(max_size=300))
def test_no_argument_raises_anything_else(voc, text):
    for option in ({"split": text}, {"root": Path(text)}, {"labels": Path(text)}):
        with suppress(ClipesError):
            assert open_dataset("voc", **{"root": voc, **option}).root == voc


def test_unknown_kind_of_data_set():
    with pytest.raises(UsageError, match="unknown data set 'vok'; choose one of voc, coco, folder"):
        open_dataset("vok")
    assert {"voc", "coco", "folder"} <= set(DATASETS)


def test_the_sample_agrees_with_a_plain_reading(shared):
    root = shared / "data/voc_sample"
    data = open_dataset("voc", root=root)
    assert data.failures == ()
    assert [sample.id for sample in data.samples] == (
        root / "ImageSets/Segmentation/train.txt"
    ).read_text().split()
    for sample in data.samples:
        tree = ElementTree.parse(root / "Annotations" / f"{sample.id}.xml")  # trusted file
        names = [item.find("name").text for item in tree.iter("object")]
        assert [VOC_CLASSES[label] for label in sample.labels] == sorted(
            set(names), key=names.index
        )
        assert sample.image.is_file()
        assert sample.mask.is_file()
