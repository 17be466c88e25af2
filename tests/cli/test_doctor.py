"""``clipes doctor``: what it says is true, and it leaves no trace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipes import __version__
from clipes.weights.cache import Recipe, Weights, path_of, save
from tests.cli.inline import exit_code

Doctor = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def doctor(here: Path, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Run it with --json; its exit code and what it says, checks by name."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        code = exit_code("doctor", "--json", *arguments)
        said = json.loads(capsys.readouterr().out)
        said["checks"] = {check["name"]: check for check in said["checks"]}
        return code, said

    return run


def cache_weights(tmp_path: Path) -> Path:
    """Put a file that says it is OpenAI's into the cache."""
    folder = tmp_path / "cache"
    path = path_of("ViT-B-16", "openai", folder)
    path.parent.mkdir(parents=True)
    recipe = Recipe(True, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    weights = Weights("openai", "ViT-B-16", path, "0" * 64, True, recipe)
    save({"logit_scale": torch.ones(())}, weights, path.parent)
    return path


def test_nothing_is_there(doctor: Doctor, tmp_path: Path) -> None:
    code, said = doctor("--dataset", "voc")
    assert code == 1
    assert said["ok"] is False
    assert said["clipes"] == __version__
    weights = said["checks"]["weights"]
    assert weights["state"] == "missing"
    assert "clipes weights fetch" in weights["remedy"]
    tower = said["checks"]["second tower"]
    assert (tower["state"], "--preset clip" in tower["remedy"]) == ("note", True)
    assert "--root" in said["checks"]["data: voc"]["remedy"]
    assert said["checks"]["package: torch"]["detail"] == torch.__version__.partition("+")[0]
    assert {line["command"]: line["missing"] for line in said["lines"]} == {
        "clipes cam --dataset voc": ["weights", "data: voc"],
        "clipes refine": [],
        "clipes train-seg --cgl": [],
        "clipes eval": ["ground truth: voc"],
    }
    assert list(tmp_path.iterdir()) == []


def test_everything_is_there(doctor: Doctor, tmp_path: Path, photos: Path) -> None:
    path = cache_weights(tmp_path)
    (tmp_path / "Makefile").write_text("eval:\n")
    before = sorted(tmp_path.rglob("*"))
    code, said = doctor("--dataset", "folder", "--root", photos)
    assert code == 0
    assert said["ok"] is True
    assert f"auto is ViT-B-16 openai in {path}" in said["checks"]["weights"]["detail"]
    assert f"6 images in {photos}" in said["checks"]["data: folder"]["detail"]
    assert said["checks"]["ground truth: folder"]["detail"] == "6 masks"
    commands = [line["command"] for line in said["lines"]]
    assert commands[0] == f"clipes cam --dataset folder --root {photos}"
    assert commands[-1] == ("make eval" if shutil.which("make") else "clipes eval")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(find_spec("skimage") is None, reason="the photos are scikit-image's")
def test_without_any_data_set_the_examples_would_do(doctor: Doctor, tmp_path: Path) -> None:
    cache_weights(tmp_path)
    code, said = doctor()
    assert code == 0
    assert said["lines"][0]["command"] == "clipes cam --dataset examples"
    assert said["checks"]["data: voc"]["state"] == "note"
    assert not (tmp_path / "datasets").exists()


def test_photos_without_masks_cannot_be_scored(
    doctor: Doctor, tmp_path: Path, photos: Path
) -> None:
    cache_weights(tmp_path)
    shutil.rmtree(photos / "masks")
    (photos / "labels.csv").write_text("image,labels\np0.jpg,cat\np1.jpg,\n")
    code, said = doctor("--root", photos, "-d", "folder")
    assert code == 1
    assert [line["missing"] for line in said["lines"]] == [[], [], [], ["ground truth: folder"]]
    assert said["checks"]["data: folder"]["state"] == "note"
    assert "clipes check --dataset folder" in said["checks"]["data: folder"]["remedy"]


def test_a_root_that_is_not_there_is_one_line(cli: Callable[..., Any]) -> None:
    done = cli("doctor", "--root", "gone")
    assert done.returncode == 1
    assert done.stderr == "clipes: there is no folder gone; check the path given by --root\n"


def test_coco_is_found_without_reading_its_labels(doctor: Doctor, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    (root / "train2014").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(root / "train2014" / "COCO_train2014_000000000009.jpg")
    _, said = doctor("-d", "coco", "--root", root)
    assert "no instances file" in said["checks"]["data: coco"]["detail"]
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2014.json").write_text("not even JSON")
    _, said = doctor("-d", "coco", "--root", root)
    assert said["checks"]["data: coco"]["state"] == "ok"
    assert "clipes masks" in said["checks"]["ground truth: coco"]["remedy"]


def test_a_folder_that_cannot_be_written_is_named(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    code, said = doctor()
    assert code == 1
    assert "cannot be written" in said["checks"]["disk: runs"]["detail"]
    assert all("disk: runs" in line["missing"] for line in said["lines"])


def test_a_broken_library_is_named(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('made to fail')")
    done = subprocess.run(
        [sys.executable, "-m", "clipes", "doctor", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    (numba,) = [check for check in said["checks"] if check["name"] == "package: numba"]
    assert (numba["state"], numba["detail"]) == ("missing", "made to fail")
    assert numba["remedy"] == "pip install numba"
    assert all(line["missing"] == ["package: numba"] for line in said["lines"])


def test_people_get_lines(cli: Callable[..., Any]) -> None:
    done = cli("doctor", "--dataset", "voc")
    assert done.returncode == 1
    assert "missing  weights: " in done.stdout
    assert "clipes refine: would run\n" in done.stdout
    assert "clipes cam --dataset voc: needs weights, data: voc\n" in done.stdout
