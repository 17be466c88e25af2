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
