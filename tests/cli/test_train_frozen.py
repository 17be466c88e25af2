"""train-seg --preset frozen and predict as a user runs them, on small random towers."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

from clipes.config import DECODER_CRF, CrfParams
from clipes.disk.files import atomic_write
from clipes.disk.images import read_mask
from clipes.errors import WriteError
from clipes.masks.crf import dense_crf
from clipes.run import tokens
from clipes.run.folder import Run
from clipes.seg import label
from clipes.seg.checkpoint import load_checkpoint
from clipes.seg.frozen import FrozenSpec
from clipes.stages.predict import changed_crf
from tests.cli.conftest import Cli
from tests.cli.inline import ends
from tests.cli.small_data import CLASSES, write_clip, write_refined
from tests.dino_support import write_dino

pytestmark = pytest.mark.usefixtures("one_thread")

FROZEN = ["train-seg", "run", "--preset", "frozen", "--no-cgl", "--batch", "3"]
FROZEN += ["--weights", "clip.safetensors", "--dino", "dino.safetensors"]
ASK = ["predict", "run/checkpoints/final.pt", "photos/images", "--weights", "clip.safetensors"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run folder with masks, where the towers' files are."""
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.safetensors", tmp_path / "text.npz", layers=12)
    write_dino(tmp_path / "dino.safetensors")
    return write_refined(tmp_path / "run", tmp_path / "photos", 5)


