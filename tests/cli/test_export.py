"""``clipes export`` as a user runs it, on masks that are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from clipes.disk.images import read_image
from clipes.run.folder import Run
from clipes.types import PseudoLabel
from tests.cli.conftest import Cli

CLASSES = ["cat", "cow", "dog", "person", "sofa"]


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> Run:
    """A run whose first five masks are made."""
    run = Run(tmp_path / "runs" / "folder")
    settings = {"dataset": "folder", "split": None, "labels": None, "classes": CLASSES}
    run.begin("cam", settings, "clipes cam", {"root": str(photos)})
    for index in range(5):
        size = read_image(photos / "images" / f"p{index}.jpg").shape[:2]
        mask = np.zeros(size, np.uint8)
        mask[10:30, 20:50] = 1 + index
        confidence = np.full(size, 0.99, np.float32)
        confidence[:5] = 0.5
        run.save_pseudo(f"p{index}", PseudoLabel(mask, confidence))
    return run


def test_coco(cli: Cli, run: Run) -> None:
    done = cli("export", "--format", "coco", "--confidence", 0.95)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/folder/export/coco\n"
    assert "1 of 6 images have no pseudo-mask yet" in done.stderr
    assert "run 'clipes refine runs/folder' first" in done.stderr
    assert "coco: 5 images written, 0 there before, 0 failed" in done.stderr
    content = json.loads((run.root / "export" / "coco" / "instances.json").read_text())
    assert [entry["name"] for entry in content["categories"]] == CLASSES
    assert content["images"][0]["file_name"] == "p0.jpg"
    record = json.loads((run.root / "export" / "coco" / "export.json").read_text())
    assert record["command"] == "clipes export --format coco --confidence 0.95"
    assert record["settings"]["confidence"] == 0.95


def test_a_format_with_a_file_per_image_resumes(cli: Cli, run: Run, tmp_path: Path) -> None:
    first = cli("export", run.root, "--format", "labelme", "--out", "polygons")
    assert first.returncode == 0, first.stderr
    (tmp_path / "polygons" / "p2.json").unlink()
    again = cli("export", run.root, "--format", "labelme", "--out", "polygons")
    assert "labelme: 1 images written, 4 there before, 0 failed" in again.stderr
    assert again.stdout == "polygons\n"
    other = cli("export", run.root, "--format", "labelme", "--out", "polygons", "--confidence", 0.9)
    assert other.returncode == 1
    assert "confidence = null, not 0.9" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_damaged_mask_fails_alone(cli: Cli, run: Run) -> None:
    run.pseudo_path("p1").write_bytes(b"no mask")
    done = cli("export", run.root, "-f", "voc")
    assert done.returncode == 1
    assert "skipping p1: " in done.stderr
    assert "voc: 4 images written, 0 there before, 1 failed" in done.stderr


def test_errors_name_the_remedy(cli: Cli, run: Run) -> None:
    option = cli("export", run.root, "-f", "clip-es", "--confidence", 0.9)
    assert option.returncode == 2
    assert "--confidence means nothing to the format clip-es" in option.stderr
    assert cli("export", run.root, "-f", "nonsense").returncode == 2
    shutil.rmtree(run.root / "pseudo")
    nothing = cli("export", run.root, "-f", "voc")
    assert nothing.returncode == 1
    assert "run 'clipes refine" in nothing.stderr
    assert not (run.root / "export").exists()


def test_corrected_masks_come_back(cli: Cli, run: Run, tmp_path: Path) -> None:
    assert cli("export", run.root, "-f", "coco", "--out", "out").returncode == 0
    path = tmp_path / "out" / "instances.json"
    content = json.loads(path.read_text())
    content["images"] = content["images"][:2]
    content["images"][1]["width"] += 1
    path.write_text(json.dumps(content))
    done = cli("import", run.root, "out/instances.json", "--format", "coco", "--by", "ann")
    assert done.returncode == 1
    assert done.stdout == f"{run.corrected.root}\n"
    assert "skipping p1: it is 96 x 121 in the file, the picture 96 x 120" in done.stderr
    counts = "1 corrected masks (0 changed, 1 as they were), 0 there before, 1 failed"
    assert f"import: {counts}" in done.stderr
    record = json.loads(run.manifest_path.read_text())["stages"]["import"]
    assert record["settings"]["by"] == "ann"
    assert run.corrected.ids("pseudo") == ["p0"]
