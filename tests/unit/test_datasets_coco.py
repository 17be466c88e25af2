from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipes.datasets import COCO_CLASSES, instances, open_dataset
from clipes.datasets.coco import image_key
from clipes.datasets.instances import instance_rows, is_instances, read_header
from clipes.datasets.labels import read_labels
from clipes.datasets.problems import Kind
from clipes.disk.images import read_mask, write_mask
from clipes.errors import ClipesError, DatasetError, UsageError
from tests.unit.coco_support import (
    CATEGORY_IDS,
    annotation,
    categories,
    picture,
    write_image,
    write_instances,
)

CAT, DOG, PERSON = (COCO_CLASSES.index(name) for name in ("cat", "dog", "person"))

a_few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def coco(tmp_path):
    """Four training images, the third without objects, and one for validation."""
    root = tmp_path / "coco"
    images = [picture(number) for number in (9, 25, 30, 581921)]
    objects = [
        annotation(25, CATEGORY_IDS[DOG]),
        annotation(9, CATEGORY_IDS[CAT]),
        annotation(25, CATEGORY_IDS[PERSON], iscrowd=1),
        annotation(9, CATEGORY_IDS[CAT]),
        annotation(581921, 90),
    ]
    write_instances(root / "annotations/instances_train2014.json", images, objects)
    for item in images:
        write_image(root / "train2014" / item["file_name"])
    item = picture(42, "val")
    write_instances(
        root / "annotations/instances_val2014.json", [item], [annotation(42, CATEGORY_IDS[DOG])]
    )
    write_image(root / "val2014" / item["file_name"])
    return root


def labels_of(data):
    return {sample.id: sample.labels for sample in data.samples}


def reasons(data):
    return {failure.id: failure.reason for failure in data.failures}


def test_the_official_layout(coco):
    data = open_dataset("coco", root=coco)
    assert data.name == "coco"
    assert data.classes == COCO_CLASSES
    assert labels_of(data) == {
        "COCO_train2014_000000000009": (CAT,),
        "COCO_train2014_000000000025": (DOG, PERSON),  # in the order of the annotations
        "COCO_train2014_000000581921": (79,),
    }
    assert data.samples[0].image == coco / "train2014/COCO_train2014_000000000009.jpg"
    assert data.failures == ()
    assert data.empty == ("000000000030",)
    for split in ("train2014", "train"):
        assert open_dataset("coco", root=coco, split=split) == data
    assert labels_of(open_dataset("coco", root=coco, split="val")) == {
        "COCO_val2014_000000000042": (DOG,)
    }


def test_pictures_and_masks_of_other_kinds_are_said(coco):
    path = coco / "train2014/COCO_train2014_000000000009.jpg"
    path.rename(path.with_suffix(".heic"))
    (coco / "SegmentationClass").mkdir()
    (coco / "SegmentationClass/000000000025.jpg").touch()
    data = open_dataset("coco", root=coco)
    assert reasons(data) == {
        "000000000009": f"{path.with_suffix('.heic')} is there, but .heic is not read; "
        "convert it to JPEG"
    }
    assert data.remarks == (
        f"masks: 1 of 1 files in {coco}/SegmentationClass are not used, the first is "
        "000000000025.jpg: a mask is a PNG called after its image, such as 000000000009.png",
    )


def test_eighty_classes_in_the_order_of_ninety_ids(coco):
    header = read_header(coco / "annotations/instances_train2014.json")
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert [COCO_CLASSES.index(name) for name in header.categories.values()] == list(range(80))
    assert header.categories[1] == "person"
    assert header.categories[13] == "stop sign"
    assert header.categories[90] == "toothbrush"


@pytest.mark.parametrize("below", ["train2014", "images/train2014", "JPEGImages/train2014"])
def test_images_are_found_where_they_usually_are(coco, below):
    target = coco / below
    if below != "train2014":
        target.parent.mkdir()
        (coco / "train2014").rename(target)
    data = open_dataset("coco", root=coco)
    assert len(data.samples) == 3
    assert data.samples[0].image.parent == target


