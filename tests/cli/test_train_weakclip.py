"""train-seg --preset weakclip-*, relabel and predict as a user runs them, on small random CLIPs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clipes.config import SEGMENTER_PRESETS
from clipes.disk.images import read_mask
from clipes.errors import ArtifactError
from clipes.listener import Listener
from clipes.run.folder import Run
from clipes.run.reopen import reopen
from clipes.seg.checkpoint import load_checkpoint
from clipes.seg.weakclip import WeakClipSpec
from clipes.stages import teacher
from clipes.stages.token_source import TowerRequest
from clipes.towers.clip_text import ContextEncoder
from clipes.towers.load import load_text
from clipes.weights import read_state_dict
from clipes.words.features import load_text_features
from tests.cli.inline import ends
from tests.cli.small_data import CLASSES, cam, write_clip, write_photos
from tests.dino_support import write_dino

pytestmark = pytest.mark.usefixtures("one_thread")

CLIP = ["--weights", "clip.safetensors"]
FINAL = "run/checkpoints/final.pt"
SMALL = ["train-seg", "run", "--preset", "weakclip-small", *CLIP, "--no-cgl"]
SMALL += ["--iterations", "2", "--batch", "2"]


def facts(run: Run) -> dict[str, object]:
    found: dict[str, object] = json.loads(run.manifest_path.read_text())["stages"]["train-seg"]
    return found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run folder with masks, where the file of a CLIP without a text tower is."""
    monkeypatch.chdir(tmp_path)
    write_clip(Path("clip.safetensors"), Path("text.npz"), layers=12)
    write_photos(Path("photos"), 3)
    ends(0, *cam("run"), "--preset", "fast")
    ends(0, "refine", "run")
    return Run(tmp_path / "run")


