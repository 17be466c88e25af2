"""check, tag, masks and the label sources as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from clipes.run.folder import Run
from tests.cli import small_data
from tests.cli.conftest import Cli
from tests.cli.inline import one_line
from tests.cli.test_stages import cam
from tests.unit.coco_support import annotation, picture, write_image, write_instances


def test_check_passes_a_data_set_that_cam_and_eval_pass(cli: Cli, photos: Path) -> None:
    done = cli("check", "--dataset", "folder", "--root", photos)
    assert done.returncode == 0, done.stderr
    assert "6 images, 6 masks" in done.stderr
    assert "fails" not in done.stdout
    assert "class in labels, not in mask" in done.stdout  # the masks of the fixture hold two values


def test_check_counts_what_would_fail_and_exits_with_1(cli: Cli, photos: Path) -> None:
    (photos / "images" / "p0.jpg").write_bytes(b"no picture")
    (photos / "images" / "p3.jpg").unlink()
    text = (photos / "labels.csv").read_text().replace("p1.jpg,dog", "p1.jpg,dgo")
    (photos / "labels.csv").write_text(text)
    (photos / "classes.txt").write_text("cat\ncow\ndog\nperson\nsofa\n")
    done = cli("check", "--dataset", "folder", "--root", photos)
    assert done.returncode == 1
    assert "3 would fail" in done.stderr
    for kind in ("unreadable image", "missing image", "unknown class"):
        (row,) = [line for line in done.stdout.splitlines() if line.startswith(f"│ {kind}")]
        assert "fails" in row
    assert "unknown class: p1: " in done.stdout
    assert "did you mean 'dog'?" in done.stdout

    told = cli("check", "--dataset", "folder", "--root", photos, "--json")
    assert told.returncode == 1
    found = {item["kind"]: item for item in json.loads(told.stdout)["problems"]}
    assert found["unknown class"]["images"][0]["id"] == "p1"
    assert [item["id"] for item in found["missing image"]["images"]] == ["p3"]


def test_check_shows_the_classes_it_read_and_how(inline: Cli, photos: Path) -> None:
    rows = ["p0.jpg,traffic light", "p1.jpg,Cat", "p2.jpg,cat", "p3.jpg,cat", "p3.jpg,[b]big[/b]"]
    rows += ["p4.jpg,cat", "p5.jpg,cat"]
    (photos / "labels.csv").write_text("\n".join(["image,labels", *rows]))
    done = inline("check", "--dataset", "folder", "--root", photos)
    assert done.returncode == 0, done.stderr
    cells = [re.findall(r"[^│┃\s][^│┃]*", line) for line in done.stdout.splitlines()]
    table = [[cell.strip() for cell in row] for row in cells]
    for row in (["[b]big[/b]", "1", "rare"], ["cat", "5"], ["traffic light", "1", "rare"]):
        assert row in table
    remarks = [
        f"{photos}/labels.csv: labels are not split at spaces or '/'; one label each: "
        "'traffic light', '[b]big[/b]'",
        f"{photos}/labels.csv: rows of one image add up, as those of p3.jpg",
        f"{photos}/labels.csv: 'Cat' (1) taken for 'cat' (4)",
    ]
    assert done.stderr.splitlines()[:3] == remarks
    told = inline("check", "--dataset", "folder", "--root", photos, "--json")
    found = json.loads(told.stdout)
    assert found["remarks"] == remarks
    assert [(item["name"], item["images"]) for item in found["classes"]] == [
        ("[b]big[/b]", 1),
        ("cat", 5),
        ("traffic light", 1),
    ]
    voc = inline("check", "--dataset", "folder", "--root", photos, "--prompts", "coco")
    (line,) = [line for line in voc.stdout.splitlines() if line.startswith("no image shows: ")]
    assert "person, bicycle, " in line
    assert line.endswith(" and 58 more")


def test_cam_says_how_labels_were_read_and_what_a_class_may_be_called(
    inline: Cli, photos: Path, tmp_path: Path
) -> None:
    small_data.write_clip(tmp_path / "clip.safetensors", tmp_path / "text.npz")
    rows = ["p0.jpg,Cat", "p1.jpg,cat", 'p2.jpg,"cat,dog"', "p3.jpg,dog"]
    (photos / "labels.csv").write_text("\n".join(["image,labels", *rows]))
    (photos / "images/p4.jpg").unlink()
    (photos / "images/p5.jpg").unlink()
    command = small_data.cam("run", photos)
    done = inline(*command)
    assert done.returncode == 0, done.stderr
    path = photos / "labels.csv"
    assert done.stderr.count(f"{path}: ',' separates labels, as in 'cat,dog'\n") == 1
    assert done.stderr.count(f"{path}: 'Cat' (1) taken for 'cat' (2)\n") == 1
    assert Run(tmp_path / "run").stage("cam")["settings"]["classes"] == ["cat", "dog"]
    (photos / "labels.csv").write_text("image,labels\np0.jpg,cats\np1.jpg,dog\n")
    wrong = inline(*small_data.cam("other", photos))
    assert wrong.returncode == 1
    assert "did you mean 'cat' for 'cats'? Else use weights" in one_line(wrong.stderr)
    checked = inline("check", "--dataset", "folder", "--root", photos)
    assert "classes: 'cats' is a class that nobody knows; did you mean 'cat'?" in checked.stderr


def test_check_of_nothing_is_one_line(cli: Cli, tmp_path: Path) -> None:
    done = cli("check", "--dataset", "coco", "--root", tmp_path)
    assert done.returncode == 1
    assert "train2014" in one_line(done.stderr)
    wrong = cli("check", "--dataset", "folder", "--root", tmp_path, "--no-difficult")
    assert wrong.returncode == 2
    assert "--no-difficult" in one_line(wrong.stderr)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    images = [picture(k, size=(64, 96)) for k in (1, 2)]
    square = [[8, 8, 40, 8, 40, 40, 8, 40]]
    objects = [annotation(1, 17, square), annotation(2, 18, square), annotation(2, 1, square)]
    write_instances(root / "annotations/instances_train2014.json", images, objects)
    for item in images:
        write_image(root / "train2014" / item["file_name"], (64, 96))
    return root


def test_coco_from_annotations_to_scores(
    inline: Cli, coco: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    drawn = inline("masks", "--root", coco)
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout == f"{coco / 'SegmentationClass'}\n"
    made = inline("cam", "--dataset", "coco", "--root", coco, "--weights", tiny_weights)
    assert made.returncode == 0, made.stderr
    run = Run(tmp_path / "runs/coco")
    settings = run.stage("cam")["settings"]
    assert settings["preset"]["cam"]["box_threshold"] == 0.7
    assert len(settings["classes"]) == 80
    assert run.load_cams("COCO_train2014_000000000002").labels.tolist() == [16, 0]
    scored = inline("eval", "--json", "scores.json")
    assert scored.returncode == 0, scored.stderr
    stages = json.loads((tmp_path / "scores.json").read_text())["stages"]
    assert [scores["images"] for scores in stages.values()] == [2]
    other = inline(
        *("cam", "--dataset", "coco", "--root", coco, "--weights", tiny_weights),
        *("--box-threshold", 0.4, "--out", "other"),
    )
    assert other.returncode == 0, other.stderr
    again = Run(tmp_path / "other").stage("cam")["settings"]["preset"]
    assert again["cam"]["box_threshold"] == 0.4


def test_labels_auto_writes_tags_that_can_be_corrected(
    inline: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    (photos / "labels.csv").unlink()
    nothing = cam(inline, photos, tiny_weights, "--labels", "auto")
    assert nothing.returncode == 2
    assert "--prompts" in one_line(nothing.stderr)

    options = ("--labels", "auto", "--prompts", "voc", "--tag-threshold", 0)
    shards = cam(inline, photos, tiny_weights, *options, "--shard", "0/2")
    assert shards.returncode == 2
    assert "clipes tag" in one_line(shards.stderr)
    first = cam(inline, photos, tiny_weights, *options)
    assert first.returncode == 0, first.stderr
    table = tmp_path / "runs/folder/labels.csv"
    assert "runs/folder/labels.csv" in first.stderr
    rows = dict(line.split(",")[:2] for line in table.read_text().splitlines()[1:])
    assert set(rows) == {f"p{k}.jpg" for k in range(6)}
    tagged = [Path(name).stem for name, labels in rows.items() if labels]
    run = Run(tmp_path / "runs/folder")
    assert run.ids("cams") == tagged
    assert inline("refine", "--workers", 1).returncode == 0

    # A correction: where what the classes look like is kept, only this image is made again.
    before = {id_: run.cams_path(id_).read_bytes() for id_ in tagged}
    lines = table.read_text().splitlines()
    table.write_text("\n".join(["p2.jpg,cat;dog," if x.startswith("p2") else x for x in lines]))
    second = cam(inline, photos, tiny_weights, *options, "--keep-looks")
    assert second.returncode == 0, second.stderr
    assert "made again: p2: its maps were made for" in second.stderr
    assert run.load_cams("p2").labels.tolist() == [7, 11]
    assert all(run.cams_path(k).read_bytes() == v for k, v in before.items() if k != "p2")
    refined = inline("refine", "--workers", 1)
    assert refined.returncode == 0, refined.stderr
    assert "1 made" in refined.stderr
    assert set(np.unique(run.load_pseudo("p2").mask)) <= {0, 8, 12}
    assert inline("eval").returncode == 0
    third = cam(inline, photos, tiny_weights, *options)
    assert "1 of the 6 images that say what the classes look like have other labels" in third.stderr
    assert "maps: 6 made, 0 there before, 0 failed" in third.stderr
    half = cam(inline, photos, tiny_weights, *options, "--shard", "0/2")
    assert half.returncode == 0, half.stderr


def test_tag_first_then_cam(inline: Cli, photos: Path, tiny_weights: Path, tmp_path: Path) -> None:
    (photos / "labels.csv").unlink()
    (photos / "classes.txt").write_text("cat\ncow\ndog\n")
    where = ("--dataset", "folder", "--root", photos, "--weights", tiny_weights)
    (photos / "images/q.heic").touch()
    done = inline("tag", *where, "--out", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mine\n"
    assert done.stderr.count("1 picture is of a kind that is not read (.heic)") == 1
    path = tmp_path / "mine/labels.csv"
    path.write_text("image,labels\n" + "".join(f"p{k}.jpg,cow\n" for k in range(6)))
    made = inline("cam", *where, "--labels", "auto", "--out", "mine")
    assert made.returncode == 0, made.stderr
    run = Run(tmp_path / "mine")
    assert [run.load_cams(f"p{k}").labels.tolist() for k in range(6)] == [[1]] * 6
    other = inline("tag", *where, "--out", "mine", "--tag-threshold", 0.5)
    assert other.returncode == 1
    assert "tags.threshold = 0.4, not 0.5" in one_line(other.stderr)