def test_the_usual_places_of_the_data_set_are_found(coco, tmp_path, monkeypatch):
    assert open_dataset("coco", root=tmp_path).root == coco
    monkeypatch.setenv("CLIPES_DATA", str(tmp_path))
    assert open_dataset("coco").root == coco
    with pytest.raises(DatasetError, match=r"no COCO data set: looked for .*train2014.*--root"):
        open_dataset("coco", root=coco / "annotations")


@pytest.mark.parametrize(
    "lines",
    [
        "COCO_train2014_000000581921\nCOCO_val2014_000000000042\n",
        "000000581921\n000000000042\n000000581921.jpg\n",
        "train2014/COCO_train2014_000000581921.jpg\nval2014/COCO_val2014_000000000042.jpg\n",
        "581921 79\n42 16\n",
    ],
)
def test_a_list_may_name_images_in_any_usual_way_and_mix_the_splits(coco, lines):
    (coco / "mine.txt").write_text(lines)
    for split in ("mine", str(coco / "mine.txt")):
        data = open_dataset("coco", root=coco, split=split)
        assert labels_of(data) == {
            "COCO_train2014_000000581921": (79,),
            "COCO_val2014_000000000042": (DOG,),
        }
        assert data.failures == ()


def test_a_list_called_train_restricts_the_split(coco):
    (coco / "train.txt").write_text("000000000009 15\n000000000777 15\n")
    data = open_dataset("coco", root=coco)
    assert labels_of(data) == {"COCO_train2014_000000000009": (CAT,)}
    assert list(reasons(data)) == ["000000000777"]


def test_clip_es_label_lines(coco):
    path = coco / "clip-es.txt"
    path.write_text(f"COCO_train2014_000000000009 {DOG} {PERSON}\n000000000025 {CAT}\n")
    data = open_dataset("coco", root=coco, split=str(path), labels=path)
    assert labels_of(data) == {
        "COCO_train2014_000000000009": (DOG, PERSON),
        "COCO_train2014_000000000025": (CAT,),
    }


def test_both_names_of_one_image_are_a_duplicate(coco):
    path = coco / "twice.txt"
    path.write_text("COCO_train2014_000000000009 1\n000000000009 1\n000000000025 1\n")
    data = open_dataset("coco", root=coco, labels=path)
    assert set(labels_of(data)) == {"COCO_train2014_000000000025"}
    kinds = {failure.id: failure.kind for failure in data.failures}
    assert kinds["000000000009"] is Kind.duplicate_id


def test_a_folder_that_is_not_divided(tmp_path):
    write_image(tmp_path / "JPEGImages/000000000025.jpg")
    write_image(tmp_path / "JPEGImages/other.jpg")
    write_mask(tmp_path / "SegmentationClass/000000000025.png", np.zeros((24, 32), np.uint8))
    (tmp_path / "labels.txt").write_text("000000000025 23\nother giraffe\n")
    data = open_dataset("coco", root=tmp_path)
    assert labels_of(data) == {"000000000025": (23,), "other": (23,)}
    assert data.samples[0].mask == tmp_path / "SegmentationClass/000000000025.png"
    assert data.samples[1].mask is None
    assert open_dataset("coco", root=tmp_path, split="train") == data
    with pytest.raises(DatasetError, match="no list of images 'val'"):
        open_dataset("coco", root=tmp_path, split="val")


@pytest.mark.parametrize(
    "place",
    [
        "SegmentationClass/000000000009.png",
        "masks/COCO_train2014_000000000009.png",
        "SegmentationClass/train2014/COCO_train2014_000000000009.png",
    ],
)
def test_masks_are_found_under_any_name_of_the_image(coco, place):
    write_mask(coco / place, np.zeros((24, 32), np.uint8))
    masks = [sample.mask for sample in open_dataset("coco", root=coco).samples]
    assert masks == [coco / place, None, None]


