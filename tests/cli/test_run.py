"""``clipes run`` as a user types it: every stage in a row, stopped, continued, failing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from clipes.run.folder import Run
from tests.cli.forked import Starter
from tests.cli.inline import one_line
from tests.cli.small_data import write_clip, write_photos
from tests.dino_support import write_dino

IMAGES = 4
LINE = ["run", "--dataset", "folder", "--root", "photos", "--weights", "clip.safetensors"]
LINE += ["--text-features", "text.npz", "--workers", "1", "--out", "run"]
FAST = [*LINE, "--preset", "fast"]


@pytest.fixture(autouse=True)
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", IMAGES)
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def made(run: Run) -> dict[str, bytes]:
    files = [
        path for name in ("cams", "pseudo", "confidence") for path in (run.root / name).iterdir()
    ]
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def places(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What was said of the stages, in order."""
    return [line for line in done.stderr.splitlines() if line[:1].isdecimal() and "/" in line[:3]]


def test_one_line_makes_everything_and_does_so_once(start: Starter, run: Run, photos: Path) -> None:
    first = start(*LINE)
    assert first.returncode == 0, first.stderr
    assert places(first) == [
        "1/4 cam: 4 of 4 done: 4 made, 0 there before, 0 failed",
        "2/4 refine: 4 of 4 done: 4 made, 0 there before, 0 failed",
        "3/4 eval: 4 images scored",
        "4/4 report: run/report/index.html",
    ]
    *scores, page, masks, following = first.stdout.splitlines()
    assert "Scores in %" in scores[0]
    assert page == "report: run/report/index.html"
    assert masks == "masks:  run/pseudo"
    assert following == "next:   clipes export run --format coco"
    assert (run.root / "report" / "index.html").is_file()
    assert run.ids("pseudo") == run.ids("confidence") == run.ids("cams")
    assert "CRF" in json.loads((run.root / "scores.json").read_text())["stages"]
    (command,) = run.commands()
    assert command.startswith("clipes run --dataset folder --root photos ")
    assert start(*following.removeprefix("next:   clipes ").split()).returncode == 0

    before = made(run)
    again = start(*LINE)
    assert again.returncode == 0, again.stderr
    assert [line.partition(": ")[2] for line in places(again)[:2]] == 2 * [
        "4 of 4 done: 0 made, 4 there before, 0 failed"
    ]
    assert made(run) == before
    for alone in (["refine", "run"], ["cam", *LINE[1:]]):  # the stages go on from there
        assert "0 made, 4 there before" in start(*alone).stderr

    labels = photos / "labels.csv"
    labels.write_text(labels.read_text().replace("p003.jpg,cat", "p003.jpg,dog"))
    kept = start(*LINE, "--keep-looks")
    assert kept.returncode == 0, kept.stderr
    assert places(kept)[0] == "1/4 cam: 4 of 4 done: 1 made, 3 there before, 0 failed"
    anew = start(*LINE)
    assert places(anew)[0] == "1/4 cam: 4 of 4 done: 4 made, 0 there before, 0 failed"


def test_what_is_wrong_with_an_image_is_said_once_and_the_others_are_done(
    start: Starter, run: Run, photos: Path
) -> None:
    shutil.rmtree(photos / "masks")
    whole = (photos / "images" / "p001.jpg").read_bytes()
    (photos / "images" / "p001.jpg").write_bytes(whole[:200])
    labels = (photos / "labels.csv").read_text()
    (photos / "labels.csv").write_text(labels.replace("p003.jpg,cat", "p003.jpg,unicorn"))
    first = start(*FAST)
    assert first.returncode == 1
    told = [line for line in first.stderr.splitlines() if line.startswith("skipping ")]
    assert [line.split(": ")[0] for line in told] == ["skipping p001", "skipping p003"]
    assert "p001.jpg" in told[0]
    assert "unknown class 'unicorn'" in told[1]
    assert places(first) == [  # without ground truth there is nothing to score
        "1/3 cam: 2 of 4 done: 2 made, 0 there before, 2 failed",
        "2/3 refine: 2 of 4 done: 2 made, 0 there before, 2 failed",
        "3/3 report: run/report/index.html",
    ]
    assert "report: run/report/index.html\n" in first.stdout
    assert run.ids("pseudo") == ["p000", "p002"]

    (photos / "images" / "p001.jpg").write_bytes(whole)
    (photos / "labels.csv").write_text(labels)
    second = start(*FAST)
    assert second.returncode == 0, second.stderr
    assert places(second)[1] == "2/3 refine: 4 of 4 done: 2 made, 2 there before, 0 failed"


