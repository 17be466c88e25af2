"""Checkpoint files: what goes in comes out, and what is none is refused in a line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clipes.errors import ArtifactError
from clipes.seg.checkpoint import fill_model, load_checkpoint, save_checkpoint
from clipes.seg.deeplab import ModelSpec, Segmenter

SPEC = ModelSpec("deeplabv2", "resnet18", 8, ("cat", "dog"))
TEST = {"scales": [1.0], "flip": True, "crf": False}


@pytest.fixture(scope="module")
def model() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(SPEC)


@pytest.fixture
def saved(model: Segmenter, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "c.pt", model, {"iteration": 7}, TEST)
    return tmp_path / "c.pt"


def test_what_goes_in_comes_out(model: Segmenter, saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    assert checkpoint.spec == SPEC
    assert checkpoint.iteration == 7
    assert checkpoint.test == TEST
    rebuilt = checkpoint.build().state_dict()
    assert all(torch.equal(value, rebuilt[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("field", "value"),
    [("arch", "deeplabv3"), ("backbone", "resnet50"), ("output_stride", 16), ("classes", ("cow",))],
)
def test_another_model_is_refused(saved: Path, field: str, value: object) -> None:
    other = Segmenter(replace(SPEC, **{field: value}))
    with pytest.raises(ArtifactError, match=rf"c\.pt has {field} "):
        fill_model(other, load_checkpoint(saved))


def test_tensors_that_belie_the_description_are_refused(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    content["model"]["backbone"] = "resnet50"
    torch.save(content, saved)
    with pytest.raises(ArtifactError, match="not those of deeplabv2 on resnet50"):
        load_checkpoint(saved).build()


@pytest.mark.parametrize(
    "damage",
    [
        {"format": "other"},
        {"model": {"arch": "unet"}},
        {"model": {**SPEC.to_dict(), "output_stride": 5}},
        {"weights": None},
        {"training": [1]},
        {"test": {"scales": [], "flip": True, "crf": True}},
    ],
    ids=["format", "model", "stride", "weights", "training", "test"],
)
def test_what_is_no_checkpoint_is_refused(saved: Path, damage: dict[str, object]) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save({**content, **damage}, saved)
    with pytest.raises(ArtifactError, match=r"c\.pt is (damaged|no checkpoint)"):
        load_checkpoint(saved)


def test_damaged_files_are_one_line(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for content in (b"", b"junk", data[: len(data) // 2]):
        saved.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"c\.pt") as error:
            load_checkpoint(saved)
        assert "\n" not in str(error.value)
    with pytest.raises(ArtifactError, match="no checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes")
def test_no_space_left_is_one_line_and_keeps_what_was_there(saved: Path) -> None:
    # A limit on file sizes fails a write in its middle, as a full disk does.
    code = f"""
import resource, sys
from pathlib import Path
from clipes.errors import ArtifactError
from clipes.seg.checkpoint import load_checkpoint, save_checkpoint
path = Path({str(saved)!r})
checkpoint = load_checkpoint(path)
model = checkpoint.build()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    save_checkpoint(path, model, {{"iteration": 8}}, checkpoint.test)
except ArtifactError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write {saved}")
    assert len(done.stdout.splitlines()) == 1
    assert load_checkpoint(saved).iteration == 7
    assert list(saved.parent.iterdir()) == [saved]
