"""Which images ``predict`` takes, and what it says of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clipes.datasets import open_dataset
from clipes.errors import DatasetError
from clipes.stages.predict import Found, find_images
from tests.unit.test_datasets_folder import folder

OUT = Path("elsewhere")


def ids(found: Found) -> list[str]:
    return [sample.id for sample in found.samples]


def test_the_images_and_ids_are_those_of_cam(tmp_path: Path) -> None:
    names = ("1.jpg", "a/1.jpg", "a/b/1.gif", "masks/1.png", "runs/x/run.json", "runs/x/p.png")
    root = folder(tmp_path, *names)
    data = open_dataset("folder", root=root, labelled=False)
    found = find_images([root], OUT)
    assert found.samples == tuple(replace(sample, mask=None) for sample in data.samples)
    assert ids(found) == ["1", "a_1", "a_b_1"]
    assert (found.failures, found.remarks) == ((), ())


def test_names_that_make_no_id_are_failures_and_other_kinds_are_said(tmp_path: Path) -> None:
    root = folder(tmp_path, "1.jpg", "a/b..c.jpg", "a/2.heic")
    found = find_images([root, root / "1.jpg"], OUT)
    assert ids(found) == ["1"]
    assert [failure.id for failure in found.failures] == ["a/b..c.jpg"]
    assert len(found.remarks) == 1
    assert "1 picture is of a kind that is not read (.heic)" in found.remarks[0]
    with pytest.raises(DatasetError, match=r"no image in .*/a/x; 1 picture is of a kind"):
        find_images([folder(tmp_path / "a/x", "1.heic")], OUT)


def test_two_images_of_one_mask_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, "a/1.jpg", "a_1.jpg")
    with pytest.raises(DatasetError, match=r"a/1\.jpg would both become a_1\.png"):
        find_images([root], OUT)


@pytest.mark.parametrize("out", ["", ".."])
def test_masks_beside_the_images_do_not_hide_them(tmp_path: Path, out: str) -> None:
    root = folder(tmp_path / "photos", "1.jpg", "out/2.png")
    assert ids(find_images([root], root / out)) == ["1", "out_2"]
    assert ids(find_images([root], root / "out")) == ["1"]


@pytest.mark.parametrize(
    ("root", "out"),
    [
        ("link", "photos/out"),
        ("photos", "link/out"),
        ("photos", "photos/a/../out"),
        ("photos", "link/a/../out"),
        ("photos", "shortcut"),
        ("photos", "elsewhere/out"),  # in photos/more
    ],
)
def test_masks_below_the_images_are_none_by_any_name(tmp_path: Path, root: str, out: str) -> None:
    photos = folder(tmp_path / "photos", "1.jpg", "a/1.jpg", "output/3.png")
    (tmp_path / "link").symlink_to(photos)
    (tmp_path / "shortcut").symlink_to(photos / "out")
    folder(tmp_path / "elsewhere", "1.jpg")
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    photo_ids = ["1", "a_1", "more_1", "output_3"]
    assert ids(find_images([tmp_path / root], tmp_path / out)) == photo_ids
    folder((tmp_path / out).resolve(), "2.png", "deep/2.png")
    assert ids(find_images([tmp_path / root], tmp_path / out)) == photo_ids


@pytest.mark.parametrize("out", ["elsewhere", "link", "link/.."])
def test_a_folder_that_holds_images_hides_none(tmp_path: Path, out: str) -> None:
    photos = folder(tmp_path / "photos", "1.jpg")
    folder(tmp_path / "elsewhere" / "year", "1.jpg")
    (photos / "more").symlink_to(tmp_path / "elsewhere" / "year")
    (tmp_path / "link").symlink_to(photos)
    assert ids(find_images([photos], tmp_path / out)) == ["1", "more_1"]


def test_links_in_circles_hide_nothing(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", "a/1.jpg")
    (tmp_path / "circle").symlink_to("circle")
    assert ids(find_images([photos], tmp_path / "circle")) == ["a_1"]
