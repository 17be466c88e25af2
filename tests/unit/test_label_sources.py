"""One set of labels, written in every format that is read, opens to the same samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipes.datasets import VOC_CLASSES, open_dataset
from clipes.datasets.labels import read_labels
from clipes.datasets.one_hot import one_hot_rows
from clipes.errors import ClipesError, DatasetError, UsageError
from clipes.run.folder import Run
from clipes.run.reopen import reopen
from tests.unit.coco_support import annotation, write_image, write_instances

CLASSES = ("cat", "dining table", "dog")
WANTED = {"a": (0, 1), "b": (2,), "c": (1, 2), "d": (0,)}

a_few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def one_hot(dtype: str = "uint8") -> np.ndarray:
    table = np.zeros((len(WANTED), len(CLASSES)), dtype)
    for row, labels in zip(table, WANTED.values(), strict=True):
        row[list(labels)] = 1
    return table


def names(labels: tuple[int, ...]) -> list[str]:
    return [CLASSES[k] for k in labels]


def write_csv(path: Path) -> None:
    rows = (f"{id_}.jpg,{';'.join(names(labels))}" for id_, labels in WANTED.items())
    path.write_text("\n".join(["image,labels", *rows]))


def write_csv_numbers(path: Path) -> None:
    rows = (f"{id_},{' '.join(map(str, labels))}" for id_, labels in WANTED.items())
    path.write_text("\n".join(["image,labels", *rows]))


def write_json_object(path: Path) -> None:
    path.write_text(json.dumps({id_: names(labels) for id_, labels in WANTED.items()}))


def write_json_list(path: Path) -> None:
    rows = [{"image": f"{id_}.jpg", "labels": labels} for id_, labels in WANTED.items()]
    path.write_text(json.dumps(rows))


def write_txt(path: Path) -> None:
    path.write_text("".join(f"{id_} {' '.join(map(str, k))}\n" for id_, k in WANTED.items()))


def write_txt_names(path: Path) -> None:
    path.write_text("".join(f"{id_}.jpg {'|'.join(names(k))}\n" for id_, k in WANTED.items()))


def write_npz(path: Path) -> None:
    np.savez(path, ids=np.array(list(WANTED)), labels=one_hot("float32"))


def write_npz_classes(path: Path) -> None:
    order = [2, 0, 1]
    np.savez_compressed(
        path,
        ids=np.array([f"{id_}.jpg" for id_ in WANTED]),
        labels=one_hot("bool")[:, order],
        classes=np.array(CLASSES)[order],
    )


def write_npy(path: Path) -> None:
    np.save(path, one_hot("int64"))


def write_coco(path: Path) -> None:
    images = [
        {"id": f"x{id_}", "file_name": f"some/where/{id_}.jpg", "height": 24, "width": 32}
        for id_ in WANTED
    ]
    objects = [annotation(f"x{i}", k + 1) for i, labels in WANTED.items() for k in labels]
    write_instances(path, images, objects, CLASSES)


WRITERS: list[tuple[str, Callable[[Path], None]]] = [
    ("x.csv", write_csv),
    ("x.csv", write_csv_numbers),
    ("x.json", write_json_object),
    ("x.json", write_json_list),
    ("x.json", write_coco),
    ("x.txt", write_txt),
    ("x.txt", write_txt_names),
    ("x.npz", write_npz),
    ("x.npz", write_npz_classes),
    ("x.npy", write_npy),
]


@pytest.fixture
def images(tmp_path):
    """Four images that any kind of data set finds, in a list called some."""
    root = tmp_path / "data"
    for id_ in WANTED:
        write_image(root / "JPEGImages" / f"{id_}.jpg")
    (root / "some.txt").write_text("\n".join(WANTED))
    return root


@pytest.mark.parametrize("kind", ["voc", "coco", "folder"])
@pytest.mark.parametrize(("name", "write"), WRITERS, ids=lambda item: getattr(item, "__name__", ""))
def test_every_format_says_the_same_to_every_data_set(tmp_path, images, kind, name, write):
    write(tmp_path / name)
    data = open_dataset(kind, root=images, split="some", labels=tmp_path / name, classes=CLASSES)
    assert {sample.id: sample.labels for sample in data.samples} == WANTED
    assert [s.image for s in data.samples] == [images / f"JPEGImages/{i}.jpg" for i in WANTED]
    assert (data.failures, data.empty, data.classes) == ((), (), CLASSES)


def test_annotations_and_folders_say_the_same(tmp_path):
    root = tmp_path / "voc"
    (root / "Annotations").mkdir(parents=True)
    (root / "train.txt").write_text("\n".join(WANTED))
    for id_, labels in WANTED.items():
        write_image(root / "JPEGImages" / f"{id_}.jpg")
        objects = "".join(f"<object><name>{name}</name></object>" for name in names(labels))
        (root / "Annotations" / f"{id_}.xml").write_text(f"<annotation>{objects}</annotation>")
    data = open_dataset("voc", root=root, classes=CLASSES)
    assert {sample.id: sample.labels for sample in data.samples} == WANTED

    single = {id_: labels for id_, labels in WANTED.items() if len(labels) == 1}
    for id_, labels in single.items():
        write_image(tmp_path / "folders" / CLASSES[labels[0]] / f"{id_}.jpg")
    data = open_dataset("folder", root=tmp_path / "folders", classes=CLASSES)
    assert {sample.id: sample.labels for sample in data.samples} == {
        f"{CLASSES[labels[0]]}_{id_}": labels for id_, labels in single.items()
    }


@pytest.mark.parametrize("write", [write_npz_classes, write_coco])
def test_a_file_that_lists_its_classes_gives_a_folder_its_own(tmp_path, images, write):
    path = tmp_path / ("x.json" if write is write_coco else "x.npz")
    write(path)
    data = open_dataset("folder", root=images, labels=path)
    order = CLASSES if write is write_coco else ("dog", "cat", "dining table")
    assert data.classes == order
    assert {s.id: sorted(order[k] for k in s.labels) for s in data.samples} == {
        id_: sorted(names(labels)) for id_, labels in WANTED.items()
    }


def test_a_label_file_in_the_folder_is_found_in_npz_too(images):
    write_npz_classes(images / "labels.npz")
    assert len(open_dataset("folder", root=images).samples) == 4
    write_csv(images / "labels.csv")
    with pytest.raises(DatasetError, match=r"labels\.csv and labels\.npz"):
        open_dataset("folder", root=images)


def test_an_array_of_zeros_says_that_an_image_shows_nothing(tmp_path, images):
    table = one_hot()
    table[1] = 0
    np.save(tmp_path / "x.npy", table)
    data = open_dataset(
        "folder", root=images, split="some", labels=tmp_path / "x.npy", classes=CLASSES
    )
    assert [sample.id for sample in data.samples] == ["a", "c", "d"]
    assert data.empty == ("b",)
    assert data.failures == ()


def test_coco_ids_may_be_numbers(tmp_path):
    for number in (9, 25):
        write_image(tmp_path / f"train2014/COCO_train2014_{number:012d}.jpg")
    table = np.zeros((2, 80), bool)
    table[[0, 1], [79, 3]] = True
    np.savez(tmp_path / "labels.npz", ids=np.array([25, 9]), labels=table)
    data = open_dataset("coco", root=tmp_path)
    assert {sample.id: sample.labels for sample in data.samples} == {
        "COCO_train2014_000000000025": (79,),
        "COCO_train2014_000000000009": (3,),
    }


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 3), np.uint8), "3 rows for 4 images"),
        (np.zeros((4, 2), np.uint8), "2 columns for 3 classes.*without background"),
        (np.full((4, 3), 2, np.uint8), "other than 0 and 1"),
        (np.full((4, 3), np.nan, np.float32), "other than 0 and 1"),
        (np.zeros(4, np.uint8), "one row of 0 and 1"),
        (np.zeros((4, 3), "U1"), "one row of 0 and 1"),
        (np.zeros((4, 3), "complex64"), "one row of 0 and 1"),
    ],
)
def test_arrays_of_another_form_are_refused(tmp_path, images, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DatasetError, match=message):
        open_dataset("voc", root=images, split="some", labels=tmp_path / "x.npy", classes=CLASSES)


def test_pickles_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, {"a": np.zeros(3)}, allow_pickle=True)  # as IRN's and MCTformer's labels come
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"pickled.*run code.*np\.savez\('labels\.npz'"):
            read_labels(path, CLASSES, list(WANTED))
        path.write_bytes(b"\x80\x04K\x01.")  # a bare pickle


def test_an_array_alone_needs_a_list(tmp_path, images):
    write_npy(tmp_path / "x.npy")
    with pytest.raises(DatasetError, match=r"--split, or save an \.npz"):
        open_dataset("folder", root=images, labels=tmp_path / "x.npy", classes=CLASSES)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros((1, 3))}, "no array 'ids'"),
        ({"ids": np.array(["a"])}, "no array 'labels'"),
        ({"ids": np.array([[1]]), "labels": np.zeros((1, 3))}, "'ids' is no list"),
        ({"ids": np.array([1.5]), "labels": np.zeros((1, 3))}, "'ids' is no list"),
        ({"ids": np.array(["a", "b"]), "labels": np.zeros((1, 3))}, "1 rows for 2 images"),
    ],
)
def test_archives_of_another_form_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DatasetError, match=message):
        read_labels(tmp_path / "x.npz", CLASSES)


def test_difficult_objects_may_be_left_out_of_voc_only(tmp_path, images):
    (images / "Annotations").mkdir()
    hard = "<object><name>cat</name><difficult>1</difficult></object>"
    easy = "<object><name>dog</name><difficult>0</difficult></object>"
    for id_, objects in {"a": hard + easy, "b": hard, "c": easy, "d": ""}.items():
        path = images / "Annotations" / f"{id_}.xml"
        path.write_text(f"<annotation>{objects}</annotation>")
    data = open_dataset("voc", root=images, split="some", difficult=False)
    dog = VOC_CLASSES.index("dog")
    assert {sample.id: sample.labels for sample in data.samples} == {"a": (dog,), "c": (dog,)}
    assert data.empty == ("b",)
    assert [failure.id for failure in data.failures] == ["d"]
    run = Run(tmp_path / "run")
    settings = {"dataset": "voc", "split": "some", "labels": None, "classes": VOC_CLASSES}
    run.begin("cam", settings | {"difficult": False}, "clipes cam", {"root": str(images)})
    assert reopen(run, None) == data
    write_csv(tmp_path / "x.csv")
    for options in ({"kind": "folder"}, {"kind": "voc", "labels": tmp_path / "x.csv"}):
        with pytest.raises(UsageError, match="--no-difficult"):
            open_dataset(options.pop("kind"), root=images, difficult=False, **options)


@pytest.mark.parametrize("kind", ["voc", "coco", "folder"])
def test_images_can_be_listed_without_labels(images, kind):
    data = open_dataset(kind, root=images, split="some", labelled=False)
    assert [(sample.id, sample.labels) for sample in data.samples] == [(i, ()) for i in WANTED]
    assert data.failures == ()


def test_a_folder_without_labels_lists_sub_folders_too(tmp_path):
    for name in ("1.jpg", "x/1.jpg", "x/2.jpg"):
        write_image(tmp_path / name)
    data = open_dataset("folder", root=tmp_path, labelled=False)
    assert {sample.id: sample.image for sample in data.samples} == {
        "1": tmp_path / "1.jpg",
        "x_1": tmp_path / "x/1.jpg",
        "x_2": tmp_path / "x/2.jpg",
    }
    assert data.classes == ()
    # What tags are written under is found again.
    (tmp_path / "tags.csv").write_text("image,labels\n1.jpg,cat\nx_1.jpg,dog\nx_2.jpg,\n")
    again = open_dataset("folder", root=tmp_path, labels=tmp_path / "tags.csv")
    assert {sample.id: sample.image for sample in again.without_unlabelled().samples} == {
        "1": tmp_path / "1.jpg",
        "x_1": tmp_path / "x/1.jpg",
    }
    assert again.without_unlabelled().empty == ("x_2",)


MAGIC = b"\x93NUMPY\x01\x00"
HEADERS = st.builds(
    "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}".format,
    st.sampled_from(["'<f8'", "'|O'", "'<U4'", "'|b1'", "[('a', '<i4')]", "'x'", "3"]),
    st.sampled_from(["(4, 3)", "(9999999999, 80)", "()", "(-1,)", "3", "(2, 2, 2)"]),
)


@a_few
@given(
    st.sampled_from(["x.npy", "x.npz"]),
    st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=60).map(lambda tail: MAGIC + tail),
        st.builds(
            lambda header, tail: MAGIC + len(header).to_bytes(2, "little") + header.encode() + tail,
            HEADERS,
            st.binary(max_size=120),
        ),
    ),
)
def test_no_array_file_raises_anything_else(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with suppress(ClipesError):
        one_hot_rows(path, CLASSES, list(WANTED))
