"""check, tag, masks and the label sources as a user runs them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clipes.artifacts import Run
from clipes.cli import main
from tests.cli.conftest import Cli
from tests.cli.test_stages import cam, one_line
from tests.torch_threads import torch_threads
from tests.unit.coco_support import annotation, picture, write_image, write_instances


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Cli]:
    """As ``cli``, but in this process: importing torch once is enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPES_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = list(map(str, arguments))
        with pytest.raises(SystemExit) as stop:
            main(command)
        told = capsys.readouterr()
        return subprocess.CompletedProcess(command, int(stop.value.code or 0), told.out, told.err)

    with torch_threads(1):
        yield run


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
    here: Cli, coco: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    drawn = here("masks", "--root", coco)
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout == f"{coco / 'SegmentationClass'}\n"
    made = here("cam", "--dataset", "coco", "--root", coco, "--weights", tiny_weights)
    assert made.returncode == 0, made.stderr
    run = Run(tmp_path / "runs/coco")
    settings = run.stage("cam")["settings"]
    assert settings["preset"]["cam"]["box_threshold"] == 0.7
    assert len(settings["classes"]) == 80
    assert run.load_cams("COCO_train2014_000000000002").labels.tolist() == [16, 0]
    scored = here("eval", "--json", "scores.json")
    assert scored.returncode == 0, scored.stderr
    stages = json.loads((tmp_path / "scores.json").read_text())["stages"]
    assert [scores["images"] for scores in stages.values()] == [2]
    other = here(
        *("cam", "--dataset", "coco", "--root", coco, "--weights", tiny_weights),
        *("--box-threshold", 0.4, "--out", "other"),
    )
    assert other.returncode == 0, other.stderr
    again = Run(tmp_path / "other").stage("cam")["settings"]["preset"]
    assert again["cam"]["box_threshold"] == 0.4


def test_labels_auto_writes_tags_that_can_be_corrected(
    here: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    (photos / "labels.csv").unlink()
    nothing = cam(here, photos, tiny_weights, "--labels", "auto")
    assert nothing.returncode == 2
    assert "--prompts" in one_line(nothing.stderr)

    options = ("--labels", "auto", "--prompts", "voc", "--tag-threshold", 0.05)
    shards = cam(here, photos, tiny_weights, *options, "--shard", "0/2")
    assert shards.returncode == 2
    assert "clipes tag" in one_line(shards.stderr)
    first = cam(here, photos, tiny_weights, *options)
    assert first.returncode == 0, first.stderr
    table = tmp_path / "runs/folder/labels.csv"
    assert "runs/folder/labels.csv" in first.stderr
    rows = dict(line.split(",")[:2] for line in table.read_text().splitlines()[1:])
    assert set(rows) == {f"p{k}.jpg" for k in range(6)}
    tagged = [Path(name).stem for name, labels in rows.items() if labels]
    run = Run(tmp_path / "runs/folder")
    assert run.ids("cams") == tagged
    assert here("refine", "--workers", 1).returncode == 0

    # A correction: only this image is made again.
    before = {id_: run.cams_path(id_).read_bytes() for id_ in tagged}
    lines = table.read_text().splitlines()
    table.write_text("\n".join(["p2.jpg,cat;dog," if x.startswith("p2") else x for x in lines]))
    second = cam(here, photos, tiny_weights, *options)
    assert second.returncode == 0, second.stderr
    assert run.load_cams("p2").labels.tolist() == [7, 11]
    assert not run.has_pseudo("p2")
    assert all(run.cams_path(k).read_bytes() == v for k, v in before.items() if k != "p2")
    refined = here("refine", "--workers", 1)
    assert refined.returncode == 0, refined.stderr
    assert "1 made" in refined.stderr
    assert set(np.unique(run.load_pseudo("p2").mask)) <= {0, 8, 12}
    assert here("eval").returncode == 0
    half = cam(here, photos, tiny_weights, *options, "--shard", "0/2")
    assert half.returncode == 0, half.stderr


def test_tag_first_then_cam(here: Cli, photos: Path, tiny_weights: Path, tmp_path: Path) -> None:
    (photos / "labels.csv").unlink()
    (photos / "classes.txt").write_text("cat\ncow\ndog\n")
    where = ("--dataset", "folder", "--root", photos, "--weights", tiny_weights)
    (photos / "images/q.heic").touch()
    done = here("tag", *where, "--out", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mine\n"
    assert "1 picture is of a kind that is not read (.heic)" in done.stderr
    path = tmp_path / "mine/labels.csv"
    path.write_text("image,labels\n" + "".join(f"p{k}.jpg,cow\n" for k in range(6)))
    made = here("cam", *where, "--labels", "auto", "--out", "mine")
    assert made.returncode == 0, made.stderr
    run = Run(tmp_path / "mine")
    assert [run.load_cams(f"p{k}").labels.tolist() for k in range(6)] == [[1]] * 6
    other = here("tag", *where, "--out", "mine", "--tag-threshold", 0.5)
    assert other.returncode == 1
    assert "tags.threshold = 0.38, not 0.5" in one_line(other.stderr)
