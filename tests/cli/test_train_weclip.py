"""train-seg --preset weclip-voc and predict as a user runs them, on a small random CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipes.disk.claim import claim
from clipes.disk.images import read_mask
from clipes.run.folder import Run
from clipes.seg.checkpoint import load_checkpoint
from clipes.seg.weclip import WeClipSpec
from clipes.seg.weclip_plus import WeClipPlusSpec
from tests.cli.conftest import Cli
from tests.cli.inline import ends
from tests.cli.small_data import CLASSES, cam, write_clip, write_photos
from tests.dino_support import write_dino

pytestmark = pytest.mark.usefixtures("one_thread")

CLIP = ["--weights", "clip.safetensors"]
WECLIP = ["train-seg", "run", "--preset", "weclip-voc", *CLIP, "--iterations", "2"]
WECLIP += ["--batch", "2", "--crop", "48", "--no-flip", "--test-scales", "0.25"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run folder with words but without masks, where CLIP's file is."""
    monkeypatch.chdir(tmp_path)
    write_clip(Path("clip.safetensors"), Path("text.npz"))
    write_photos(Path("photos"), 3)
    ends(0, *cam("run"), "--preset", "fast")
    return Run(tmp_path / "run")


def test_train_go_on_and_predict(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    ends(0, *WECLIP)
    told = capfd.readouterr().err
    assert "labels are made as it learns" in told
    assert "from update 15000 on: this training ends before" in " ".join(told.split())
    assert "3 made, 0 there before, 0 failed" in told
    saved = load_checkpoint(run.root / "checkpoints" / "final.pt")
    assert isinstance(saved.spec, WeClipSpec)
    assert (saved.spec.classes, saved.spec.layers, saved.spec.channels) == (CLASSES, 3, 64)
    settings = json.loads(run.manifest_path.read_text())["stages"]["train-seg"]["settings"]
    assert settings["preset"]["normalise"] == "imagenet"

    ends(0, *WECLIP, "--threshold", 0.5)  # confidence is of masks, which are not read
    assert "0 made, 3 there before" in capfd.readouterr().err
    ends(0, "predict", "run/checkpoints/final.pt", "photos/images", *CLIP, "--out", "out")
    assert read_mask(Path("out") / "p000.png").shape == (48, 64)
    Path("text.npz").rename("moved.npz")  # a finished training needs no words
    (run.root / "predictions" / "p001.png").unlink()
    capfd.readouterr()
    ends(0, *WECLIP)
    assert "1 made, 2 there before" in capfd.readouterr().err


def test_words_that_changed_are_not_gone_on_with(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    ends(0, *WECLIP)
    text = run.cam_record().settings.text
    assert text is not None
    assert run.train_record().facts.words == text.sha256
    run.note_fact("train-seg", "words", "0" * 64)
    capfd.readouterr()
    ends(1, *WECLIP)
    assert "confidence maps or words that run/checkpoints learnt from have changed" in " ".join(
        capfd.readouterr().err.split()
    )


def test_two_towers(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    dino = write_dino(Path("dino.safetensors"))
    plus = ["weclip-plus-voc" if one == "weclip-voc" else one for one in WECLIP]
    ends(0, *plus, "--dino", dino)
    saved = load_checkpoint(run.root / "checkpoints" / "final.pt")
    assert isinstance(saved.spec, WeClipPlusSpec)
    assert saved.spec.inputs == ("clip.3", "dino.2")
    assert set(saved.spec.digests) == {"clip", "dino"}
    ends(0, *predict(dino))
    assert read_mask(Path("out") / "p000.png").shape == (48, 64)
    capfd.readouterr()
    other = write_dino(Path("other.safetensors"), seed=1)
    ends(1, *predict(other))
    assert "the segmenter was trained on a tower dino of sha256" in capfd.readouterr().err


@pytest.mark.parametrize("preset", ["weclip-voc", "weclip-plus-voc"])
def test_two_processes_train_together(run: Run, preset: str, two_ranks: Cli) -> None:
    command = [preset if one == "weclip-voc" else one for one in WECLIP]
    if preset == "weclip-plus-voc":
        command += ["--dino", str(write_dino(Path("dino.safetensors")))]
    done = two_ranks(*command, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("labels are made as it learns") == 1
    assert "3 made, 0 there before, 0 failed" in done.stderr
    record = json.loads(run.manifest_path.read_text())["stages"]["train-seg"]
    assert record["facts"]["processes"] == 2


def predict(dino: Path) -> list[object]:
    checkpoint = "run/checkpoints/final.pt"
    return ["predict", checkpoint, "photos/images", *CLIP, "--dino", dino, "--out", "out"]


def test_labels_that_changed_are_not_gone_on_with(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    ends(0, *WECLIP)
    labels = Path("photos/labels.csv")
    labels.write_text(labels.read_text().replace("p000.jpg,cat", "p000.jpg,sofa"))
    capfd.readouterr()
    ends(1, *WECLIP)
    told = " ".join(capfd.readouterr().err.split())
    changed = "pictures, labels, masks, confidence maps or words that run/checkpoints learnt from"
    assert changed in told


def test_two_trainings_of_two_processes_are_refused(run: Run, two_ranks: Cli) -> None:
    with claim(run.root / "checkpoints", "clipes train-seg", shared=True):  # as a rank of another
        done = two_ranks(*WECLIP, "--device", "cpu")
    assert done.returncode != 0
    assert done.stderr.count("another 'clipes train-seg' is working in") == 2, "in both"
    assert "RuntimeError" not in done.stderr
    assert not list((run.root / "checkpoints").iterdir())


def test_words_that_changed_are_refused(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    arrays = dict(np.load("text.npz"))
    np.savez("text.npz", **{**arrays, "features": arrays["features"][::-1]})
    capfd.readouterr()
    ends(1, *WECLIP)
    told = capfd.readouterr().err
    assert f"the words that {run.root.name} was made with are not to be had again" in told
    assert not (run.root / "checkpoints").exists()


def test_pictures_that_cannot_be_read_are_left_out_before_it_begins(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    photo = Path("photos/images/p001.jpg")
    photo.write_bytes(photo.read_bytes()[:200])
    capfd.readouterr()
    Path("two.txt").write_text("p000\np002\n")
    ends(0, *WECLIP, "--val", "two.txt")
    told = " ".join(capfd.readouterr().err.split())
    assert "left out: 1 images that cannot be read, the first: " in told
    assert "p001.jpg" in told
    assert run.train_record().settings.examples == 2
    for name in ("p000.jpg", "p002.jpg"):
        Path("photos/images", name).write_bytes(b"")
    ends(1, *WECLIP, "--no-resume")
    assert "no image of run that can be read shows a class" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--crop", 50), "views of 50 pixels are not of whole patches"),
        (("--test-scales", "1,3"), "WeCLIP is not asked at a scale of 3; choose scales up to 2"),
    ],
    ids=["crop", "scale"],
)
def test_what_it_cannot_do_is_refused_before_anything_is_removed(
    run: Run, capfd: pytest.CaptureFixture[str], wrong: tuple[object, ...], said: str
) -> None:
    kept = run.root / "checkpoints" / "final.pt"
    kept.parent.mkdir()
    kept.touch()
    capfd.readouterr()
    ends(2, *WECLIP, *wrong, "--no-resume")
    assert said in " ".join(capfd.readouterr().err.split())
    assert kept.exists()


def test_words_of_coco_are_found_again_wherever_the_images_lie(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(Path("photos"), 2)
    weights = ["--weights", str(tiny_weights)]
    data = ["--dataset", "folder", "--root", "photos", "--out", "run", "--preset", "fast"]
    ends(0, "cam", *data, *weights, "--prompts", "coco")
    asked = [weights[1] if one == "clip.safetensors" else one for one in WECLIP]
    ends(0, *asked, "--crop", 32, "--iterations", 1)
    assert (tmp_path / "run" / "checkpoints" / "final.pt").exists()


def test_masks_mean_nothing(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    ends(2, *WECLIP, "--masks", "photos/masks")
    assert "--masks, --confidence and --relabelled mean nothing" in capfd.readouterr().err
