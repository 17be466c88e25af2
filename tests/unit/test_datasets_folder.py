from __future__ import annotations

import json
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipes.datasets import Dataset, base, open_dataset
from clipes.datasets.labels import read_labels
from clipes.datasets.problems import Kind
from clipes.errors import DatasetError

a_few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def folder(root: Path, *names: str, **files: str) -> Path:
    """Make empty images, and text files given as ``labels_csv="..."``."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    root.mkdir(exist_ok=True)
    for name, text in files.items():
        (root / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return root


def named(data: Dataset) -> dict[str, list[str]]:
    return {sample.id: [data.classes[label] for label in sample.labels] for sample in data.samples}


def reasons(data: Dataset) -> dict[str, str]:
    return {failure.id: failure.reason for failure in data.failures}


WANTED = {"a": ["dining table", "cat"], "b": ["dog"]}
CLASSES = "cat\ndog\ndining table\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "image,labels\na.jpg,dining table;cat\nb.png,dog\n"),
        ("labels.csv", "image,labels\na.jpg,dining table | cat|\nb.png,dog\n"),
        ("labels.csv", "labels,note,image\r\n2 0,hm,a.jpg\r\n1,,b.png\r\n"),
        ("labels.csv", "Filename,Class\na.jpg,dining table;cat\nb.png,dog\n"),
        ("labels.csv", "label,name,path\n2 0,my cat,images/a.jpg\n1,,b.png\n"),
        ("labels.csv", 'Image;Labels\na.jpg;"dining table;cat"\nb.png;dog\n'),
        ("labels.csv", "\ufeffimage,labels\nimages/a.jpg,2 cat cat\nb,dog\n\n"),
        ("labels.json", '{"a.jpg": ["dining table", "cat"], "b": "dog"}'),
        ("labels.json", '{"a": [2, 0], "b.png": [1]}'),
        ("labels.json", '[{"image": "a.jpg", "labels": [2, "cat"]}, {"image": "b", "labels": 1}]'),
        ("labels.txt", "a.jpg 2 0\nb dog\n"),
        ("labels.txt", "a.jpg,dining table,cat\nb.png, dog\n"),
        ("labels.txt", "a.jpg;dining table;cat\nb.png;dog\n"),
        ("labels.txt", "/elsewhere/a.jpg dining table;cat\n\nb.png\tdog\n"),
    ],
)
@pytest.mark.parametrize("where", [".", "images", "JPEGImages"])
def test_every_label_format_in_every_place(tmp_path, name, text, where):
    root = folder(tmp_path, f"{where}/a.jpg", f"{where}/b.png", classes_txt=CLASSES)
    (root / name).write_text(text, encoding="utf-8", newline="")
    data = open_dataset("folder", root=root)
    assert named(data) == WANTED
    assert data.failures == ()
    assert data.classes == ("cat", "dog", "dining table")
    assert [sample.image for sample in data.samples] == [
        root / where / n for n in ("a.jpg", "b.png")
    ]


def test_columns_of_other_names_are_said(tmp_path):
    text = "class,file,tags,labels\nx,a.jpg,y,cat\n"
    root = folder(tmp_path, "a.jpg", labels_csv=text)
    data = open_dataset("folder", root=root)
    assert named(data) == {"a": ["cat"]}
    assert data.remarks == (
        f"{root}/labels.csv: column 'file' taken for 'image', 'labels' for 'labels'",
    )
    folder(root, labels_csv="image,labels\na.jpg,cat\n")
    assert open_dataset("folder", root=root).remarks == ()


def test_classes_that_are_not_stated_are_the_names_seen_sorted(tmp_path):
    text = "image,labels\na.jpg,zebra;dining table\nb.jpg,cow\nc.jpg,dining table\n"
    data = open_dataset("folder", root=folder(tmp_path, "a.jpg", "b.jpg", "c.jpg", labels_csv=text))
    assert data.classes == ("cow", "dining table", "zebra")
    assert named(data) == {"a": ["zebra", "dining table"], "b": ["cow"], "c": ["dining table"]}


def test_a_name_with_a_space_is_one_label_in_a_table(tmp_path):
    text = "image,labels\na.jpg,dining table\n"
    root = folder(tmp_path, "a.jpg", labels_csv=text)
    data = open_dataset("folder", root=root)
    assert named(data) == {"a": ["dining table"]}
    (remark,) = data.remarks
    assert remark.endswith("not split at spaces; one label each: 'dining table'")
    assert named(open_dataset("folder", root=root, classes=("cat", "dining table"))) == {
        "a": ["dining table"]
    }


def test_numbers_need_names(tmp_path):
    root = folder(tmp_path, "a.jpg", labels_txt="a.jpg 0 1\n")
    with pytest.raises(DatasetError, match=r"class numbers.*put the names into classes\.txt"):
        open_dataset("folder", root=root)
    assert named(open_dataset("folder", root=root, classes=("x", "y"))) == {"a": ["x", "y"]}
    assert named(open_dataset("folder", root=root, classes=("1", "0"))) == {"a": ["0", "1"]}


def test_classes_given_win_over_the_file_and_the_file_over_the_names_seen(tmp_path):
    root = folder(tmp_path, "a.jpg", labels_txt="a.jpg y\n", classes_txt="x\n\n  y \n")
    assert open_dataset("folder", root=root).classes == ("x", "y")
    assert open_dataset("folder", root=root, classes=("y",)).classes == ("y",)


def test_sub_folders_are_classes(tmp_path):
    root = folder(
        tmp_path, "big dog/1.jpg", "cat/2.JPG", "cat/._2.jpg", "cat/notes.md", "masks/1.png"
    )
    (root / "empty").mkdir()
    data = open_dataset("folder", root=root)
    assert named(data) == {"big dog_1": ["big dog"], "cat_2": ["cat"]}
    assert data.remarks == ()
    assert [sample.mask for sample in data.samples] == [root / "masks/1.png", None]
    assert data.failures == ()


def test_sub_folders_that_spell_one_name_are_one_class(tmp_path):
    root = folder(tmp_path, "cat/1.jpg", "cat/2.jpg", "Cat/3.jpg")
    data = open_dataset("folder", root=root)
    assert named(data) == {"Cat_3": ["cat"], "cat_1": ["cat"], "cat_2": ["cat"]}
    assert data.remarks == (f"{root}: 'Cat' (1) taken for 'cat' (2)",)


def test_an_id_is_the_path_and_does_not_change_when_a_neighbour_comes(tmp_path):
    root = folder(tmp_path, "cat/1.jpg", "cat/3.jpg", "3.jpg", "masks/cat_1.png")
    before = open_dataset("folder", root=root)
    assert named(before) == {"cat_1": ["cat"], "cat_3": ["cat"]}
    folder(tmp_path, "dog/1.png", "dog/2.jpg", "masks/dog/1.png", some_txt="dog/1.png\ncat_3\n")
    data = open_dataset("folder", root=root)
    assert named(data) == {
        **{"cat_1": ["cat"], "cat_3": ["cat"]},
        **{"dog_1": ["dog"], "dog_2": ["dog"]},
    }
    assert {sample.id: sample.image for sample in data.samples} == {
        "cat_1": root / "cat/1.jpg",
        "cat_3": root / "cat/3.jpg",
        "dog_1": root / "dog/1.png",
        "dog_2": root / "dog/2.jpg",
    }
    assert {sample.id: sample.mask for sample in data.samples if sample.mask} == {
        "cat_1": root / "masks/cat_1.png",
        "dog_1": root / "masks/dog/1.png",
    }
    assert list(reasons(data)) == ["3"]
    assert reasons(data)["3"] == (
        f"{root}/3.jpg lies beside the folders of the classes; move it into that of its class"
    )
    listed = open_dataset("folder", root=root, split="some")
    assert named(listed) == {"dog_1": ["dog"], "cat_3": ["cat"]}


def test_files_with_one_id_are_a_failure(tmp_path):
    names = ("cat/1.jpg", "cat/1.png", "cat/a/2.jpg", "cat/a_2.jpg", "dog/4.jpg")
    for labelled in (True, False):
        data = open_dataset("folder", root=folder(tmp_path, *names), labelled=labelled)
        assert [sample.id for sample in data.samples] == ["dog_4"]
        assert "cat/1.jpg and cat/1.png in" in reasons(data)["cat_1"]
        assert "cat/a_2.jpg and cat/a/2.jpg in" in reasons(data)["cat_a_2"]
        assert {item.kind for item in data.failures} == {Kind.duplicate_id}
        assert len(data.failures) == 2
    folder(tmp_path, labels_csv="image,labels\ncat/1.png,x\ncat/a/2.jpg,y\ndog/4.jpg,y\n")
    data = open_dataset("folder", root=tmp_path)
    assert [sample.image for sample in data.samples] == [
        tmp_path / name for name in ("cat/1.png", "cat/a/2.jpg", "dog/4.jpg")
    ]
    assert "2 pictures are not used" in data.remarks[0]


def test_deeper_images_are_of_the_class_of_the_first_folder_and_it_is_said(tmp_path):
    root = folder(tmp_path, "cat/1.jpg", "cat/a/2.jpg", "dog/b/c/3.jpg")
    data = open_dataset("folder", root=root)
    assert named(data) == {"cat_1": ["cat"], "cat_a_2": ["cat"], "dog_b_c_3": ["dog"]}
    assert data.remarks == (
        "2 pictures are deeper than one folder per class, such as cat/a/2.jpg: taken for 'cat'",
    )


def test_folders_whose_level_is_not_the_class_are_refused(tmp_path):
    root = folder(tmp_path, "train/cat/1.jpg", "val/dog/2.jpg")
    with pytest.raises(DatasetError, match=r"the first is train/cat/1\.jpg; name the folder that"):
        open_dataset("folder", root=root)
    assert named(open_dataset("folder", root=root / "train")) == {"cat_1": ["cat"]}
    assert len(open_dataset("folder", root=root, labelled=False).samples) == 2


@pytest.mark.parametrize("where", [".", "images"])
@pytest.mark.parametrize("prefix", ["", "images/", "C:\\photos\\", "/home/me/images/"])
def test_rows_may_name_equal_files_by_their_folders(tmp_path, where, prefix):
    names = ("a/1.jpg", "b/1.jpg", "deep/er/5.jpg")
    rows = "".join(f"{prefix}{name},{'cat' if name[0] == 'a' else 'dog'}\n" for name in names)
    root = folder(tmp_path, *(f"{where}/{name}" for name in names), "masks/5.png", "masks/1.png")
    folder(root, labels_csv=f"image,labels\n{rows}", some_txt=f"{prefix}b/1.jpg\n5.jpg\n")
    data = open_dataset("folder", root=root)
    assert named(data) == {"a_1": ["cat"], "b_1": ["dog"], "deep_er_5": ["dog"]}
    assert [s.image for s in data.samples] == [root / where / name for name in names]
    assert [s.mask for s in data.samples] == [None, None, root / "masks/5.png"]
    (remark,) = data.remarks
    assert remark.startswith("masks: 1 of 2 files in ")
    assert "the first is 1.png: a mask is a PNG called after its image, such as a_1.png" in remark
    assert list(named(open_dataset("folder", root=root, split="some"))) == ["b_1", "deep_er_5"]


def test_a_file_name_that_fits_several_is_a_failure_that_says_so(tmp_path):
    root = folder(tmp_path, "a/1.jpg", "b/1.jpg", "b/2.jpg", some_txt="2\n1.jpg\n")
    folder(root, labels_csv="image,labels\n1.jpg,cat\n2,dog\n", classes_txt="cat\ndog\n")
    for split in (None, "some"):
        data = open_dataset("folder", root=root, split=split)
        assert named(data) == {"b_2": ["dog"]}
        assert "'1.jpg' fits a/1.jpg and b/1.jpg; write the path" in reasons(data)["1.jpg"]


def test_a_missing_picture_is_not_taken_for_its_namesake(tmp_path):
    root = folder(tmp_path, "1.jpg", "a/2.jpg", "b/1.jpg", labels_txt="a/1.jpg x\na/2.jpg x\n")
    data = open_dataset("folder", root=root)
    assert named(data) == {"a_2": ["x"]}
    assert "no image a/1.jpg in" in reasons(data)["a_1"]
    assert "no labels" in reasons(data)["1"]


def test_a_name_in_other_capitals_is_met_with_the_one_that_is_there(tmp_path):
    text = "image,labels\nA.JPG,cat\nX/Img.jpg,cat\nx_TWO,cat\nc.jpg,cat\n"
    root = folder(tmp_path, "a.jpg", "x/img.JPG", "x/two.png", "c.jpg", labels_csv=text)
    why = reasons(open_dataset("folder", root=root))
    assert why["A"] == f"no image A.JPG in {root}; did you mean a.jpg? Capitals count"
    assert "did you mean x/img.JPG?" in why["X_Img"]
    assert "did you mean x/two.png?" in why["x_TWO"]


def test_a_list_may_name_what_is_not_there(tmp_path):
    root = folder(tmp_path, "a.jpg", "b.jpg", labels_txt="a.jpg x\n", some_txt="a\nb\nnope.jpg\n")
    why = reasons(open_dataset("folder", root=root, split="some"))
    assert why["nope"].startswith(f"no image nope in {root};")
    assert why["b"].startswith("no labels in")


def test_a_picture_may_be_named_by_its_path_and_by_its_id(tmp_path):
    rows = ("a/1.jpg cat", "a_1 dog", "1 sofa", "b.jpg cat", "b dog", "c.jpg cat", "c.png cat")
    root = folder(tmp_path, "a/1.jpg", "b.jpg", "c.jpg", labels_txt="\n".join(rows))
    data = open_dataset("folder", root=root)
    assert named(data) == {"a_1": ["cat", "dog", "sofa"], "b": ["cat", "dog"]}
    assert "lists it twice, as c.jpg and c.png" in reasons(data)["c"]
    folder(root, "a_1.jpg")  # now these are two pictures, and a mask could be of either
    assert "lists it twice, as a/1.jpg and a_1" in reasons(open_dataset("folder", root=root))["a_1"]


def test_pictures_without_a_suffix_are_counted(tmp_path):
    root = folder(tmp_path, "a.jpg", "LICENSE", "x/c.jpg.txt", labels_txt="a.jpg x\n")
    (root / "LICENSE").write_text("none")
    for name in ("x/b", "x/b.jpg_large", "notes.txt"):
        (root / name).write_bytes(b"\xff\xd8\xff\xe0")
    assert open_dataset("folder", root=root).remarks == (
        "2 pictures are not used for want of a suffix: add .jpg or what they are, the first is "
        f"{root}/x/b",
    )


def test_a_run_folder_is_no_data_set_unless_photos_are_in_it(tmp_path):
    root = folder(tmp_path, "run.json", "pseudo/a.png", "confidence/a.png")
    with pytest.raises(DatasetError, match=r"is a run folder, its pictures are masks; name the"):
        open_dataset("folder", root=root)
    folder(root, "a.jpg", labels_txt="a x\n")
    assert named(open_dataset("folder", root=root)) == {"a": ["x"]}


def test_an_id_wins_over_the_name_of_another_file(tmp_path):
    # Tags are written under ids: they must mean the same image for ever.
    root = folder(tmp_path, "a/1.jpg", "b/a_1.jpg", labels_txt="a_1.jpg x\nb/a_1.jpg y\n")
    assert named(open_dataset("folder", root=root)) == {"a_1": ["x"], "b_a_1": ["y"]}


def test_what_rows_do_not_name_is_counted(tmp_path):
    names = ("images/a/1.jpg", "images/b/7.jpg", "images/b/8.jpg", "images/c/x..y.jpg", "9.jpg")
    root = folder(tmp_path, *names, labels_csv="image,labels\na/1.jpg,cat\n", some_txt="a_1\n")
    data = open_dataset("folder", root=root)
    assert (named(data), data.failures) == ({"a_1": ["cat"]}, ())
    assert data.remarks == (
        f"1 picture is beside {root}/images and not used: move them there, the first is "
        f"{root}/9.jpg",
        "3 pictures are not used: no row of labels.csv names them, the first is "
        f"{root}/images/b/7.jpg",
    )
    assert open_dataset("folder", root=root, split="some").remarks == ()


def test_pictures_of_other_kinds_are_counted_and_explained(tmp_path):
    text = "image,labels\na.HEIC,cat\nb.jpg,cat\n"
    root = folder(tmp_path, "a.HEIC", "b.jpg", "c/d.dng", "e.txt", labels_csv=text)
    data = open_dataset("folder", root=root)
    assert named(data) == {"b": ["cat"]}
    assert reasons(data) == {
        "a": f"{root}/a.HEIC is there, but .heic is not read; convert it to JPEG"
    }
    assert data.failures[0].kind is Kind.unreadable_image
    assert data.remarks == (
        "2 pictures are of a kind that is not read (.dng, .heic): convert to JPEG, the first is "
        f"{root}/a.HEIC",
    )
    folder(root, "a.jpg")  # converted: the row needs no change
    assert named(open_dataset("folder", root=root)) == {"a": ["cat"], "b": ["cat"]}
    alone = folder(tmp_path / "alone", "cat/1.heic")
    with pytest.raises(DatasetError, match=r"1 picture is of a kind .*\(\.heic\): convert"):
        open_dataset("folder", root=alone)


def test_masks_of_other_kinds_and_names_are_counted(tmp_path):
    names = ("a.jpg", "b.jpg", "masks/a.jpg", "masks/b_mask.png", "masks/b.png")
    root = folder(tmp_path, *names, labels_txt="a x\nb x\n")
    data = open_dataset("folder", root=root)
    assert [sample.mask for sample in data.samples] == [None, root / "masks/b.png"]
    assert data.remarks == (
        f"masks: 2 of 3 files in {root}/masks are not used, the first is a.jpg: a mask is a PNG "
        "called after its image, such as a.png",
    )


def test_what_clipes_wrote_is_no_photo(tmp_path):
    made = ("runs/folder/run.json", "runs/folder/pseudo/cat_1.png", "out/export.json", "out/x.png")
    names = ("cat/1.jpg", "cat/masks/1.png", "cat/@eaDir/1.jpg/thumb.jpg", ".trash/2.jpg")
    data = open_dataset("folder", root=folder(tmp_path, *names, *made))
    assert (named(data), data.failures, data.remarks) == ({"cat_1": ["cat"]}, (), ())


def test_links_to_folders_are_followed_at_the_top_and_counted_below(tmp_path):
    root = folder(tmp_path / "root", "cat/1.jpg")
    folder(tmp_path / "store", "2.jpg")
    (root / "dog").symlink_to(tmp_path / "store")
    (root / "loop").symlink_to(root)
    (root / "cat/up").symlink_to(root)
    (root / "cat/gone.jpg").symlink_to("nowhere.jpg")
    data = open_dataset("folder", root=root)
    assert named(data) == {"cat_1": ["cat"], "cat_gone": ["cat"], "dog_2": ["dog"]}
    assert data.remarks == (
        f"2 links to folders in {root} are not followed: put the folders themselves there, the "
        "first is loop",
    )


def test_other_data_sets_below_the_usual_place_are_no_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPES_DATA", str(tmp_path))
    folder(tmp_path, "voc/VOC2012/JPEGImages/1.jpg")
    with pytest.raises(DatasetError, match="no images: looked for"):
        open_dataset("folder")
    folder(tmp_path, "cat/1.jpg")
    assert named(open_dataset("folder")) == {"cat_1": ["cat"]}


def test_where_no_row_is_usable_the_first_problem_is_said(tmp_path):
    root = folder(tmp_path, "a/1.jpg", "b/1.jpg", labels_csv="image,labels\n1.jpg,cat\n")
    with pytest.raises(DatasetError, match=r"'1.jpg' fits a/1.jpg and b/1.jpg; write the path"):
        open_dataset("folder", root=root)


def test_one_bad_row_does_not_stop_the_others(tmp_path):
    text = "\n".join(
        [
            "image,labels",
            "good.jpg,cat",
            "typo.jpg,cta",
            "case.jpg,Cat",
            "large.jpg,cat 7",
            "none.jpg,",
            "commas.jpg,cat,dog",
            "missing.jpg,cat",
            "twice.jpg,cat",
            "twice.png,dog",
            "rows.jpg,cat",
            "rows.jpg,dog",
            "rows.jpg,cat",
            "../up.jpg,cat",
            ",cat",
        ]
    )
    stems = ("good", "typo", "case", "large", "none", "commas", "twice", "rows", "unlisted")
    root = folder(tmp_path, *(f"{s}.jpg" for s in stems), labels_csv=text, classes_txt="cat\ndog\n")
    data = open_dataset("folder", root=root)
    assert named(data) == {"good": ["cat"], "case": ["cat"], "rows": ["cat", "dog"]}
    why = reasons(data)
    assert "unknown class 'cta'; did you mean 'cat'?" in why["typo"]
    assert "there is no class 7; class numbers go from 0 to 1" in why["large"]
    assert "no labels in" in why["none"]
    assert "3 fields where the header has 2" in why["commas"]
    assert "no image missing.jpg in" in why["missing"]
    assert "lists it twice, as twice.jpg and twice.png; remove or rename one" in why["twice"]
    assert "leads out of" in why["../up.jpg"]
    assert "no image" in why["line 15"]
    assert "no labels in" in why["unlisted"]
    assert len(why) == len(data.failures) == 9
    assert [remark.partition(".csv: ")[2] for remark in data.remarks] == [
        "rows of one image add up, as those of rows.jpg",
        "'Cat' (1) taken for 'cat' (4)",
    ]


def test_json_rows_of_another_shape_are_failures(tmp_path):
    text = '[{"image": "a", "labels": ["x"]}, {"image": "b", "labels": {"x": 1}}, {"image": 3}, 4]'
    data = open_dataset("folder", root=folder(tmp_path, "a.jpg", "b.jpg", labels_json=text))
    assert named(data) == {"a": ["x"]}
    assert set(reasons(data)) == {"b", "entry 3", "entry 4"}


def test_repeated_json_keys_are_not_silently_merged(tmp_path):
    text = '{"a": ["x"], "b": ["x"], "a": ["y"]}'
    data = open_dataset("folder", root=folder(tmp_path, "a.jpg", "b.jpg", labels_json=text))
    assert named(data) == {"a": ["x", "y"], "b": ["x"]}
    (remark,) = data.remarks
    assert "rows of one image add up, as those of a" in remark


def test_json_numbers_are_indices_only_where_the_classes_are_known(tmp_path):
    root = folder(tmp_path, "a.jpg", "b.jpg", labels_json='{"a": ["x", 1], "b": [-1, "x"]}')
    assert named(open_dataset("folder", root=root)) == {"a": ["x", "1"], "b": ["-1", "x"]}
    data = open_dataset("folder", root=root, classes=("w", "x"))
    assert named(data) == {"a": ["x"]}
    assert "there is no class -1" in reasons(data)["b"]


def test_one_stem_with_two_suffixes(tmp_path):
    root = folder(tmp_path, "a.jpg", "a.png", labels_txt="a.png x\n")
    assert open_dataset("folder", root=root).samples[0].image == root / "a.png"
    (root / "labels.txt").write_text("a x\n")
    assert "a.jpg and a.png" in reasons(open_dataset("folder", root=root))["a"]


def test_rows_may_name_files_in_sub_folders(tmp_path):
    root = folder(tmp_path, "x.jpg", "deep/er/a.jpg", labels_txt="x x\ndeep/er/a.jpg x\n")
    data = open_dataset("folder", root=root)
    assert [sample.image for sample in data.samples] == [root / "x.jpg", root / "deep/er/a.jpg"]
    root = folder(tmp_path / "2", "images/deep/a.jpg", labels_txt="images/deep/a.jpg x\n")
    data = open_dataset("folder", root=root)
    assert [sample.image for sample in data.samples] == [root / "images/deep/a.jpg"]


def test_accents_match_however_they_are_composed(tmp_path):
    root = folder(
        tmp_path, unicodedata.normalize("NFD", "caf\u00e9.jpg"), labels_txt="caf\u00e9.jpg x\n"
    )
    data = open_dataset("folder", root=root)
    assert [sample.id for sample in data.samples] == ["caf\u00e9"]
    assert data.failures == ()


def test_names_with_spaces(tmp_path):
    root = folder(tmp_path, "my cat.JPG", labels_txt="my cat.JPG cat\n")
    assert named(open_dataset("folder", root=root)) == {"my cat": ["cat"]}


@pytest.mark.parametrize("split", ["some", "PATH"])
def test_a_split_chooses_and_orders(tmp_path, split):
    root = folder(
        tmp_path,
        "a.jpg",
        "b.jpg",
        "c.jpg",
        labels_txt="a x\nb x;y;z\nc x\n",
        some_txt="c.jpg\na\nd\n",
    )
    data = open_dataset("folder", root=root, split=split.replace("PATH", str(root / "some.txt")))
    assert [sample.id for sample in data.samples] == ["c", "a"]
    assert list(reasons(data)) == ["d"]


@pytest.mark.parametrize("kind", ["folder", "voc"])
def test_a_list_of_ids_names_them_whatever_they_hold(tmp_path, kind):
    names = ("my.jpg", "my 2.JPG", "IMG_1.HEIC.jpg", "le\u0301a 1.png", "b.jpg", "c.jpg")
    ids = ["my 2", "IMG_1.HEIC", "l\u00e9a 1", "b", "c"]
    text = "\n".join([*ids[:3], "b 14", "/JPEGImages/c.jpg /SegmentationClass/c.png"])
    root = folder(tmp_path, *(f"JPEGImages/{name}" for name in names), some_txt=f"{text}\n")
    data = open_dataset(kind, root=root, split="some", labelled=False)
    assert ([sample.id for sample in data.samples], data.failures) == (ids, ())


@pytest.mark.parametrize("masks", ["masks", "SegmentationClass", "SegmentationClassAug"])
def test_masks_are_found_by_name(tmp_path, masks):
    root = folder(tmp_path, "a.jpg", "b.jpg", f"{masks}/a.png", labels_txt="a x\nb x\n")
    data = open_dataset("folder", root=root)
    assert [sample.mask for sample in data.samples] == [root / masks / "a.png", None]
    folder(tmp_path, "masks/a.png")
    assert open_dataset("folder", root=root).samples[0].mask == root / "masks" / "a.png"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no labels for the images"),
        ({"labels_csv": "a.jpg,x\n"}, "no header 'image,labels'"),
        ({"labels_csv": ""}, "no header"),
        ({"labels_csv": "image,labels\n"}, "lists no image"),
        ({"labels_csv": "image,labels\na.jpg,\n"}, "gives no image a label; write an image"),
        ({"labels_txt": "a,cat\nb,dog\n"}, r"gives no image a label.* tab after the image"),
        ({"labels_csv": "photo,animal\na.jpg,x\n"}, "first line is 'photo,animal', not 'image,"),
        ({"labels_csv": "file,tags,class\na.jpg,x,y\n"}, "first line is 'file,tags,class'"),
        ({"labels_json": "{"}, "is no JSON"),
        ({"labels_json": "[" * 100_000}, "is no JSON"),
        ({"labels_json": "3"}, "neither an object nor a list"),
        ({"labels_txt": "a x\n", "labels_csv": "image,labels\na,x\n"}, "choose with --labels"),
        ({"labels_txt": "a x\n", "classes_txt": "x\ny\nx\n"}, "'x' is there twice; remove"),
        (
            {"labels_txt": "a x\n", "classes_txt": "a b\nA_b\n"},
            "'A_b' is there twice, as 'a b' too",
        ),
        ({"labels_txt": "a x\n", "classes_txt": "background\nx\n"}, "mask value 0 is background"),
        ({"labels_txt": "a x\n", "classes_txt": "\n"}, "names no class"),
        ({"labels_txt": "a x\n", "classes_txt": "x\x1b[31m\n"}, "is no class name"),
        (
            {"labels_txt": "a x\n", "classes_txt": "\n".join(f"c{i}" for i in range(255))},
            "255 classes; an 8-bit mask has room for 254",
        ),
    ],
)
def test_what_is_wrong_with_the_whole_is_said_in_one_line(tmp_path, files, message):
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset("folder", root=folder(tmp_path, "a.jpg", **files))
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_254_classes_fit(tmp_path):
    classes = tuple(f"c{i}" for i in range(254))
    root = folder(tmp_path, "a.jpg", labels_txt="a 253\n")
    assert open_dataset("folder", root=root, classes=classes).samples[0].labels == (253,)


def test_no_images_says_where_it_looked(tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match=r"no images: looked for jpg, .*--root"):
        open_dataset("folder", root=tmp_path)
    monkeypatch.setenv("CLIPES_DATA", str(tmp_path))
    folder(tmp_path / "folder", "a.jpg", labels_txt="a x\n")
    assert open_dataset("folder").root == tmp_path / "folder"


def test_label_files_that_are_not_text_or_too_large_are_refused(tmp_path, monkeypatch):
    root = folder(tmp_path, "a.jpg")
    (root / "labels.txt").write_bytes("a x".encode("utf-16"))
    with pytest.raises(DatasetError, match="not UTF-8"):
        open_dataset("folder", root=root)
    (root / "labels.txt").write_bytes(b"a x\n" * 10)
    monkeypatch.setattr(base, "MAX_LIST_BYTES", 39)
    with pytest.raises(DatasetError, match="is larger than"):
        open_dataset("folder", root=root)
    with pytest.raises(DatasetError, match=r"cannot read .*none\.csv"):
        open_dataset("folder", root=root, labels=root / "none.csv")


def test_files_whose_names_are_no_ids_are_failures(tmp_path):
    root = folder(tmp_path, "a.jpg", "b..c.jpg", "d\nd.jpg", labels_txt="a x\n")
    data = open_dataset("folder", root=root)
    assert list(named(data)) == ["a"]
    assert set(reasons(data)) == {"b..c.jpg", "d\\nd.jpg"}


@pytest.mark.parametrize("split", [None, "some"])
def test_a_name_that_is_no_id_is_one_failure_wherever_it_is_met(tmp_path, split):
    text = "image,labels\na.jpg,cat\nd\x07d.jpg,cat\n"
    root = folder(tmp_path, "a.jpg", "d\x07d.jpg", labels_csv=text, some_txt="a.jpg\nd\x07d.jpg\n")
    data = open_dataset("folder", root=root, split=split)
    assert list(named(data)) == ["a"]
    (failure,) = data.failures
    assert failure.id == "d\\x07d.jpg"
    assert r"'d\x07d' cannot be an image id: it holds '\x07' as character 2" in failure.reason


WORDS = st.sampled_from(
    [
        *"ab,;|\n\t\" '0129{}[]:",
        "image",
        "labels",
        "a.jpg",
        "b",
        "dining table",
        "\ufeff",
        "\x00",
        "é",
    ]
)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["image", "labels", "a"]) | st.text(max_size=3), inner)
    ),
    max_leaves=8,
).map(json.dumps)


@a_few
@given(
    st.sampled_from(["labels.csv", "labels.json", "labels.txt", "classes.txt"]),
    st.one_of(
        st.lists(WORDS, max_size=20).map("".join),
        st.lists(WORDS, max_size=20).map(lambda words: "image,labels\n" + "".join(words)),
        st.text(max_size=40),
        JSONS,
    ),
)
def test_no_text_raises_anything_else(tmp_path, name, text):
    for path in tmp_path.iterdir():
        path.unlink()
    root = folder(tmp_path, "a.jpg", "b.png", labels_txt="a x")
    if name.startswith("labels"):
        (root / "labels.txt").unlink()
    (root / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(DatasetError):
        data = open_dataset("folder", root=root)
        ids = [sample.id for sample in data.samples]
        assert len(set(ids)) == len(ids)
        for sample in data.samples:
            assert sample.labels
            assert len(set(sample.labels)) == len(sample.labels)
            assert all(0 <= label < len(data.classes) for label in sample.labels)
        for failure in data.failures:
            assert failure.id.isprintable()
            assert "\n" not in failure.reason


PLAIN = st.text("abcdefgh ", min_size=1, max_size=8).map(str.strip).filter(bool)


@a_few
@given(
    st.dictionaries(
        st.text("abc123", min_size=1, max_size=6),
        st.lists(PLAIN, min_size=1, unique=True, max_size=4),
        min_size=1,
    )
)
def test_all_formats_say_the_same(tmp_path, wanted):
    classes = sorted({label for labels in wanted.values() for label in labels})
    joined = {image: ";".join(labels) for image, labels in wanted.items()}
    texts = {
        "x.csv": "image,labels\n" + "".join(f"{i},{text}\n" for i, text in joined.items()),
        "x.txt": "".join(f"{i}.jpg {text}\n" for i, text in joined.items()),
        "x.json": json.dumps(wanted),
        "y.json": json.dumps([{"image": i, "labels": labels} for i, labels in wanted.items()]),
        "z.txt": "".join(
            f"{i} {' '.join(str(classes.index(label)) for label in labels)}\n"
            for i, labels in wanted.items()
        ),
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.write_text(text)
        table = read_labels(path, classes)
        assert table.problems == {}
        assert {
            id_: [classes[k] for k in table.indices(id_, tuple(classes))] for id_ in table.rows
        } == wanted


@pytest.mark.parametrize(
    ("name", "images", "classes"), [("stuff_sample", 240, 23), ("coco_sample", 60, 80)]
)
def test_the_samples_open_without_options(shared, name, images, classes):
    from clipes.disk.images import read_mask

    data = open_dataset("folder", root=shared / "data" / name)
    assert (len(data.samples), len(data.classes), data.failures) == (images, classes, ())
    for sample in data.samples[:20]:
        # The labels were made from the masks, so each must occur there.
        assert {label + 1 for label in sample.labels} <= set(
            read_mask(sample.mask).ravel().tolist()
        )