def test_train_keep_tokens_and_predict(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    ends(0, *FROZEN, "--iterations", 2)
    told = capfd.readouterr().err
    assert "decoder: " in told
    assert "5 made, 0 there before, 0 failed" in told
    assert run.ids("tokens") == run.ids("pseudo") == run.ids("predictions")
    saved = load_checkpoint(run.root / "checkpoints" / "final.pt")
    assert saved.spec.kind == "frozen"
    assert saved.spec.classes == CLASSES
    assert set(saved.spec.towers()) == {"clip", "dino"}
    settings = json.loads(run.manifest_path.read_text())["stages"]["train-seg"]["settings"]
    assert settings["preset"]["tokens"][-1] == "dino.12"

    # A finished training needs no towers.
    Path("clip.safetensors").rename("moved.safetensors")
    ends(0, *FROZEN, "--iterations", 2)
    assert "0 made, 5 there before" in capfd.readouterr().err
    Path("moved.safetensors").rename("clip.safetensors")

    ends(0, *ASK, "--dino", "dino.safetensors", "--out", "out", "--flip", "--scales", "1,1.5")
    assert len(list(Path("out").iterdir())) == 5
    assert read_mask(Path("out") / "p000.png").shape == (48, 64)

    write_dino(Path("other.safetensors"), seed=1)
    capfd.readouterr()
    ends(1, *ASK, "--dino", "other.safetensors", "--out", "x")
    told = capfd.readouterr().err
    assert "the segmenter was trained on a tower dino of sha256" in told
    assert "give the weights that it was trained on" in told


def test_labels_that_changed_are_not_gone_on_with(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    train = [*FROZEN, "--iterations", 1, "--masks", "run/pseudo", "--even-classes"]
    ends(0, *train)
    labels = Path("photos/labels.csv")
    labels.write_text(labels.read_text().replace("p000.jpg,cat", "p000.jpg,sofa"))
    capfd.readouterr()
    ends(1, *train)
    assert "labels, masks, confidence maps or words that run/checkpoints" in capfd.readouterr().err


def test_clip_alone_needs_no_second_tower(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    Path("dino.safetensors").unlink()
    ends(1, *FROZEN)
    told = " ".join(capfd.readouterr().err.split())
    assert "there is no file dino.safetensors" in told
    assert "or take --preset frozen-clip, which does with CLIP alone" in told
    ends(0, *FROZEN[:3], "frozen-clip", *FROZEN[4:], "--iterations", 2)
    saved = load_checkpoint(run.root / "checkpoints" / "final.pt")
    assert set(saved.spec.towers()) == {"clip"}
    assert not saved.spec.adapts  # measured: it loses 5 to 10 points of CLIP alone
    assert saved.spec.attention_power > 1
    assert "clip.joint" in saved.spec.linear
    assert "dino" not in capfd.readouterr().err
    ends(0, *ASK, "--out", "out")
    assert read_mask(Path("out") / "p000.png").shape == (48, 64)


def test_kept_tokens_may_be_removed_and_change_nothing(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    train = [*FROZEN, "--iterations", 2, "--save-every", 1]
    ends(0, *train)
    kept = load_checkpoint(run.root / "checkpoints" / "final.pt").weights
    for path in (run.root / "tokens").iterdir():
        path.unlink()
    capfd.readouterr()
    ends(0, *train, "--no-resume", "--token-space", 0)
    told = " ".join(capfd.readouterr().err.split())
    assert "no room to keep the tokens of 5 of 5 images (--token-space 0 GB" in told
    assert not run.ids("tokens")
    again = load_checkpoint(run.root / "checkpoints" / "final.pt").weights
    assert all(torch.equal(value, again[key]) for key, value in kept.items())


def test_the_crf_that_comes_last_is_the_decoders_own(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends(0, *FROZEN, "--iterations", 1)
    asked: list[CrfParams] = []

    def crf(probs: np.ndarray, image: np.ndarray, params: CrfParams) -> np.ndarray:
        asked.append(params)
        return dense_crf(probs, image, params)

    monkeypatch.setattr(label, "dense_crf", crf)
    ends(0, *ASK, "--dino", "dino.safetensors", "--out", "out")
    assert asked == 5 * [DECODER_CRF]
    ends(0, *ASK, "--dino", "dino.safetensors", "--out", "out", "--no-crf")
    assert len(asked) == 5
    # Predictions of a training that were made with another are made again.
    monkeypatch.setattr(FrozenSpec, "crf", CrfParams())
    ends(0, *FROZEN, "--iterations", 1)
    assert asked[5:] == 5 * [CrfParams()]
    assert changed_crf(CrfParams()) == changed_crf(None) == []  # masks of older clipes stay


def test_a_disk_that_fills_up_while_tokens_are_kept_changes_nothing(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = [*FROZEN, "--iterations", 2]
    ends(0, *train)
    kept = load_checkpoint(run.root / "checkpoints" / "final.pt").weights
    for path in (run.root / "tokens").iterdir():
        path.unlink()
    written: list[Path] = []

    def write(path: Path) -> AbstractContextManager[Path]:
        written.append(path)
        if len(written) > 2:
            raise WriteError(f"cannot write {path}: No space left on device", "free some")
        return atomic_write(path)

    monkeypatch.setattr(tokens, "atomic_write", write)
    capfd.readouterr()
    ends(0, *train, "--no-resume")
    told = " ".join(capfd.readouterr().err.split())
    assert "no room to keep the tokens of 3 of 5 images" in told
    assert len(run.ids("tokens")) == 2
    again = load_checkpoint(run.root / "checkpoints" / "final.pt").weights
    assert all(torch.equal(value, again[key]) for key, value in kept.items())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_do_what_one_does_within_one_token_space(
    run: Run, two_ranks: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    train = [*FROZEN, "--batch", 4, "--iterations", 1, "--amp", "none", "--device", "cpu"]
    capfd.readouterr()
    ends(0, *train, "--out", "alone")
    alone = capfd.readouterr().err
    sizes = [path.stat().st_size for path in (run.root / "tokens").iterdir()]
    shutil.rmtree(run.root / "tokens")
    space = 2.5 * max(sizes) / 1e9  # a file of each process
    pair = two_ranks(*train, "--out", "pair", "--token-space", space)
    assert pair.returncode == 0, pair.stderr
    assert "no room to keep the tokens of 2 of 3 images" in " ".join(pair.stderr.split())
    assert len(run.ids("tokens")) == 2
    assert len(list(Path("pair/predictions").iterdir())) == 5
    # What is dropped differs between processes, but tells only once the last layer has weights.
    losses = [re.findall(r"train: 1/1, loss (\d+\.\d+)", told) for told in (alone, pair.stderr)]
    assert len(losses[0]) == 1
    assert losses[0] == losses[1]
    found = [load_checkpoint(Path(out, "checkpoints", "final.pt")) for out in ("alone", "pair")]
    start = "discriminant.directions"
    assert found[0].weights[start].any()
    torch.testing.assert_close(found[1].weights[start], found[0].weights[start])

    done = two_ranks("relabel", "run", "--from", "pair/checkpoints/final.pt", *FROZEN[-4:])
    assert done.returncode == 0, done.stderr
    assert run.relabelled.ids("pseudo") == run.ids("pseudo")
    both = {path.name: path.read_bytes() for path in (run.relabelled.root / "pseudo").iterdir()}
    shutil.rmtree(run.relabelled.root)
    ends(0, "relabel", "run", "--from", "pair/checkpoints/final.pt", *FROZEN[-4:])
    assert {p.name: p.read_bytes() for p in (run.relabelled.root / "pseudo").iterdir()} == both


def test_kept_tokens_of_another_tower_are_not_taken(run: Run) -> None:
    ends(0, *FROZEN, "--iterations", 1)
    before = {path.name: path.read_bytes() for path in (run.root / "tokens").iterdir()}
    write_dino(Path("other.safetensors"), seed=1)
    ends(0, *FROZEN[:-1], "other.safetensors", "--iterations", 1, "--no-resume")
    after = {path.name: path.read_bytes() for path in (run.root / "tokens").iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--arch", "deeplabv2"), "--arch means nothing to preset frozen; leave it out"),
        (("--multi-scale",), "--multi-scale means nothing to preset frozen"),
        (("--backbone-weights", "r.pth"), "--backbone-weights r.pth means nothing to preset"),
        (("--token-space", "inf"), "--token-space inf is no number of GB; give one, such as"),
        (("--no-cgl", "--confidence", "photos"), "--confidence means nothing to --no-cgl"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_means_nothing_to_it_is_refused(
    run: Run, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    ends(2, *FROZEN, "--iterations", 1, *arguments)
    assert said in capfd.readouterr().err
    assert not (run.root / "checkpoints").exists()
