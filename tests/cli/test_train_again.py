"""train-seg in a folder that was trained in before: what goes, what stays, what is compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from clipes.disk.images import read_origin, write_confidence
from clipes.run.folder import Run
from tests.cli.inline import ends
from tests.cli.small_data import write_refined

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 4
TRAIN = ["train-seg", "run", "--no-cgl", "--backbone", "mobilenet_v3_large"]
TRAIN += ["--backbone-weights", "none", "--crop", "32", "--batch", "2", "--iterations", "1"]
TRAIN += ["--no-multi-scale", "--no-flip", "--test-scales", "1"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    made = write_refined(Path("run"), Path("photos"), COUNT)
    for id_ in made.ids("pseudo"):
        write_confidence(made.confidence_path(id_), np.ones((48, 64), np.float32))
    made.note_fact("cam", "root", str(Path("photos").absolute()))
    return made


def told(capfd: pytest.CaptureFixture[str]) -> str:
    return " ".join(capfd.readouterr().err.split())


def test_what_no_training_wrote_stays(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    ends(0, *TRAIN)
    checkpoints, predictions = run.root / "checkpoints", run.root / "predictions"
    mine = checkpoints / "round1.pt"
    (checkpoints / "final.pt").rename(mine)
    shutil.copy("photos/masks/p000.png", predictions / "of another program.png")
    shutil.copy("photos/masks/p000.png", predictions / "p000.png")  # lies where a prediction goes
    old = predictions / "left over.png"  # of an image that is in no list any more
    shutil.copy(predictions / "p001.png", old)
    assert read_origin(old)
    kept = mine.read_bytes()
    capfd.readouterr()
    ends(0, *TRAIN, "--seed", 1)
    assert f"{COUNT} made" in told(capfd)
    assert mine.read_bytes() == kept
    assert (predictions / "of another program.png").exists()
    assert not old.exists()
    ends(0, *TRAIN, "--seed", 2, "--no-resume")
    assert mine.read_bytes() == kept
    assert run.stage("train-seg")["settings"]["seed"] == 2


def test_what_cannot_be_removed_leaves_the_training_as_it_was(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends(0, *TRAIN)
    before = run.manifest_path.read_bytes()
    unlink = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.name == "p001.png":
            raise PermissionError(13, "Permission denied", str(self))
        unlink(self, missing_ok=missing_ok)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        ends(1, *TRAIN, "--no-resume", "--seed", 1)
    assert "cannot remove run/predictions/p001.png: Permission denied; check the" in told(capfd)
    assert (run.root / "checkpoints" / "final.pt").exists()
    assert run.manifest_path.read_bytes() == before
    ends(1, *TRAIN, "--seed", 1)  # so it is not taken for a training of this seed
    assert "with seed = 0, not 1" in told(capfd)


def test_images_to_predict_need_no_labels(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    rows = Path("photos/labels.csv").read_text().splitlines()
    Path("photos/labels.csv").write_text("\n".join(rows[:3]) + "\n")
    Path("photos/train.txt").write_text("p000\np001\n")
    Path("photos/val.txt").write_text("p002\np003\ngone\n")
    ends(0, *TRAIN, "--split", "train")
    said = told(capfd)
    assert "2 made, 0 there before, 0 failed" in said
    assert "to predict, left out: 1 of the data set's images cannot be used, the first is" in said
    assert run.ids("predictions") == ["p002", "p003"]


def test_labels_tell_which_picture_is_to_be_predicted(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy("photos/images/p001.jpg", "photos/images/p002.png")  # another of that name
    Path("photos/train.txt").write_text("p000\np001\n")
    Path("photos/val.txt").write_text("p002\np003\n")
    ends(0, *TRAIN, "--split", "train")
    assert "2 made, 0 there before, 0 failed" in told(capfd)
    assert run.ids("predictions") == ["p002", "p003"]


def test_a_list_of_the_data_set_comes_before_a_file_of_that_name(run: Run) -> None:
    Path("photos/val.txt").write_text("p002\np003\n")
    Path("val").write_text("p000\n")
    ends(0, *TRAIN)
    assert run.ids("predictions") == ["p002", "p003"]
    assert run.stage("train-seg")["settings"]["val"] == "val"


def test_a_list_that_is_damaged_is_not_taken_for_none(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("photos/val.txt").write_text("")
    ends(1, *TRAIN)
    said = told(capfd)
    assert "predicting those learnt from" not in said
    assert "val.txt" in said
    Path("photos/val.txt").unlink()
    ends(0, *TRAIN)
    assert "no list of validation images 'val'" in told(capfd)


def test_lists_are_the_same_by_whatever_path(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("lists").mkdir()
    Path("lists/other.txt").write_text("p001\np002\n")
    ends(0, *TRAIN, "--val", "lists/other.txt")
    here = Path.cwd()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    ends(0, "eval", here / "run", "--json", "scores.json")
    stages = json.loads(Path("scores.json").read_text())["stages"]
    assert any(name.startswith("segmenter") for name in stages)
    capfd.readouterr()
    again = [str(here / one) if one == "run" else one for one in TRAIN]
    ends(0, *again, "--val", "../lists/other.txt")
    assert "0 made, 2 there before" in told(capfd)


def test_a_training_that_goes_on_compares_confidence(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    guided = ["--cgl" if one == "--no-cgl" else one for one in TRAIN]
    ends(0, *guided)
    write_confidence(run.confidence_path("p001"), np.full((48, 64), 0.99, np.float32))
    capfd.readouterr()
    ends(1, *guided)
    said = told(capfd)
    assert "masks, confidence maps or words that run/checkpoints learnt from" in said
