"""cam, refine and eval as a user runs them, and what happens when things go wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from clipes.run.folder import Run
from tests.cli.conftest import Cli
from tests.cli.inline import one_line


def cam(cli: Cli, photos: Path, weights: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return cli("cam", "--dataset", "folder", "--root", photos, "--weights", weights, *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_stages_in_a_row(cli: Cli, photos: Path, tiny_weights: Path, tmp_path: Path) -> None:
    first = cam(cli, photos, tiny_weights)
    assert first.returncode == 0, first.stderr
    assert first.stdout == "runs/folder\n"
    assert "6 made" in first.stderr
    run = Run(tmp_path / "runs" / "folder")
    maps = run.load_cams("p2")
    assert maps.labels.tolist() == [0, 2]  # cat, cow, dog, person, sofa
    assert maps.maps.shape == (2, 10, 12)  # 7 x 8 patches, and a closer look at 1.5 times as many
    assert maps.size == (112, 120)
    manifest = json.loads((run.root / "run.json").read_text())
    assert manifest["schema"] == 1
    settings = manifest["stages"]["cam"]["settings"]
    assert settings["classes"] == ["cat", "cow", "dog", "person", "sofa"]
    assert len(settings["weights"]["sha256"]) == 64
    assert manifest["stages"]["cam"]["packages"]["torch"]
    assert set(manifest["stages"]["cam"]["facts"]["kernels"]) == {"linear", "attention"}

    refined = cli("refine", "--workers", 2)
    assert refined.returncode == 0, refined.stderr
    pseudo = run.load_pseudo("p2")
    assert pseudo.mask.shape == (112, 120)
    assert set(np.unique(pseudo.mask)) <= {0, 1, 3}
    assert 0 < pseudo.confidence.min() <= pseudo.confidence.max() <= 1

    scored = cli("eval", "--exponents", "1,2", "--json", "out.json")
    assert scored.returncode == 0, scored.stderr
    assert "mIoU" in scored.stdout
    stages = json.loads((tmp_path / "out.json").read_text())["stages"]
    assert set(stages) == {
        "CAM (alpha 1)",
        "CAM (alpha 2)",
        "CRF",
        "CRF >= 0.95",
    }
    masks = cli("eval", run.root / "pseudo", "--gt", photos / "masks", "--json", "masks.json")
    assert masks.returncode == 0, masks.stderr
    again = json.loads((tmp_path / "masks.json").read_text())["stages"]["masks"]
    assert again["pixel_accuracy"] == stages["CRF"]["pixel_accuracy"]

    before = contents(run.root / "cams") | contents(run.root / "pseudo")
    assert "0 made, 6 there before" in cam(cli, photos, tiny_weights).stderr
    assert "0 made, 6 there before" in cli("refine").stderr
    assert contents(run.root / "cams") | contents(run.root / "pseudo") == before

    other = cam(cli, photos, tiny_weights, "--box-threshold", 0.7)
    assert other.returncode == 1
    assert "preset.cam.box_threshold = 0.4, not 0.7" in one_line(other.stderr)


def test_threads_and_processes_make_the_same_masks(
    cli: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    assert cam(cli, photos, tiny_weights, "--out", "loky").returncode == 0
    shutil.copytree(tmp_path / "loky", tmp_path / "threading")
    for backend in ("loky", "threading"):
        done = cli("refine", backend, "--backend", backend, "--workers", 2)
        assert done.returncode == 0, done.stderr
        assert "6 made" in done.stderr
    made = [contents(tmp_path / name / "pseudo") for name in ("loky", "threading")]
    assert made[0] == made[1]


def test_masks_of_a_crf_that_is_gone_are_not_mixed_with_others(
    cli: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    assert cam(cli, photos, tiny_weights, "--out", "run").returncode == 0
    assert cli("refine", "run").returncode == 0
    record = tmp_path / "run" / "run.json"
    text = record.read_text("utf-8")
    record.write_text(text.replace('"backend": "numba"', '"backend": "torch"'), "utf-8")
    again = cli("refine", "run")
    assert again.returncode == 1
    assert 'backend = "torch", not "numba"' in one_line(again.stderr)
    assert "remove its folders pseudo and confidence" in again.stderr
    for name in ("pseudo", "confidence"):
        shutil.rmtree(tmp_path / "run" / name)
    assert cli("refine", "run").returncode == 0


def test_bad_images_are_named_and_the_others_done(
    cli: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    whole = (photos / "images" / "p0.jpg").read_bytes()
    (photos / "images" / "p0.jpg").write_bytes(whole[: len(whole) // 2])
    labels = (photos / "labels.csv").read_text()
    broken = labels.replace("p1.jpg,dog", "p1.jpg,unicorn").replace("p3.jpg,person", "p3.jpg,")
    (photos / "labels.csv").write_text(broken)
    (photos / "classes.txt").write_text("cat\ncow\ndog\nperson\nsofa\n")

    first = cam(cli, photos, tiny_weights)
    assert first.returncode == 1
    assert "Traceback" not in first.stderr
    told = [line for line in first.stderr.splitlines() if line.startswith("skipping ")]
    assert len(told) == 3
    for name, reason in (("p0", "p0.jpg"), ("p1", "unicorn"), ("p3", "label")):
        (line,) = [line for line in told if line.startswith(f"skipping {name}: ")]
        assert reason in line
    run = Run(tmp_path / "runs" / "folder")
    assert run.ids("cams") == ["p2", "p4", "p5"]
    done = contents(run.root / "cams")

    (photos / "images" / "p0.jpg").write_bytes(whole)
    (photos / "labels.csv").write_text(labels)
    second = cam(cli, photos, tiny_weights)
    assert second.returncode == 0, second.stderr
    assert "3 made, 3 there before, 0 failed" in second.stderr
    after = contents(run.root / "cams")
    assert len(after) == 6
    assert done.items() <= after.items()


def test_batches_make_the_same_maps(
    cli: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    assert cam(cli, photos, tiny_weights, "--out", "alone").returncode == 0
    together = cam(cli, photos, tiny_weights, "--out", "together", "--batch", "4")
    assert "6 made" in together.stderr
    alone, run = Run(tmp_path / "alone"), Run(tmp_path / "together")
    for name in sorted(path.stem for path in (run.root / "cams").iterdir()):
        got, expected = run.load_cams(name), alone.load_cams(name)
        np.testing.assert_array_equal(got.labels, expected.labels)
        np.testing.assert_allclose(got.maps, expected.maps, atol=2e-3)  # they are kept in fp16


def test_ranks_of_torchrun_share_the_images(
    cli: Cli, two_ranks: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    data = ("--dataset", "folder", "--root", photos, "--out", "ranks")
    done = two_ranks("cam", *data, "--weights", tiny_weights)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("3 made, 0 there before") == 2
    assert cam(cli, photos, tiny_weights, "--out", "alone").returncode == 0
    assert contents(tmp_path / "ranks" / "cams") == contents(tmp_path / "alone" / "cams")


def test_a_cache_that_cannot_be_written_ends_nothing(
    cli: Cli, photos: Path, tiny_weights: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    clip = ("--preset", "clip")  # needs no second tower, which would be fetched
    assert cam(cli, photos, tiny_weights, *clip, "--out", "kept").returncode == 0
    (tmp_path / "file").touch()
    environment["CLIPES_CACHE"] = str(tmp_path / "file" / "cache")
    done = cam(cli, photos, tiny_weights, *clip, "--out", "lost")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("CLIPES_CACHE names another folder") == 1
    assert contents(tmp_path / "lost" / "cams") == contents(tmp_path / "kept" / "cams")
    fetched = cli("weights", "fetch", "registry")
    assert fetched.returncode == 1
    line = one_line(fetched.stderr)
    assert f"cannot write to the cache {tmp_path}/file/cache/weights: Not a directory" in line
    assert "set CLIPES_CACHE to another folder" in line


def test_missing_and_wrong_input_is_one_line(
    cli: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    absent = cli("cam", "--dataset", "voc", "--root", tmp_path / "nowhere")
    assert absent.returncode == 1
    assert "nowhere" in one_line(absent.stderr)
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"not weights at all" * 10)
    wrong = cam(cli, photos, junk)
    assert wrong.returncode == 1
    assert "junk.safetensors" in one_line(wrong.stderr)
    assert not (tmp_path / "runs").exists()
    nothing = cli("refine")
    assert nothing.returncode == 1
    assert "clipes cam" in one_line(nothing.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ("cam",),
        ("cam", "--dataset", "voc", "--preset", "nonsense"),
        ("cam", "--dataset", "voc", "--shard", "3/3"),
        ("eval", "--exponents", "one"),
        ("nonsense",),
    ],
)
def test_usage_errors_exit_with_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