def test_train_relabel_and_predict_without_a_text_tower(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    ends(0, *SMALL)
    told = " ".join(capfd.readouterr().err.split())
    assert "the run's vectors through a learnt map, for want of a text tower" in told
    assert "3 made, 0 there before, 0 failed" in told
    saved = load_checkpoint(Path(FINAL))
    assert isinstance(saved.spec, WeakClipSpec)
    assert (saved.spec.classes, saved.spec.contexts, saved.spec.side) == (CLASSES, 0, 0)
    vectors = saved.weights["words.vectors"]
    given = np.load("text.npz")["features"][:3]
    unit = 10 * given / np.linalg.norm(given, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[1:], unit, rtol=1e-4)  # rows are classes in mask order
    assert "for want of a text tower" in str(facts(run)["facts"])
    assert run.ids("tokens") == run.ids("pseudo")

    ends(0, "relabel", "run", "--from", FINAL, *CLIP)
    files = run.relabelled
    assert files.ids("pseudo") == files.ids("confidence") == run.ids("pseudo")
    for sample in reopen(run, None).samples:
        allowed = {0, *(label + 1 for label in sample.labels)}
        assert set(np.unique(files.load_pseudo(sample.id).mask).tolist()) <= allowed

    ends(0, "predict", FINAL, "photos/images", *CLIP, "--out", "out", "--scales", "1,1.5")
    assert read_mask(Path("out") / "p000.png").shape == (48, 64)
    capfd.readouterr()
    Path("clip.safetensors").rename("moved.safetensors")  # a finished training needs no tower
    ends(0, *SMALL)
    assert "0 made, 3 there before" in capfd.readouterr().err
    Path("moved.safetensors").rename("clip.safetensors")  # nor words, to predict again
    Path("text.npz").rename("moved.npz")
    (run.root / "predictions" / "p001.png").unlink()
    ends(0, *SMALL)
    assert "1 made, 2 there before" in capfd.readouterr().err
    assert "for want of a text tower" in str(facts(run)["facts"])


def test_a_second_tower_beside_clip(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    write_dino(Path("dino.safetensors"))
    plus = [one.replace("weakclip-small", "weakclip-plus") for one in SMALL]
    towers = [*CLIP, "--dino", "dino.safetensors"]
    capfd.readouterr()
    ends(0, *plus, "--dino", "dino.safetensors")
    told = " ".join(capfd.readouterr().err.split())
    assert "weights on CLIP's blocks 6, 8, 12 and dino.12; words: the run's vectors" in told
    saved = load_checkpoint(Path(FINAL))
    assert set(saved.spec.towers()) == {"clip", "dino"}
    assert isinstance(saved.spec, WeakClipSpec)
    assert [one.name for one in saved.spec.beside] == ["dino.12"]
    ends(0, "relabel", "run", "--from", FINAL, *towers)
    assert run.relabelled.ids("pseudo") == run.ids("pseudo")
    capfd.readouterr()
    write_dino(Path("other.safetensors"), seed=1)
    ends(1, "predict", FINAL, "photos/images", *CLIP, "--dino", "other.safetensors", "--out", "x")
    assert "trained on a tower dino of sha256" in " ".join(capfd.readouterr().err.split())
    ends(2, *plus, "--dino", "dino.safetensors", "--crop", 64, "--no-resume")
    told = " ".join(capfd.readouterr().err.split())
    assert "preset weakclip-plus learns from whole images: views are seen by CLIP alone" in told


def test_labels_that_changed_are_not_gone_on_with(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    ends(0, *SMALL, "--masks", "run/pseudo")
    labels = Path("photos/labels.csv")
    labels.write_text(labels.read_text().replace("p000.jpg,cat", "p000.jpg,sofa"))
    capfd.readouterr()
    ends(1, *SMALL, "--masks", "run/pseudo")
    told = " ".join(capfd.readouterr().err.split())
    assert "labels, masks, confidence maps or words that run/checkpoints learnt from" in told


def test_words_without_a_background_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # As of a run that an older clipes made: today's cam refuses such words.
    whole = load_text_features(Path("text.npz"))
    bare = replace(whole, background_words=(), background_vectors=whole.background_vectors[:0])
    monkeypatch.setattr(teacher, "_words", lambda *_: bare)
    preset, towers = SEGMENTER_PRESETS["weakclip-small"], TowerRequest("clip.safetensors")
    with pytest.raises(ArtifactError, match=r"the words of .*run have none for the background"):
        teacher.open_speaking(run, CLASSES, preset, towers, "cpu", Listener())


def test_train_on_views_with_a_text_tower(
    tiny_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(Path("photos"), 2)
    weights = ["--weights", str(tiny_weights)]
    data = ["--dataset", "folder", "--root", "photos", "--out", "run", "--preset", "fast"]
    ends(0, "cam", *data, *weights)
    ends(0, "refine", "run")
    capfd.readouterr()
    ends(
        0, "train-seg", "run", "--preset", "weakclip-voc", *weights, "--no-cgl", "--crop", 64,
        "--iterations", 2, "--batch", 2, "--no-flip", "--test-scales", "1",
    )  # fmt: skip
    assert "8 learnt vectors before each name" in " ".join(capfd.readouterr().err.split())
    saved = load_checkpoint(Path(FINAL))
    assert isinstance(saved.spec, WeakClipSpec)
    assert (saved.spec.contexts, saved.spec.side, len(saved.spec.blocks)) == (8, 64, 4)
    assert bool(torch.isfinite(saved.weights["words.features"]).all())
    assert bool(saved.weights["words.features"].any(1).all())
    encoder = ContextEncoder(load_text(read_state_dict(tiny_weights)), ("background", *CLASSES))
    with torch.no_grad():  # of the mean of the contexts, not the mean of what was said of them
        words = encoder(saved.weights["words.contexts"][0])
    torch.testing.assert_close(saved.weights["words.features"], words, atol=1e-4, rtol=1e-4)
    assert not Path("run/tokens").exists()
    assert "8 learnt vectors" in str(facts(Run(Path("run")))["facts"])

    made = {path.name: read_mask(path) for path in Path("run/predictions").iterdir()}
    ends(0, "predict", FINAL, "photos/images", *weights, "--out", "out")
    assert all((read_mask(Path("out") / name) == mask).all() for name, mask in made.items())
    ends(0, "relabel", "run", "--from", FINAL, *weights)
    assert Run(Path("run")).relabelled.ids("pseudo") == ["p000", "p001"]

    ends(2, "train-seg", "run", "--preset", "weakclip-voc", *weights, "--crop", 100, "--no-resume")
    assert "views of 100 pixels are not of whole patches" in " ".join(
        capfd.readouterr().err.split()
    )
