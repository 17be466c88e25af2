"""Texts of labels: what separates them is decided for a whole file, and said or refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipes.datasets.base import class_index
from clipes.datasets.labels import LabelFile, read_labels
from clipes.datasets.rows import labels_of_classes
from clipes.errors import DatasetError
from clipes.names import folded

a_few = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(
    folder: Path, texts: list[str], kind: str = "csv", classes: tuple[str, ...] = ()
) -> LabelFile:
    """Write texts beside images 0.jpg, 1.jpg, ... and read them back."""
    path = folder / f"x.{kind}"
    rows = [(f"{index}.jpg", text) for index, text in enumerate(texts)]
    if kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("image", "labels"), *rows])
    elif kind == "json":
        path.write_text(json.dumps(dict(rows)), "utf-8")
    else:
        path.write_text("".join(f"{image} {text}\n" for image, text in rows), "utf-8")
    return read_labels(path, classes)


def split(table: LabelFile) -> list[list[str]]:
    return [list(map(str, row.labels)) for row in table.rows.values()]


def said(table: LabelFile) -> list[str]:
    return [remark.removeprefix(f"{table.path}: ") for remark in table.remarks_on(table.names())]


SPLIT_ALIKE = [
    # A mark that is in no name decides for the whole file, a trailing one too.
    (
        ["traffic light;car", "traffic light", "red, round"],
        [["traffic light", "car"], ["traffic light"], ["red, round"]],
        ["';' separates labels; one label each: 'traffic light', 'red, round'"],
    ),
    (["traffic light;", "car"], [["traffic light"], ["car"]], None),
    (["a|b c", "b c | a"], [["a", "b c"], ["b c", "a"]], None),
    (["cat;dog", "cat"], [["cat", "dog"], ["cat"]], []),
    (["a\tb", "a b"], [["a", "b"], ["a b"]], None),
    (
        ["a b;c d", "e f", "cat,dog", "cat;dog"],
        [["a b", "c d"], ["e f"], ["cat,dog"], ["cat", "dog"]],
        ["';' separates labels; one label each: 'cat,dog', 'a b', 'c d' and 1 more"],
    ),
    # Commas, where a name stands alone, or in another place.
    (["cat,dog", "cat"], [["cat", "dog"], ["cat"]], ["',' separates labels, as in 'cat,dog'"]),
    (["cat, dog", "dog,sofa"], [["cat", "dog"], ["dog", "sofa"]], None),
    (
        ["cat, traffic light", "cat", "Dog, CAT", "dog,sofa"],
        [["cat", "traffic light"], ["cat"], ["Dog", "CAT"], ["dog", "sofa"]],
        None,
    ),
    (
        ["cat\u3001dog", "cat\uff0cdog", "dog"],
        [["cat", "dog"], ["cat", "dog"], ["dog"]],
        ["'\u3001' separates labels, as in 'cat\u3001dog'"],
    ),
    (["cat\uff1bdog", "cat"], [["cat", "dog"], ["cat"]], []),
    # Slashes never do, and that is said.
    (
        ["car/truck", "car"],
        [["car/truck"], ["car"]],
        ["labels are not split at spaces or '/'; one label each: 'car/truck'"],
    ),
    (["cat;dog", "cat/dog"], [["cat", "dog"], ["cat/dog"]], None),
    # Spaces, where every word stands alone.
    (
        ["cat dog", "cat", "dog"],
        [["cat", "dog"], ["cat"], ["dog"]],
        ["a space separates labels, as in 'cat dog'"],
    ),
    (["cat", "dog"], [["cat"], ["dog"]], []),
]


@pytest.mark.parametrize("kind", ["csv", "txt", "json"])
@pytest.mark.parametrize(("texts", "wanted", "remarks"), SPLIT_ALIKE)
def test_what_the_file_shows_is_taken_and_said(tmp_path, kind, texts, wanted, remarks):
    table = read(tmp_path, texts, kind)
    assert split(table) == wanted
    if remarks is not None:
        assert said(table) == remarks


def test_spaces_belong_to_names_in_tables_and_that_is_said(tmp_path):
    table = read(tmp_path, ["traffic light", "car", "big car"])
    assert split(table) == [["traffic light"], ["car"], ["big car"]]
    assert said(table) == [
        "labels are not split at spaces; one label each: 'traffic light', 'big car'"
    ]


@pytest.mark.parametrize(
    ("kind", "texts", "doubtful"),
    [
        ("txt", ["car", "traffic light"], "'traffic light' (of 1.jpg)"),
        ("txt", ["cat", "cat dog"], "'cat dog'"),  # 'dog' is nowhere alone
        ("csv", ["cat", "dog", "traffic light", "cat dog"], "'cat dog'"),
        ("csv", ['12" pipe, rusty', "valve"], "'12\" pipe, rusty'"),
        ("csv", ["tench, Tinca", "tench, Tinca", "cat"], "'tench, Tinca'"),
        ("csv", ["pipe, rusty", "pipe, new"], "'pipe, rusty'"),
        ("csv", ["cat,dog", "cat", "giraffe,zebra"], "'giraffe,zebra' (of 2.jpg)"),
        ("csv", ["cat/dog", "cat", "dog"], "'cat/dog'"),
        ("txt", ["cat & dog", "cat", "dog"], "'cat & dog'"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, kind, texts, doubtful):
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, texts, kind)
    assert doubtful in caught.value.what
    assert "may be one label or several" in caught.value.what
    assert "write ';' between labels" in caught.value.remedy
    assert "classes.txt" in caught.value.remedy
    # Both remedies work.
    table = read(tmp_path, [f"{text};" for text in texts], kind)
    assert split(table) == [[text] for text in texts]
    names = tuple(sorted(set(texts)))
    assert [table.indices(str(k), names) for k in range(len(texts))] == [
        (names.index(text),) for text in texts
    ]
    assert split(read(tmp_path, texts, kind, names)) == [[text] for text in texts]


def listed(folder: Path, lists: list[list[str]], classes: tuple[str, ...] = ()) -> LabelFile:
    path = folder / "x.json"
    path.write_text(json.dumps({f"{index}.jpg": labels for index, labels in enumerate(lists)}))
    return read_labels(path, classes)


def test_labels_in_lists_end_where_others_do(tmp_path):
    assert split(listed(tmp_path, [["cat;dog"], ["cat"]])) == [["cat", "dog"], ["cat"]]
    for joint in (",", "/", "\u3001"):
        with pytest.raises(DatasetError, match=r"of 0\.jpg\) may be one label or several"):
            listed(tmp_path, [[f"cat{joint}dog"], ["cat"], ["dog"]])
    alone = listed(tmp_path, [["cat,dog;"], ["cat"], ["dog"]])
    assert split(alone) == [["cat,dog"], ["cat"], ["dog"]]
    whole = listed(tmp_path, [["pipe, rusty", "traffic light"], ["pipe"]])
    assert split(whole) == [["pipe, rusty", "traffic light"], ["pipe"]]
    assert said(whole) == ["labels in lists are split at ';' only; one label each: 'pipe, rusty'"]
    assert split(listed(tmp_path, [["cat,dog"], ["dog"]], ("cat", "dog")))[0] == ["cat", "dog"]


CLASSES = ("cat", "traffic light", "car", "pipe, rusty", "dining_table", "7")


@pytest.mark.parametrize("kind", ["csv", "txt", "json"])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("traffic light", [1]),
        ("Traffic_Light  CAR", [1, 2]),
        ("traffic light,car", [1, 2]),
        ("car traffic light cat", [2, 1, 0]),
        ("pipe, rusty", [3]),
        ("pipe, rusty, cat", [3, 0]),
        ("pipe, rusty;cat", [3, 0]),
        ("dining table cat", [4, 0]),
        ("0 1", [0, 1]),
        ("7", [5]),
        ("cat cat", [0]),
    ],
)
def test_known_classes_say_where_a_label_ends(tmp_path, kind, text, wanted):
    assert read(tmp_path, [text], kind, CLASSES).indices("0", CLASSES) == tuple(wanted)


def test_known_classes_that_overlap_are_taken_as_long_as_they_are(tmp_path):
    classes = ("hot", "dog", "hot dog", "dog house", "house")
    table = read(tmp_path, ["hot dog house", "dog hot dog", "dog hot"], "csv", classes)
    # Two ways of two names: the one that starts with the shorter name ends with a longer one.
    assert split(table)[0] in (["hot dog", "house"], ["hot", "dog house"])
    assert split(table)[1:] == [["dog", "hot dog"], ["dog", "hot"]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("traffic lihgt", "'traffic lihgt'; did you mean 'traffic light'?"),
        ("cat dgo", "'dgo'"),
        ("cat, trafic light", "'trafic light'; did you mean 'traffic light'?"),
        ("cars", "'cars'; did you mean 'car'?"),
    ],
)
def test_what_fits_no_class_says_which_is_meant(tmp_path, text, told):
    table = read(tmp_path, [text], "csv", CLASSES)
    with pytest.raises(DatasetError) as caught:
        table.indices("0", CLASSES)
    assert f"unknown class {told}" in str(caught.value)


def test_spellings_of_one_name_are_one_class_and_that_is_said(tmp_path):
    texts = ["cat", "Cat", "cat", "Dining_Table", "dining  table", "caf\u00e9", "cafe\u0301"]
    table = read(tmp_path, [f"{text};" for text in texts])
    assert table.names() == ("Dining_Table", "caf\u00e9", "cat")
    assert said(table)[1:] == [
        "'Cat' (1) taken for 'cat' (2)",
        "'dining  table' (1) taken for 'Dining_Table' (1)",
        f"'{texts[-1]}' (1) taken for '{texts[-2]}' (1)",
    ]
    many = read(tmp_path, ["a;A;aa;AA;b;B;bb;BB;c;C;cc;CC;d;D"])
    assert said(many)[-1] == "2 more labels are other spellings of classes"
    assert class_index("CAT", table.names()) == 2


def test_a_hyphen_is_a_space_and_names_may_be_split_at_either(tmp_path):
    table = read(tmp_path, ["traffic-light", "Traffic Light", "traffic_light;car", "traffic-light"])
    assert table.names() == ("car", "traffic-light")
    assert said(table)[-2:] == [
        "'Traffic Light' (1) taken for 'traffic-light' (2)",
        "'traffic_light' (1) taken for 'traffic-light' (2)",
    ]
    known = read(tmp_path, ["traffic-light car", "traffic light,car"], classes=CLASSES)
    assert [known.indices(k, CLASSES) for k in "01"] == [(1, 2), (1, 2)]


def test_a_list_of_classes_in_other_letters_is_not_taken_for_another_order():
    assert labels_of_classes(["Dog", "Cat"], ["cat", "dog"]) == ["Dog", "Cat"]
    assert labels_of_classes(["Hund", "Katze"], ["dog", "cat"]) == [0, 1]


def test_rows_of_one_image_add_up_in_order(tmp_path):
    path = tmp_path / "x.csv"
    rows = ["a.jpg,dog", "b.jpg,cat", "a.jpg,cat", "b.jpg,cat", "a.jpg,dog"]
    path.write_text("\n".join(["image,labels", *rows]))
    table = read_labels(path)
    assert split(table) == [["dog", "cat"], ["cat"]]
    assert table.problems == {}
    assert said(table) == ["rows of one image add up, as those of a.jpg"]
    path.write_text("\n".join(["image,labels", *rows, "b.png,cat"]))
    assert "as b.jpg and b.png; remove or rename one" in read_labels(path).problems["b"].reason


NAMES = (
    st.text("abcXY1 ,/_\"'.-", min_size=1, max_size=8)
    .map(str.strip)
    .filter(lambda name: folded(name) and not name.isdigit())
)
LISTS = st.lists(
    st.lists(NAMES, min_size=1, max_size=4, unique_by=folded), min_size=1, max_size=6
)  # of labels, an image each


@a_few
@given(LISTS, st.sampled_from(["csv", "txt", "json"]), st.sampled_from([";", " | ", "\t"]))
def test_any_names_joined_by_a_mark_come_back(tmp_path, lists, kind, mark):
    """And again when the file is read with its own classes, as 'refine' does."""
    texts = [mark.join(labels) for labels in lists]
    texts[0] += ";"
    table = read(tmp_path, texts, kind)
    assert split(table) == lists
    names = table.names()
    again = read(tmp_path, texts, kind, names)
    for index, labels in enumerate(lists):
        wanted = tuple(class_index(label, names) for label in labels)
        assert table.indices(str(index), names) == again.indices(str(index), names) == wanted


@a_few
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "c d", "E", "e", "f"]), min_size=1, max_size=3),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["csv", "txt", "json"]),
    st.sampled_from([";", ",", ", ", " "]),
)
def test_what_is_not_refused_reads_the_same_with_its_own_classes(tmp_path, lists, kind, mark):
    texts = [mark.join(labels) for labels in lists]
    try:
        table = read(tmp_path, texts, kind)
    except DatasetError:
        assert mark != ";" or not any(len(labels) > 1 for labels in lists)
        return
    names = table.names()
    again = read(tmp_path, texts, kind, names)
    for index, labels in enumerate(lists):
        found = table.indices(str(index), names)
        assert again.indices(str(index), names) == found
        if mark == ";" or len(labels) == 1:
            continue
        # What was split at its commas or spaces has all its labels, or it stayed whole and that is
        # told.
        whole = len(found) == 1 and any("not split at spaces" in told for told in table.remarks)
        assert whole or {names[k] for k in found} == {names[class_index(x, names)] for x in labels}
