"""The scripts in ``examples/`` run as they are, one after the other, on synthetic weights."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from clipes.disk.images import read_mask
from clipes.run.folder import Run
from tests.dino_support import cache_dino

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPTS = Path(__file__).resolve().parents[2] / "examples"


class Scripts:
    """Runs scripts in a folder of their own."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._patch = patch
        self.ran: set[str] = set()

    def __call__(self, name: str, *arguments: object) -> str:
        self._patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
        self.ran.add(name)
        return self._capsys.readouterr().out


@pytest.fixture
def script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Scripts:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPES_CACHE", str(tmp_path / "cache"))
    cache_dino()
    return Scripts(capsys, monkeypatch)


@pytest.mark.skipif(find_spec("skimage") is None, reason="the photos are scikit-image's")
def test_the_stages_one_after_the_other(script: Scripts, tiny_weights: Path) -> None:
    run = Run(Path("runs/by-hand"))
    assert "cat: maps (1, 19, 29) of ['cat']" in script("maps.py", run.root, tiny_weights)
    script("refine.py", run.root)
    assert len(run.ids("pseudo")) == len(run.ids("confidence")) == 5
    scored = script("evaluate.py", run.root)
    assert scored.startswith("mIoU ")
    assert "\nmotorbike: " in scored

    torch.manual_seed(0)
    assert "1/1: loss " in script("train.py", run.root, 1)
    assert (run.root / "checkpoints" / "final.pt").exists()
    mask = read_mask(run.root / "predictions" / "cat.png")
    assert mask.shape == run.load_pseudo("cat").mask.shape

    photo = Path("datasets/examples/JPEGImages/cat.png")
    told = script("one_photo.py", photo, "cat,sofa", "mask.png", tiny_weights)
    assert "sofa: " in told
    assert set(read_mask(Path("mask.png")).ravel()) <= {0, 1, 2}
    assert Path("mask-confidence.png").exists()
    own = Path("own")
    own.mkdir()
    (own / "a.png").write_bytes(photo.read_bytes())
    (own / "b.png").write_bytes(b"no picture")
    (own / "labels.csv").write_text("image,labels\na.png,cat;sofa\nb.png,cat\n")
    told = script("own_photos.py", own, "runs/own", tiny_weights)
    assert "1 masks made, 0 there before\na: sure of" in told
    assert told.endswith("look at them in runs/own/report/index.html\n")
    assert "skipping b: own/b.png is damaged or no JPEG" in told
    assert Run(Path("runs/own")).ids("pseudo") == ["a"]
    assert script.ran == {path.name for path in SCRIPTS.glob("*.py")}
