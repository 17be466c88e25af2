"""Checkpoint files: what goes in comes out, and what is none is refused in a line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clipes.errors import ArtifactError
from clipes.seg.checkpoint import TrainingState, fill_model, load_checkpoint, save_checkpoint
from clipes.seg.deeplab import DeepLab, DeepLabSpec
from clipes.seg.recipes import TestSettings

SPEC = DeepLabSpec("deeplabv2", "resnet18", 8, ("cat", "dog"))
TEST = TestSettings((1.0,), flip=True)


@pytest.fixture(scope="module")
def model() -> DeepLab:
    torch.manual_seed(0)
    return DeepLab(SPEC)


@pytest.fixture
def saved(model: DeepLab, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "c.pt", model, TrainingState(7), TEST)
    return tmp_path / "c.pt"


def test_what_goes_in_comes_out(model: DeepLab, saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    assert checkpoint.spec == SPEC
    assert checkpoint.iteration == 7
    assert checkpoint.test == TEST
    rebuilt = checkpoint.build().state_dict()
    assert all(torch.equal(value, rebuilt[key]) for key, value in model.state_dict().items())


def test_checkpoints_of_clipes_0_1_name_no_kind_and_go_on(model: DeepLab, saved: Path) -> None:
    state = {"iteration": 7, "freeze_norms": True, "optimizer": {"state": {}}, "scaler": {}}
    old = {
        "format": "clipes-segmenter-1",
        "model": {"arch": "deeplabv2", "backbone": "resnet18", "output_stride": 8},
        "weights": model.state_dict(),
        "training": state,
        "test": {"scales": [1.0, 0.5], "flip": False, "crf": True},
    }
    old["model"]["classes"] = ["cat", "dog"]
    torch.save(old, saved)
    checkpoint = load_checkpoint(saved)
    assert checkpoint.spec == SPEC
    assert checkpoint.test == TestSettings((1.0, 0.5), flip=False, crf=True)
    assert checkpoint.training == TrainingState(7, {"freeze_norms": True}, {"state": {}}, {})
    fill_model(DeepLab(SPEC), checkpoint)
    torch.save({**old, "training": {"iteration": 9}}, saved)
    assert load_checkpoint(saved).training == TrainingState(9)


@pytest.mark.parametrize("kind", ["mamba", 3, None])
def test_a_kind_of_the_future_is_one_line(saved: Path, kind: object) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "kind": kind, "model": {"blocks": 7}}, saved)
    expected = rf"c\.pt is a segmenter of kind '{kind}', .* not know; update clipes, or take one of"
    with pytest.raises(ArtifactError, match=expected):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [("arch", "deeplabv3"), ("backbone", "resnet50"), ("output_stride", 16), ("classes", ("cow",))],
)
def test_another_model_is_refused(saved: Path, field: str, value: object) -> None:
    other = DeepLab(replace(SPEC, **{field: value}))
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
        {"towers": {"clip": "0" * 64}},
        {"model": {"arch": "unet"}},
        {"model": {**SPEC.to_dict(), "output_stride": 5}},
        {"weights": None},
        {"training": [1]},
        {"test": {"scales": [], "flip": True, "crf": True}},
    ],
    ids=["format", "towers", "model", "stride", "weights", "training", "test"],
)
def test_what_is_no_checkpoint_is_refused(saved: Path, damage: dict[str, object]) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save({**content, **damage}, saved)
    with pytest.raises(ArtifactError, match=r"c\.pt is (damaged|no checkpoint)"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "value",
    [1.5, torch.tensor([torch.nan]), torch.eye(2).to_sparse()],
    ids=["number", "nan", "sparse"],
)
def test_weights_are_finite_tensors(saved: Path, value: object) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "weights": {**content["weights"], "more": value}}, saved)
    with pytest.raises(ArtifactError, match="more is no tensor of finite numbers"):
        load_checkpoint(saved)


def test_nobody_is_told_to_delete_what_is_no_checkpoint(tmp_path: Path) -> None:
    picture = tmp_path / "cat.jpg"
    picture.write_bytes(b"a picture")
    with pytest.raises(ArtifactError) as error:
        load_checkpoint(picture)
    assert str(error.value.remedy).startswith("take another checkpoint that 'clipes train-seg'")


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
from clipes.seg.checkpoint import TrainingState, load_checkpoint, save_checkpoint
path = Path({str(saved)!r})
checkpoint = load_checkpoint(path)
model = checkpoint.build()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    save_checkpoint(path, model, TrainingState(8), checkpoint.test)
except ArtifactError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"cannot write {saved}")
    assert len(done.stdout.splitlines()) == 1
    assert load_checkpoint(saved).iteration == 7
    assert list(saved.parent.iterdir()) == [saved]
