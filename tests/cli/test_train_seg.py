"""train-seg, predict and the baseline of eval as a user runs them, killed and on two processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import typer
from PIL import Image
from torch.distributed.run import get_args_parser

from clipes.cli import app
from clipes.disk.images import read_mask, write_confidence, write_mask
from clipes.run.folder import Run
from clipes.seg.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from clipes.seg.deeplab import DeepLab, DeepLabSpec
from clipes.seg.recipes import Batch, TestSettings
from clipes.seg.train import Step, Trainer, TrainingError
from clipes.types import PseudoLabel
from tests.cli.conftest import Cli
from tests.cli.inline import ends, one_line

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--backbone", "mobilenet_v3_large", "--backbone-weights", "none", "--crop", "64"]
SMALL += ["--batch", "2", "--no-multi-scale"]
CLASSES = ["cat", "cow", "dog", "person", "sofa"]


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> Run:
    """A run folder as cam and refine leave it."""
    folder = Run(tmp_path / "runs" / "folder")
    settings = {"dataset": "folder", "split": None, "labels": None, "classes": CLASSES}
    folder.begin("cam", settings, "clipes cam", {"root": str(photos)})
    rng = np.random.default_rng(0)
    for path in sorted((photos / "masks").iterdir()):
        mask = read_mask(path)
        sure = rng.uniform(0.9, 1.0, mask.shape).astype(np.float32)
        folder.save_pseudo(path.stem, PseudoLabel(mask, sure))
    return folder


def fails(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 1) -> str:
    """Run a command in this process; return its one line of error."""
    capfd.readouterr()
    ends(code, *arguments)
    return one_line(capfd.readouterr().err)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(run.root / "checkpoints" / "final.pt").weights)


def test_train_predict_and_score(
    cli: Cli,
    run: Run,
    photos: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = ["train-seg", "--cgl", *SMALL, "--iterations", "3", "--save-every", "1"]
    first = cli(*train)
    assert first.returncode == 0, first.stderr
    assert first.stdout == "runs/folder\n"
    assert "random weights" in first.stderr
    assert re.search(r"train: 3/3, loss \d+\.\d+, lr \S+, \d\d % of pixels", first.stderr)
    assert "6 made, 0 there before, 0 failed" in first.stderr
    for path in (photos / "masks").iterdir():
        predicted = read_mask(run.root / "predictions" / path.name)
        assert predicted.shape == read_mask(path).shape
        assert predicted.max() <= len(CLASSES)
    assert [p.name for p in (run.root / "checkpoints").iterdir()] == ["final.pt"]
    section = json.loads((run.root / "run.json").read_text())["stages"]["train-seg"]
    assert section["settings"]["threshold"] == 0.95
    assert section["settings"]["preset"]["backbone"] == "mobilenet_v3_large"

    monkeypatch.chdir(tmp_path)
    before = weights(run)
    ends(0, *train)
    told = capfd.readouterr().err
    assert "trained before" in told
    assert "0 made, 6 there before" in told
    assert "threshold = 0.95, not null" in fails(capfd, *train, "--no-cgl")
    ends(0, *train, "--no-resume", "--iterations", "1", "--no-cgl")
    assert "6 made" in capfd.readouterr().err
    after = weights(run)
    assert any(not torch.equal(value, after[key]) for key, value in before.items())

    ends(0, "eval", "--json", "base.json")
    assert set(json.loads((tmp_path / "base.json").read_text())["stages"]) == {
        "CRF",
        "CRF >= 0.95",
        "segmenter, train",
    }


def test_half_of_the_images_teach_and_the_others_are_asked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("half.txt").write_text("p0\np1\np2\n")
    Path("other.txt").write_text("p3\np4\n")
    train = ["train-seg", *SMALL, "--iterations", "1", "--split", "half.txt"]
    ends(0, *train, "--val", "other.txt", "--test-scales", "1", "--out", "elsewhere")
    out = Run(tmp_path / "elsewhere")
    assert out.ids("predictions") == ["p3", "p4"]
    assert out.stage("train-seg")["settings"]["examples"] == 3
    assert "train-seg" not in run.manifest()["stages"]
    ends(0, "eval", "elsewhere", "--json", "scores.json")
    stages = json.loads(Path("scores.json").read_text())["stages"]
    assert {name: scores["images"] for name, scores in stages.items()} == {"segmenter, other": 2}


def test_predict_takes_files_and_folders_and_goes_on_after_a_bad_one(
    run: Run,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ends(0, "train-seg", *SMALL, "--iterations", "1")
    final = run.root / "checkpoints" / "final.pt"
    Path("more").mkdir()
    picture = (photos / "images" / "p0.jpg").read_bytes()
    (Path("more") / "good.jpg").write_bytes(picture)
    ends(0, "predict", final, "more", photos / "images" / "p1.jpg", "--out", "out", "--crf")
    assert sorted(p.name for p in Path("out").iterdir()) == ["good.png", "p1.png"]
    assert read_mask(Path("out") / "good.png").shape == (80, 120)
    small = ["--window", "64", "--scales", "1,1.5", "--no-flip", "--no-crf"]
    ends(0, "predict", final, "more", "--out", "windows", *small)
    assert read_mask(Path("windows") / "good.png").shape == (80, 120)

    for name in ("deep/images/1.jpg", "deep/images/a/1.jpg", "deep/images/b.heic", "deep/2.jpg"):
        (Path(name)).parent.mkdir(parents=True, exist_ok=True)
        (Path(name)).write_bytes(picture)
    capfd.readouterr()
    for _ in range(2):  # what the first run wrote is no photo to the second
        ends(0, "predict", final, "deep", "--out", "deep/images/out", *small)
        assert sorted(p.name for p in Path("deep/images/out").iterdir()) == ["1.png", "a_1.png"]
    told = capfd.readouterr().err
    assert "(.heic): convert to JPEG, the first is deep/images/b.heic" in told
    assert "1 picture is beside deep/images and not used" in told

    before = Path("windows/good.png").read_bytes()
    ends(0, "predict", final, "more", "--out", "windows", *small)
    assert "masks: 0 made, 1 there before" in capfd.readouterr().err
    ends(0, "predict", final, "more", "--out", "windows", *small[:-1], "--crf")
    assert "masks: 1 made, 0 there before" in capfd.readouterr().err
    assert Path("windows/good.png").read_bytes() != before

    (Path("more") / "bad.jpg").write_bytes(picture[:200])
    ends(1, "predict", final, "more", "--out", "other")
    told = capfd.readouterr().err
    assert "skipping bad: " in told
    assert "Traceback" not in told
    assert [p.name for p in Path("other").iterdir()] == ["good.png"]

    (Path("more") / "good.png").write_bytes(picture)
    assert "would both become good.png" in fails(capfd, "predict", final, "more", "--out", "x")
    assert "no file or folder gone" in fails(capfd, "predict", final, "gone", "--out", "x")
    Path("empty").mkdir()
    assert "no image in empty" in fails(capfd, "predict", final, "empty", "--out", "x")


def test_predict_writes_over_nothing_but_its_own_masks(
    run: Run,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ends(0, "train-seg", *SMALL, "--iterations", "1")
    final = run.root / "checkpoints" / "final.pt"
    Path("mine").mkdir()
    Image.open(photos / "images" / "p0.jpg").save("mine/cat.png")
    photo = Path("mine/cat.png").read_bytes()
    said = fails(capfd, "predict", final, "mine", "--out", "mine", code=2)
    assert "the mask of mine/cat.png would take its place; choose another --out" in said
    Path("masks").mkdir()
    write_mask(Path("masks/cat.png"), np.zeros((4, 4), np.uint8))  # by hand, or another program's
    said = fails(capfd, "predict", final, "mine", "--out", "masks", code=2)
    assert "masks/cat.png is there and does not say that a segmenter made it" in said
    assert Path("mine/cat.png").read_bytes() == photo
    assert read_mask(Path("masks/cat.png")).shape == (4, 4)
    said = fails(capfd, "predict", "mine/cat.png", final, "--out", "x", code=2)
    assert "mine/cat.png is a picture, not a checkpoint; the checkpoint comes first" in said


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_training_ends_with_the_same_bits(
    cli: Cli, run: Run, tmp_path: Path, environment: dict[str, str]
) -> None:
    train = ["train-seg", *SMALL, "--iterations", "8", "--save-every", "1"]
    whole = cli(*train, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "clipes", *train, "--out", "broken"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoints = tmp_path / "broken" / "checkpoints"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(checkpoints.glob("iteration-*[2-9].pt")):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not (checkpoints / "final.pt").exists()

    resumed = cli(*train, "--out", "broken", "--resume", "--workers", 1)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after iteration" in resumed.stderr
    expected, found = weights(Run(tmp_path / "whole")), weights(Run(tmp_path / "broken"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_do_what_one_does(cli: Cli, two_ranks: Cli, run: Run, tmp_path: Path) -> None:
    # Weights from a file, because only pre-trained normalisation is frozen; the other kind sees
    # each process' images by themselves.
    torch.manual_seed(0)
    torch.save(torchvision.models.mobilenet_v3_large().state_dict(), tmp_path / "w.pth")
    train = ["train-seg", *SMALL, "--iterations", "2", "--device", "cpu"]
    train += ["--backbone-weights", "w.pth"]
    alone = cli(*train, "--out", "alone")
    assert alone.returncode == 0, alone.stderr
    pair = two_ranks(*train, "--out", "pair")
    assert pair.returncode == 0, pair.stderr
    losses = [re.findall(r"train: 2/2, loss (\d+\.\d+)", done.stderr) for done in (alone, pair)]
    assert len(losses[0]) == len(losses[1]) == 1
    assert float(losses[0][0]) == pytest.approx(float(losses[1][0]), abs=0.0011)
    expected, found = weights(Run(tmp_path / "alone")), weights(Run(tmp_path / "pair"))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "pair" / "predictions").iterdir())) == 6
    assert pair.stdout == "pair\n"
    assert pair.stderr.count("predictions: 6 made, 0 there before, 0 failed") == 1


def test_bad_masks_are_one_line(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ["train-seg", *SMALL, "--iterations", 1]
    mask = read_mask(run.pseudo_path("p2"))
    sure = run.confidence_path("p2").read_bytes()

    write_mask(run.pseudo_path("p2"), mask[:, :-1].copy())
    assert "p2: the image is 112 x 120, its mask 112 x 119" in fails(capfd, *train)
    write_mask(run.pseudo_path("p2"), np.full_like(mask, 6))
    assert "label 6, but there are 5 classes" in fails(capfd, *train)
    write_mask(run.pseudo_path("p2"), mask)
    write_confidence(run.confidence_path("p2"), np.ones((4, 4), np.float32))
    assert "p2: the confidence map is 4 x 4" in fails(capfd, *train)
    run.confidence_path("p2").unlink()
    assert "p2 has a mask but no confidence map" in fails(capfd, *train)
    run.confidence_path("p2").write_bytes(sure)
    other = fails(capfd, *train, "--masks", run.root / "pseudo")
    assert "come without confidence; give --confidence DIR, or train with --no-cgl" in other
    assert "it holds no file" in fails(capfd, *train, "--masks", tmp_path, "--no-cgl")
    assert "clipes cam" in fails(capfd, *train, "--run", "nowhere")
    Run(tmp_path / "other").begin("cam", {"dataset": "voc"}, "clipes cam")
    assert "other is a run of its own" in fails(capfd, *train, "--out", "other")
    absent = fails(capfd, *train, "--backbone-weights", "absent.pth")
    assert "there is no file absent.pth" in absent
    assert not (run.root / "checkpoints").exists()


def test_next_to_nothing_to_learn_from_is_one_line(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ["train-seg", *SMALL, "--iterations", 2, "--save-every", 1, "--test-scales", 1]
    few = fails(capfd, *train, "--threshold", 1)
    assert re.search(r"next to nothing to learn from: 0(\.\d+)? % of the labelled pixels", few)
    assert "with a confidence of 1 or more; lower --threshold" in few
    for id_ in run.ids("pseudo"):
        write_mask(run.pseudo_path(id_), np.full_like(read_mask(run.pseudo_path(id_)), 255))
    none = "nothing to learn from: 0 % of 86400 pixels have a label, all masks are 255; masks hold"
    assert none in fails(capfd, *train)
    assert none in fails(capfd, *train, "--no-cgl")
    assert not (run.root / "checkpoints").exists()


def test_a_training_does_not_go_on_with_nothing_to_learn_from(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ["train-seg", *SMALL, "--iterations", 2, "--save-every", 1, "--test-scales", 1]
    step = Trainer.step

    def once(self: Trainer, parts: Sequence[Batch]) -> Step:
        if self.iteration:
            raise TrainingError("stopped")
        return step(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", once)
        assert "stopped" in fails(capfd, *train)
    assert len(list((run.root / "checkpoints").iterdir())) == 1
    for id_ in run.ids("pseudo"):
        write_mask(run.pseudo_path(id_), np.full_like(read_mask(run.pseudo_path(id_)), 255))
    assert "learnt from have changed since; train anew with --no-resume" in fails(capfd, *train)
    assert "nothing to learn from: 0 %" in fails(capfd, *train, "--no-resume")
    assert not (run.root / "checkpoints" / "final.pt").exists()


def test_what_cannot_be_learnt_is_said(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ["train-seg", *SMALL, "--iterations", 1, "--test-scales", 1, "--no-resume", "--no-cgl"]
    ends(0, *train)
    said = "no pixel to learn 3 of 5 classes from: dog, person, sofa\n"
    assert said in capfd.readouterr().err
    for id_ in run.ids("pseudo"):
        write_mask(run.pseudo_path(id_), np.zeros_like(read_mask(run.pseudo_path(id_))))
    ends(0, *train)
    assert "only background is left to learn from" in capfd.readouterr().err


def test_the_run_can_be_given_in_several_ways(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # Each way is known by the error about a folder that is no run.
    for way in (["gone"], ["--run", "gone"], ["--run-folder", "gone"], ["gone", "--run", "gone"]):
        assert "gone is not a run folder" in fails(capfd, "train-seg", *way)
    ends(2, "train-seg", "gone", "--run", "other")
    assert "two run folders, gone and --run other; give one" in capfd.readouterr().err


def test_torchrun_leaves_our_options_alone() -> None:
    launcher = get_args_parser()
    launched = ("cam", "refine", "train-seg", "predict")
    for name, command in typer.main.get_command(app).commands.items():
        if name not in launched:
            continue
        options = [o for parameter in command.params for o in parameter.opts if o[:1] == "-"]
        assert len(options) > 5
        # The other spelling of this one is for torchrun.
        for option in set(options) - {"--run"}:
            given = launcher.parse_args(["-m", "clipes", name, option, "value"])
            assert given.training_script_args == [name, option, "value"]


def test_ranks_of_torchrun_share_what_is_predicted(
    two_ranks: Cli, run: Run, photos: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "random.pt"
    model = DeepLab(DeepLabSpec("deeplabv2", "mobilenet_v3_large", 16, tuple(CLASSES)))
    save_checkpoint(checkpoint, model, TrainingState(), TestSettings())
    pictures = photos / "images"
    done = two_ranks("predict", checkpoint, pictures, "--out", "masks", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("masks: 3 made, 0 there before, 0 failed") == 2
    assert len(list((tmp_path / "masks").iterdir())) == 6


def test_bad_checkpoints_are_one_line(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    photo = tmp_path / "photos" / "images" / "p0.jpg"
    (tmp_path / "junk.pt").write_bytes(b"junk")
    assert "junk.pt" in fails(capfd, "predict", "junk.pt", photo, "--out", "out")
    torch.save({"fc.weight": torch.zeros(2)}, "foreign.pt")
    foreign = fails(capfd, "predict", "foreign.pt", photo, "--out", "out")
    assert "foreign.pt is no checkpoint of clipes" in foreign
    assert "no checkpoint absent.pt" in fails(capfd, "predict", "absent.pt", photo, "--out", "out")
    assert not (tmp_path / "out").exists()

    train = ["train-seg", *SMALL, "--iterations", "1", "--test-scales", "1"]
    ends(0, *train)
    final = run.root / "checkpoints" / "final.pt"
    own = load_checkpoint(final)
    other = DeepLab(DeepLabSpec("deeplabv3", "mobilenet_v3_large", 16, tuple(CLASSES)))
    save_checkpoint(final, other, TrainingState(), own.test)
    assert "final.pt is not the file that this training wrote; put that" in fails(capfd, *train)
    run.note_fact("train-seg", "final", "")  # as an older clipes left it
    other = DeepLab(DeepLabSpec("deeplabv2", "mobilenet_v3_large", 16, ("cat", "dog")))
    save_checkpoint(final, other, TrainingState(), own.test)
    another = fails(capfd, *train)
    assert "final.pt is of another training: " in another
    assert " with 2 classes; put back that of this one" in another


@pytest.mark.parametrize(
    "arguments",
    [
        ("--output-stride", "7"),
        ("--batch", "3", "--accumulate", "2"),
        ("--arch", "unet"),
        ("--amp", "fp16", "--device", "cpu"),
        ("--device", "nonsense"),
        ("--arch", "deeplabv3", "--batch", "1"),
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(
    run: Run,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    ends(2, "train-seg", *SMALL, "--iterations", "1", *arguments)
    told = capfd.readouterr().err
    assert told.strip()
    assert "Traceback" not in told


def test_a_drop_below_the_baseline_fails(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    ends(0, "eval", "--json", "now.json")
    scores = json.loads(Path("now.json").read_text())
    Path("baselines").mkdir()
    baseline = Path("baselines") / "folder.json"
    ends(0, "eval", "--baseline", "baselines")
    assert "no baseline folder.json in baselines" in capfd.readouterr().err

    baseline.write_text(json.dumps(scores))
    ends(0, "eval", "--baseline", "baselines")
    assert "+0.00" in capfd.readouterr().out
    scores["stages"]["CRF"]["miou"] += 0.01
    baseline.write_text(json.dumps(scores))
    fell = fails(capfd, "eval", "--baseline", baseline)
    assert "by more than 0.5 points: CRF fell from 101.00 to 100.00" in fell
    ends(0, "eval", "--baseline", baseline, "--tolerance", "1.5")

    scores["stages"]["segmenter, val"] = {"miou": 0.5, "images": 6}
    baseline.write_text(json.dumps(scores))
    missing = fails(capfd, "eval", "--baseline", baseline, "--tolerance", "1.5")
    assert "segmenter, val is missing" in missing
    scores["stages"] = {"CRF": {"miou": 0.5, "images": 5}}
    baseline.write_text(json.dumps(scores))
    assert "scored on 5 images, now on 6" in fails(capfd, "eval", "--baseline", baseline)
    baseline.write_text("{}")
    assert "cannot read the baseline" in fails(capfd, "eval", "--baseline", baseline)
    assert "there is no baseline absent" in fails(capfd, "eval", "--baseline", "absent")