def test_it_ends_where_nothing_can_follow(start: Starter, run: Run, photos: Path) -> None:
    for path in (photos / "images").iterdir():
        path.write_bytes(b"no picture")
    nothing = start(*FAST)
    assert nothing.returncode == 1
    assert "no image of photos has maps: all 4 failed, the first is p000: " in one_line(
        nothing.stderr
    )
    assert nothing.stdout == ""

    shutil.rmtree(photos)
    write_photos(photos, IMAGES)
    assert start(*FAST).returncode == 0
    record = run.manifest_path
    record.write_text(record.read_text().replace('"backend": "numba"', '"backend": "torch"'))
    (run.root / "report" / "index.html").unlink()
    conflict = start(*FAST)
    assert conflict.returncode == 1
    assert 'backend = "torch", not "numba"' in one_line(conflict.stderr)
    assert not (run.root / "report" / "index.html").exists()
    other = start(*LINE)
    assert other.returncode == 1
    assert "preset.name" in one_line(other.stderr)


@pytest.mark.parametrize(
    ("more", "environment", "said"),
    [
        (["--predict-on", "photos"], {}, "no segmenter to predict photos with; add --train"),
        (["--iterations", "3"], {}, "no training to have 3 iterations; add --train"),
        ([], {"RANK": "0", "WORLD_SIZE": "2"}, "start the stages one by one: cam, refine, report"),
        (["--preset", "nonsense"], {}, "nonsense"),
    ],
)
def test_what_makes_no_sense_exits_with_2(
    start: Starter, run: Run, more: list[str], environment: dict[str, str], said: str
) -> None:
    done = start.start(*LINE, *more, **environment).wait()
    assert done.returncode == 2
    assert said in done.stderr
    assert not run.root.exists()


def test_photos_to_predict_that_are_not_there_are_said_before_all_else(
    start: Starter, run: Run
) -> None:
    done = start(*LINE, "--train", "--predict-on", "gone")
    assert done.returncode == 1
    assert "no file or folder gone; check the path given by --predict-on" in one_line(done.stderr)
    assert not run.root.exists()


def test_stopped_at_some_moment_it_goes_on_to_the_same_files(
    start: Starter, run: Run, tmp_path: Path
) -> None:
    assert start(*FAST, "--out", "unbroken").returncode == 0
    for _ in range(10):  # all may be done before the signal arrives
        shutil.rmtree(run.root, ignore_errors=True)
        process = start.start(*FAST)
        deadline = time.monotonic() + 60
        while not list(run.root.glob("cams/*.npz")) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill(signal.SIGINT)
        stopped = process.wait()
        if stopped.returncode:
            break
    assert stopped.returncode == 130
    assert one_line(stopped.stderr) == "clipes: stopped; the same command continues where it was"
    assert start(*FAST).returncode == 0
    assert made(run) == made(Run(tmp_path / "unbroken"))


def test_a_segmenter_is_trained_and_asked_and_a_training_that_fails_keeps_no_page_away(
    start: Starter, run: Run, photos: Path, tmp_path: Path
) -> None:
    write_clip(tmp_path / "clip.safetensors", tmp_path / "text.npz", layers=12)
    write_dino(tmp_path / "dino.safetensors")
    shutil.copytree(photos / "images", tmp_path / "others")
    train = [*FAST, "--dino", "dino.safetensors", "--train", "--iterations", "2"]
    train += ["--predict-on", "others"]
    first = start(*train)
    assert first.returncode == 0, first.stderr
    assert [line.split(":")[0] for line in places(first)] == [
        "1/6 cam", "2/6 refine", "3/6 train-seg", "4/6 predict", "5/6 eval", "6/6 report",
    ]  # fmt: skip
    assert "3/6 train-seg: 4 of 4 done: 4 made" in first.stderr
    assert "4/6 predict: 4 of 4 done: 4 made" in first.stderr
    checkpoint = run.root / "checkpoints" / "final.pt"
    assert checkpoint.is_file()
    assert "more:   run/predicted\n" in first.stdout
    following = f"clipes predict {checkpoint.relative_to(tmp_path)} MORE-PHOTOS --out masks"
    assert first.stdout.endswith(f"next:   {following}\n")
    assert "segmenter" in first.stdout  # its scores
    written = (run.root / "predicted" / "p000.png").stat().st_mtime_ns
    again = start(*train)
    assert "4/6 predict: 4 of 4 done: 0 made, 4 there before" in again.stderr
    assert (run.root / "predicted" / "p000.png").stat().st_mtime_ns == written

    (photos / "labels.csv").write_text((photos / "labels.csv").read_text().replace("sofa", "cat"))
    (run.root / "report" / "index.html").unlink()
    changed = start(*train)
    assert changed.returncode == 1
    assert "train anew with --no-resume" in one_line(changed.stderr)
    assert "6/6 report: run/report/index.html" in changed.stderr
    assert (run.root / "report" / "index.html").is_file()
    anew = start(*train, "--no-resume")
    assert anew.returncode == 0, anew.stderr
    assert "4/6 predict: 4 of 4 done: 4 made" in anew.stderr
