from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipes.datasets import Dataset, open_dataset
from clipes.datasets.base import RARE, RARE_SHARE, is_rare
from clipes.datasets.problems import Kind
from clipes.disk.images import write_mask
from clipes.listener import Listener
from clipes.masks.scores import ConfusionMatrix
from clipes.stages.check import Findings, check
from clipes.types import IGNORE
from tests.unit.coco_support import write_image

SIZE = (24, 32)


def mask_of(*values: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    for index, value in enumerate(values):
        mask[index] = value
    return mask


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """One image with every problem, named after it."""
    lines = ["image,labels"]
    for name in ("good", "remark", "size", "value", "truth", "broken", "alone", "twice"):
        write_image(tmp_path / f"{name}.jpg", SIZE)
        write_mask(tmp_path / "masks" / f"{name}.png", mask_of(1, IGNORE))
        lines.append(f"{name},cat")
    lines += ["missing,cat", "typo,cta", "silent,", "twice.jpg,cat", "twice.png,cat"]
    for name in ("typo", "silent"):
        write_image(tmp_path / f"{name}.jpg", SIZE)
    write_image(tmp_path / "a..b.jpg", SIZE)
    write_mask(tmp_path / "masks/remark.png", mask_of(2, IGNORE))
    write_mask(tmp_path / "masks/size.png", mask_of(1, size=(32, 24)))
    write_mask(tmp_path / "masks/value.png", mask_of(1, 4, 254))
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "masks/truth.png")
    (tmp_path / "masks/alone.png").unlink()
    data = (tmp_path / "broken.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "classes.txt").write_text("cat\ndog\nemu\n")
    return tmp_path


def run(data: Dataset, workers: int = 2) -> Findings:
    return check(data, Listener(), workers=workers)


EXPECTED = {
    Kind.unusable_entry: ["a..b.jpg"],
    Kind.duplicate_id: ["twice"],
    Kind.missing_image: ["missing"],
    Kind.unreadable_image: ["broken"],
    Kind.unknown_class: ["typo"],
    Kind.no_labels: ["silent"],
    Kind.unreadable_mask: ["truth"],
    Kind.size_mismatch: ["size"],
    Kind.mask_value: ["value"],
    Kind.not_in_labels: ["remark"],
    Kind.not_in_mask: ["remark"],
    Kind.no_mask: ["alone"],
}


@pytest.mark.parametrize("workers", [1, 4])
def test_every_problem_is_found_where_it_is(photos, workers):
    findings = run(open_dataset("folder", root=photos), workers)
    found = {kind: [item.id for item in items] for kind, items in findings.by_kind().items()}
    assert found == EXPECTED
    assert list(found) == list(EXPECTED)
    assert findings.stops()
    assert (findings.images, findings.masks) == (12, 6)
    reasons = {problem.kind: problem.reason for problem in findings.problems}
    assert "holds label 4, 254, but there are 3 classes" in reasons[Kind.mask_value]
    assert "image 24 x 32, mask" in reasons[Kind.size_mismatch]
    assert reasons[Kind.not_in_labels] == "dog"
    assert reasons[Kind.not_in_mask] == "cat"


def test_what_it_calls_a_remark_can_be_scored_and_what_stops_cannot(photos):
    data = open_dataset("folder", root=photos)
    findings = run(data)
    stopping = {problem.id for problem in findings.problems if problem.kind.stops}
    from clipes.disk.images import read_image, read_mask
    from clipes.errors import ClipesError

    for sample in data.samples:
        failed = False
        try:
            size = read_image(sample.image).shape[:2]
            if sample.mask is not None:
                matrix = ConfusionMatrix(len(data.classes) + 1)
                matrix.update(read_mask(sample.mask), np.zeros(size, np.uint8))
        except ClipesError:
            failed = True
        assert failed == (sample.id in stopping)


def test_json_holds_every_reason(photos):
    findings = run(open_dataset("folder", root=photos))
    value = json.loads(json.dumps(findings.to_json()))
    assert value["ok"] is False
    assert [item["kind"] for item in value["problems"]] == [kind.value for kind in EXPECTED]
    assert [item["count"] for item in value["problems"]] == [1] * len(EXPECTED)
    assert all(item["images"][0]["reason"] for item in value["problems"])


def test_classes_are_counted_and_the_rare_ones_marked(tmp_path):
    lines = [f"{k}.jpg,cat" for k in range(RARE)] + [f"{k}.jpg,dog" for k in range(RARE - 1)]
    for k in range(RARE):
        write_image(tmp_path / f"{k}.jpg")
    (tmp_path / "labels.csv").write_text("\n".join(["image,labels", *lines, "gone.jpg,cat"]))
    (tmp_path / "classes.txt").write_text("emu\ndog\ncat\n")
    findings = run(open_dataset("folder", root=tmp_path))
    value = findings.to_json()
    assert value["classes"] == [
        {"name": "emu", "images": 0, "rare": False},
        {"name": "dog", "images": RARE - 1, "rare": True},
        {"name": "cat", "images": RARE, "rare": False},
    ]
    (remark,) = value["remarks"]
    assert "rows of one image add up, as those of 0.jpg and 3 more" in remark
    unlabelled = open_dataset("folder", root=tmp_path, labelled=False, classes=("cat",))
    assert run(unlabelled).to_json()["classes"] == []


@pytest.mark.parametrize("total", [50, RARE * RARE_SHARE, 9999])
def test_few_images_or_one_in_a_hundred_are_rare(total):
    for images in range(130):
        expected = images >= 1 and (images < 5 or images / total <= 0.01)
        assert is_rare(images, total) == expected


def test_a_clean_data_set_and_one_without_masks_are_fine(tmp_path):
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "b.jpg")
    (tmp_path / "labels.txt").write_text("a cat\nb dog\n")
    data = open_dataset("folder", root=tmp_path)
    assert run(data).problems == ()
    write_mask(tmp_path / "masks/a.png", mask_of(1))
    (remark,) = run(open_dataset("folder", root=tmp_path)).problems
    assert (remark.id, remark.kind) == ("b", Kind.no_mask)
    assert not run(open_dataset("folder", root=tmp_path)).stops()