def test_missing_pieces_say_what_and_where(coco):
    (coco / "train2014/COCO_train2014_000000000009.jpg").unlink()
    write_image(coco / "train2014/COCO_train2014_000000000777.jpg")
    data = open_dataset("coco", root=coco)
    assert [(f.id, f.kind) for f in data.failures] == [
        ("000000000009", Kind.missing_image),
        ("000000000777", Kind.no_labels),
    ]
    (coco / "some.txt").write_text("COCO_train2014_000000000778\n")
    (listed,) = open_dataset("coco", root=coco, split="some").failures
    assert listed.kind is Kind.missing_image
    (coco / "annotations/instances_train2014.json").unlink()
    with pytest.raises(DatasetError, match=r"instances_train2014\.json in .*annotations"):
        open_dataset("coco", root=coco)
    with pytest.raises(UsageError, match="no-difficult"):
        open_dataset("coco", root=coco, difficult=False)


def test_categories_with_other_names_go_by_their_order(tmp_path):
    names = [f"Klasse {k}" for k in range(80)]
    path = write_instances(
        tmp_path / "i.json", [picture(1)], [annotation(1, 90), annotation(1, 1)], names
    )
    assert read_labels(path, COCO_CLASSES).indices("COCO_train2014_000000000001", COCO_CLASSES) == (
        79,
        0,
    )
    few = ("Klasse 79", "Klasse 0")
    assert read_labels(path, few).indices("COCO_train2014_000000000001", few) == (0, 1)
    # A known name in another place says that the order is another, too.
    moved = (*names[1:], "zebra")
    with pytest.raises(DatasetError, match="unknown class 'Klasse 0'"):
        read_labels(path, moved).indices("COCO_train2014_000000000001", moved)
    other = ("Klasse 79", "zebra")
    with pytest.raises(DatasetError, match="unknown class 'Klasse 0'"):
        read_labels(path, other).indices("COCO_train2014_000000000001", other)


def test_files_whose_names_are_no_ids_are_failures(tmp_path):
    write_image(tmp_path / "JPEGImages/a..b.jpg")
    write_image(tmp_path / "JPEGImages/1.jpg")
    (tmp_path / "labels.txt").write_text("1 0\n")
    data = open_dataset("coco", root=tmp_path, labelled=False)
    assert [sample.id for sample in data.samples] == ["1"]
    assert [failure.kind for failure in data.failures] == [Kind.unusable_entry]


def test_bad_entries_of_an_instances_file(tmp_path):
    pictures = [picture(1), picture(2)]
    objects = [annotation(1, 17), annotation(2, 12), annotation(77, 1)]
    table = read_labels(write_instances(tmp_path / "i.json", pictures, objects), COCO_CLASSES)
    assert set(table.rows) == {"COCO_train2014_000000000001"}
    assert {key: problem.kind for key, problem in table.problems.items()} == {
        "COCO_train2014_000000000002": Kind.unknown_class,
        "annotations": Kind.unusable_entry,
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"images": [picture(1)], "annotations": [], "categories": []}, "no list 'categories'"),
        ({"annotations": [annotation(1, 1)], "categories": categories()}, "no list 'images'"),
        ({"images": [{"id": 1}], "categories": categories()}, "image 1 has no id"),
        ({"images": [picture(1), picture(1)], "categories": categories()}, "image 2 has no id"),
        ({"images": [picture(1)], "categories": [{"id": "1", "name": "a"}]}, "category 1"),
        ({"images": [picture(1)], "annotations": [{"image_id": 1}]}, "no category_id"),
        ({"images": [picture(1)], "annotations": [{"category_id": 1}]}, "no image_id"),
    ],
)
def test_what_is_no_instances_file_is_said_in_one_line(tmp_path, value, message):
    path = tmp_path / "i.json"
    path.write_text(json.dumps(value))
    assert is_instances(path)
    with pytest.raises(DatasetError, match=message):
        read_labels(path, COCO_CLASSES)


@pytest.mark.parametrize(
    "text",
    [
        '{"a.jpg": ["cat"], "images": [{}]}',
        '{"images": ["cat"]}',
        '{"a.jpg": "cat"}',
        '[{"images": [{}]}]',
        '{"deep": {"images": [{}]}}',
        "{",
        "",
        "3",
    ],
)
def test_label_files_are_not_taken_for_instances(tmp_path, text):
    path = tmp_path / "i.json"
    path.write_text(text)
    assert not is_instances(path)


