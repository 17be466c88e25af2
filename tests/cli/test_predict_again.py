"""predict into a folder that holds masks already: what stays, what is made again, what is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipes.disk.claim import claim
from clipes.run import origin
from clipes.seg.checkpoint import TrainingState, save_checkpoint
from clipes.seg.deeplab import DeepLab, DeepLabSpec
from clipes.seg.recipes import TestSettings
from clipes.stages import predict
from tests.cli.inline import exit_code

pytestmark = pytest.mark.usefixtures("one_thread")


def checkpoint(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = DeepLab(DeepLabSpec("deeplabv2", "mobilenet_v3_large", 16, ("cat", "dog")))
    save_checkpoint(path, model, TrainingState(), TestSettings(crf=False, flip=False))


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The photos a, b and c; two checkpoints (``one.pt``, ``two.pt``) lie beside their folder."""
    monkeypatch.chdir(tmp_path)
    checkpoint(Path("one.pt"), 1)
    checkpoint(Path("two.pt"), 2)
    photos = tmp_path / "disk"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(photos / f"{name}.png")
    return photos


def told(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Run predict; return what it says."""
    capfd.readouterr()
    ended = exit_code("predict", *arguments, "--device", "cpu")
    said = capfd.readouterr().err
    assert ended == code, said
    assert "Traceback" not in said
    return said


def masks(folder: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_a_photo_whose_disk_is_away_is_skipped_whether_it_has_a_mask_or_not(
    disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("links").mkdir()
    for photo in disk.iterdir():
        (Path("links") / photo.name).symlink_to(photo)
    told(capfd, "one.pt", "links", "--out", "out")
    made = masks()
    shutil.copy("links/a.png", "a.png")
    Path("links/a.png").unlink()
    shutil.move("a.png", "links/a.png")
    disk.rename("elsewhere")
    (Path("out") / "c.png").unlink()
    # A mask of this segmenter stays; that of another cannot be made again.
    for segmenter, done, away in (
        ("one.pt", "0 made, 2 there before", "c"),
        ("two.pt", "1 made, 0 there", "bc"),
    ):
        said = told(capfd, segmenter, "links", "--out", "out", code=1)
        failures = [line for line in said.splitlines() if line.startswith("skipping ")]
        assert [line.partition("; ")[0] for line in failures] == [
            f"skipping {name}: no picture at links/{name}.png" for name in away
        ]
        assert f"masks: {done}" in said
        assert masks()["b.png"] == made["b.png"]
        assert sorted(masks()) == ["a.png", "b.png"]


def test_a_link_to_itself_is_skipped(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told(capfd, "one.pt", "disk", "--out", "out")
    (disk / "a.png").unlink()
    (disk / "a.png").symlink_to("a.png")
    said = told(capfd, "two.pt", "disk", "--out", "out", code=1)
    assert said.count("skipping a: ") == 1
    assert "masks: 2 made, 0 there before, 1 failed" in said


def test_masks_of_another_segmenter_or_picture_are_made_again_and_told(
    disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "made again" not in told(capfd, "one.pt", "disk", "--out", "out")
    first = masks()
    said = told(capfd, "one.pt", "disk", "--out", "out")
    assert "made again" not in said
    assert "masks: 0 made, 3 there before, 0 failed" in said
    assert masks() == first

    shutil.copy(disk / "a.png", disk / "b.png")
    (Path("out") / "c.png").unlink()
    said = " ".join(told(capfd, "one.pt", "disk", "--out", "out").split())
    again = "made again: 1 masks, the first is b: its mask was made from another picture of that"
    assert again in said
    assert "masks: 2 made, 1 there before, 0 failed" in said

    (disk / "d.png").write_bytes((disk / "a.png").read_bytes())
    said = " ".join(told(capfd, "two.pt", "disk", "--out", "out").split())
    assert "made again: 3 masks, the first is a: its mask was made by another segmenter" in said
    assert "masks: 4 made, 0 there before, 0 failed" in said
    said = " ".join(told(capfd, "two.pt", "disk", "--out", "out", "--flip").split())
    assert "made again: 4 masks, the first is a: its mask was made by another segmenter, or" in said
    assert "masks: 0 made, 4 there" in told(capfd, "two.pt", "disk", "--out", "out", "--flip")


def test_what_a_mask_says_of_itself_is_read_once(
    disk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told(capfd, "one.pt", "disk", "--out", "out")
    seen, read = [], origin.read_origin

    def counted(path: Path) -> str:
        seen.append(path.name)
        return read(path)

    for module in (origin, predict):
        monkeypatch.setattr(module, "read_origin", counted)
    assert "masks: 0 made, 3 there before" in told(capfd, "one.pt", "disk", "--out", "out")
    assert seen == ["a.png", "b.png", "c.png"]


def test_masks_below_the_photos_are_none_of_them_by_any_name(
    disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("link").symlink_to(disk)
    for _ in range(2):
        told(capfd, "one.pt", "link", "--out", disk / "out")
        assert sorted(masks("disk/out")) == ["a.png", "b.png", "c.png"]


def test_two_predictions_do_not_mix_in_one_folder_but_parts_of_one_do(
    disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told(capfd, "one.pt", "disk", "--out", "whole")
    with claim(Path("out"), "clipes predict"):
        said = told(capfd, "two.pt", "disk", "--out", "out", code=1)
        assert "another 'clipes predict' is working in out; wait for it, or" in said
        assert "with --shard" in said
        assert not masks()
    with claim(Path("out"), "clipes predict", shared=True):  # another part is at work
        told(capfd, "one.pt", "disk", "--out", "out", "--shard", "0/2")
        assert sorted(masks()) == ["a.png", "c.png"]
        told(capfd, "one.pt", "disk", "--out", "out", "--shard", "1/2")
    assert masks() == masks("whole")