@pytest.mark.parametrize("values", [(0,), (IGNORE,), (0, IGNORE)])
def test_masks_that_show_no_class_fail_as_in_eval(tmp_path, values):
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.jpg")
        mask = np.full(SIZE, values[0], np.uint8)
        mask[:4] = values[-1]
        write_mask(tmp_path / f"masks/{name}.png", mask)
    (tmp_path / "labels.txt").write_text("a cat\nb cat\n")
    findings = run(open_dataset("folder", root=tmp_path))
    (problem,) = [item for item in findings.problems if item.kind is Kind.shows_no_class]
    assert findings.stops()
    assert problem.id == "a"
    assert f"a.png hold only {' and '.join(map(str, values))}, eval fails;" in problem.reason
    write_mask(tmp_path / "masks/b.png", mask_of(1))
    assert not run(open_dataset("folder", root=tmp_path)).stops()


def test_without_labels_masks_are_held_to_the_classes_only(tmp_path):
    write_image(tmp_path / "a.jpg")
    write_mask(tmp_path / "masks/a.png", mask_of(2, 3))
    data = open_dataset("folder", root=tmp_path, labelled=False, classes=("cat", "dog"))
    (problem,) = run(data).problems
    assert problem.kind is Kind.mask_value


@pytest.mark.parametrize("name", ["voc_sample", "coco_sample", "stuff_sample"])
def test_the_samples_are_clean(shared, name):
    kind = {"voc_sample": "voc", "coco_sample": "coco"}.get(name, "folder")
    assert run(open_dataset(kind, root=shared / "data" / name)).problems == ()
