"""Full disks, read-only folders, and two processes in one folder: one line, and nothing is lost."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clipes.run.folder import Run
from tests.cli.forked import Starter
from tests.cli.inline import failed
from tests.cli.small_data import cam, train, write_photos, write_refined

pytestmark = pytest.mark.slow

Disk = Callable[[str], None]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mount ``tmp_path / "disk"`` with options of a disk in memory, or change them."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a disk in memory needs root")

    yield mount
    while folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.is_file()]


FULL = (
    r"clipes: cannot write {}: No space left on device; check the folder's permissions and the "
    r"free space"
)


def test_cam_and_refine_stop_at_a_full_disk(start: Starter, tmp_path: Path, disk: Disk) -> None:
    write_photos(tmp_path / "photos", 30, (96, 128))
    clip = ("--preset", "clip")  # whose sums are small against the maps
    assert start(*cam("whole"), *clip).returncode == 0
    disk("size=80k")
    full = Run(tmp_path / "disk" / "run")
    done = start(*cam("disk/run"), *clip)
    assert re.fullmatch(FULL.format(r"disk/run/cams/p\d+\.npz"), failed(done))
    assert "skipping" not in done.stderr  # a full disk is no image's fault
    made = full.ids("cams")
    assert 3 < len(made) < 30
    for id_ in made:
        whole = Run(tmp_path / "whole").cams_path(id_).read_bytes()
        assert full.cams_path(id_).read_bytes() == whole
    assert hidden(full.root) == []
    disk("remount,size=240k")
    assert start(*cam("disk/run"), *clip).returncode == 0
    assert len(full.ids("cams")) == 30

    for workers in (1, 2):
        done = start("refine", "disk/run", "--workers", workers)
        place = r"\S*disk/run/(pseudo/p\d+\.png|confidence/p\d+\.png|run\.json)"
        assert re.fullmatch(FULL.format(place), failed(done))
        assert "skipping" not in done.stderr
        for id_ in full.ids("pseudo"):
            full.load_pseudo(id_)
    assert 0 < len(full.ids("pseudo")) < 30
    disk("remount,size=2m")
    assert start("refine", "disk/run").returncode == 0
    assert start("refine", "whole").returncode == 0
    for folder in ("pseudo", "confidence"):
        expected = {p.name: p.read_bytes() for p in (tmp_path / "whole" / folder).iterdir()}
        assert {p.name: p.read_bytes() for p in (full.root / folder).iterdir()} == expected


def test_a_training_stops_at_a_full_disk(start: Starter, tmp_path: Path, disk: Disk) -> None:
    write_refined(tmp_path / "maps", tmp_path / "photos", 6)
    disk("size=60m")
    done = start(*train("maps", "disk/run"))
    line = failed(done)
    assert re.fullmatch(FULL.format(r"disk/run/checkpoints/(iteration-\d+|final)\.pt"), line)
    assert hidden(tmp_path / "disk") == []
    disk("remount,size=400m")
    done = start(*train("maps", "disk/run"))
    assert done.returncode == 0, done.stderr
    assert "going on after iteration" in done.stderr


def test_read_only_folders(start: Starter, tmp_path: Path, disk: Disk) -> None:
    run = write_refined(tmp_path / "maps", tmp_path / "photos", 6)
    shutil.rmtree(run.root)
    assert start(*cam("maps")).returncode == 0
    assert start("refine", "maps").returncode == 0
    disk("size=40m")
    shutil.copytree(tmp_path / "maps", tmp_path / "disk" / "run")
    (tmp_path / "disk" / "run" / ".p1-00000000-1-0123456789ab.npz").touch()
    before = sorted(path.name for path in (tmp_path / "disk").rglob("*"))
    disk("remount,ro")
    for finished in (cam("disk/run"), ["refine", "disk/run"]):  # there is nothing to write
        done = start(*finished)
        assert done.returncode == 0, done.stderr
        assert "0 made, 6 there before" in done.stderr
    for command in (
        cam("disk/new"),
        train("disk/run", "disk/run"),
        train("maps", "disk/new"),
    ):
        line = failed(start(*command))
        assert re.match(r"clipes: cannot write (to )?disk/", line)
        assert "Read-only file system; check" in line
    assert sorted(path.name for path in (tmp_path / "disk").rglob("*")) == before


def test_a_second_process_in_one_folder_is_refused(start: Starter, tmp_path: Path) -> None:
    run = write_refined(tmp_path / "maps", tmp_path / "photos", 6)
    for stage, command in {
        "cam": cam("run"),
        "refine": ["refine", "run"],
        "train-seg": train("run", "run"),
    }.items():
        folder = Run(tmp_path / "run")
        with folder.claim(stage):
            line = failed(start(*command))
        place = {"cam": "cams", "refine": "pseudo", "train-seg": "checkpoints"}[stage]
        otherwise = "let every process do a part with --shard"
        if stage == "train-seg":  # which has no parts
            otherwise = "train into another folder (--out)"
        assert line == (
            f"clipes: another 'clipes {stage}' is working in run/{place}; wait for it, or "
            f"{otherwise}"
        )
        with folder.claim(stage, shared=True):
            assert start(*command).returncode == 1
        assert start(*command).returncode == 0
    assert run.exists()


def test_two_shards_at_once_make_the_whole_once(start: Starter, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 12)
    assert start(*cam("whole")).returncode == 0
    assert start("refine", "whole").returncode == 0
    for command in (cam("run"), ["refine", "run", "--workers", "1"]):
        both = [start.start(*command, "--shard", f"{index}/2") for index in range(2)]
        for process in both:
            done = process.wait()
            assert done.returncode == 0, done.stderr
            assert "6 made, 0 there before, 0 failed" in done.stderr
    for folder in ("cams", "pseudo", "confidence"):
        expected = {p.name: p.read_bytes() for p in (tmp_path / "whole" / folder).iterdir()}
        assert {p.name: p.read_bytes() for p in (tmp_path / "run" / folder).iterdir()} == expected
    stages = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert {"cam", "refine"} <= set(stages)