def test_an_instances_file_is_streamed(tmp_path):
    """20 MB of outlines, but only what the few images are about is kept."""
    path = tmp_path / "i.json"
    outline = f"[[{', '.join(f'{k}.{0:0190d}' for k in range(600))}]]"  # few, but long numbers
    with path.open("w") as file:
        file.write(f'{{"images": {json.dumps([picture(k) for k in range(50)])}, "annotations": [')
        for k in range(180):
            file.write("," if k else "")
            entry = annotation(k % 50, CATEGORY_IDS[k % 80], 0)
            file.write(json.dumps(entry).replace('"segmentation": 0', f'"segmentation": {outline}'))
        file.write(f'], "categories": {json.dumps(categories())}}}')
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    rows = instance_rows(path, COCO_CLASSES).rows
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 50
    assert [len(labels) for _, labels in rows[:2]] == [4, 4]
    assert peak < 5e6


@pytest.mark.parametrize(
    "start",
    ['{"annotations": [{"a":', '{"annotations":', '{"other":', '{"images": [{"id": "\\\\",'],
)
@pytest.mark.parametrize("deep", ["[", '{"a":', '[{"\\"":'])
def test_nesting_has_an_end(tmp_path, start, deep):
    path = tmp_path / "i.json"
    path.write_text(start + (deep if start[-1] != "," else '"b":' + deep) * 1_000_000)
    tracemalloc.start()
    with pytest.raises(DatasetError, match=r"nests deeper than 100 levels|is no JSON"):
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e7


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
def test_brackets_in_names_are_no_nesting(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(instances, "_CHUNK", chunk)
    names = ["[" * 150, '\\"{[' * 60, "a\\", "]}" * 60, '"', "\\\\" + '"[' * 60]
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    path = write_instances(tmp_path / "i.json", images, [annotation(0, 1)])
    assert [picture.name for picture in read_header(path).pictures.values()] == names


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "name", "x"]), inner)
    ),
    max_leaves=6,
)
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "id": JSONS,
            "file_name": JSONS,
            "name": JSONS,
            "height": JSONS,
            "width": JSONS,
            "image_id": JSONS | st.just(1),
            "category_id": JSONS | st.just(1),
            "segmentation": JSONS,
        },
    ),
    max_size=3,
)


@a_few
@given(
    st.one_of(
        st.binary(max_size=60),
        st.fixed_dictionaries(
            {"images": ENTRIES | st.just([picture(1)]), "annotations": ENTRIES},
            optional={"categories": ENTRIES | st.just(categories()), "x": JSONS},
        ).map(lambda value: json.dumps(value).encode()),
    )
)
def test_no_instances_file_raises_anything_else(tmp_path, content):
    path = tmp_path / "i.json"
    path.write_bytes(content)
    with suppress(ClipesError):
        is_instances(path)
    for read in (lambda: instance_rows(path, COCO_CLASSES), lambda: read_labels(path)):
        with suppress(ClipesError):
            read()


@a_few
@given(
    st.integers(0, 999_999_999_999), st.sampled_from(["COCO_train2014_{:012d}", "{:012d}", "{}"])
)
def test_all_names_of_an_image_have_one_key(number, form):
    assert image_key(form.format(number)) == f"{number:012d}"


def test_the_sample_opens_without_options(shared):
    root = shared / "data/coco_sample"
    data = open_dataset("coco", root=root)
    assert (len(data.samples), data.failures, data.empty) == (60, (), ())
    assert data.classes == tuple((root / "classes.txt").read_text().splitlines())
    lines = dict(line.split(maxsplit=1) for line in (root / "labels.txt").read_text().splitlines())
    for sample in data.samples[::5]:
        assert list(sample.labels) == [int(k) for k in lines[sample.id].split()]
        assert {label + 1 for label in sample.labels} <= set(np.unique(read_mask(sample.mask)))
