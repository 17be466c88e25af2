"""Backbones: torchvision's names, dilation that keeps what weights mean, weight files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from clipes.choices import SegmenterBackbone
from clipes.errors import WeightsError
from clipes.seg.backbones import build_backbone
from clipes.seg.weights import fill, load_backbone, read_tensors

pytestmark = pytest.mark.usefixtures("one_thread")


def spread(module: nn.Module) -> None:
    """Give batch normalisations statistics that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(1)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_(0, 0.1, generator=generator)
            child.running_var.uniform_(0.5, 1.5, generator=generator)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet50_v1"])
@pytest.mark.parametrize("stride", [8, 16])
def test_dilated_features_contain_the_strided_ones(name: str, stride: int) -> None:
    torch.manual_seed(0)
    plain, dense = (build_backbone(name, s).eval().double() for s in (32, stride))
    spread(plain)
    dense.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 70, 97, dtype=torch.float64)
    with torch.inference_mode():
        expected, found = plain(images)[1], dense(images)[1]
    assert found.shape[2:] == (-(-70 // stride), -(-97 // stride))
    step = 32 // stride
    torch.testing.assert_close(found[:, :, ::step, ::step], expected)


def test_resnet50_is_torchvisions_dilated_one() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    theirs = theirs.eval().double()
    spread(theirs)
    ours = build_backbone("resnet50", 8).eval().double()
    fill(ours, theirs.state_dict(), "torchvision")
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        low = theirs.layer1(x)
        features = theirs.layer4(theirs.layer3(theirs.layer2(low)))
        found_low, found = ours(images)
    torch.testing.assert_close(found_low, low)
    torch.testing.assert_close(found, features)


@pytest.mark.parametrize("name", SegmenterBackbone.names())
def test_names_shapes_and_sizes(name: str) -> None:
    classifier = torchvision.models.get_model(name.removesuffix("_v1"))
    backbone = build_backbone(name, 8).eval()
    expected = {
        key: value.shape
        for key, value in classifier.state_dict().items()
        if not key.startswith(("fc.", "classifier."))
    }
    assert {key: value.shape for key, value in backbone.state_dict().items()} == expected
    with torch.inference_mode():
        low, features = backbone(torch.zeros(1, 3, 33, 50))
    assert low.shape == (1, backbone.low_channels, 9, 13)
    assert features.shape == (1, backbone.channels, 5, 7)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="resnet20"):
        build_backbone("resnet20", 8)
    with pytest.raises(ValueError, match="stride 4"):
        build_backbone("resnet18", 4)


@pytest.fixture
def classifier() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return dict(torchvision.models.resnet18().state_dict())


@pytest.mark.parametrize("form", ["plain", "wrapped", "safetensors", "segmentation"])
def test_files_of_every_form_load(
    classifier: dict[str, torch.Tensor], form: str, tmp_path: Path
) -> None:
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(classifier, path)
    elif form == "wrapped":
        torch.save({"state_dict": classifier, "epoch": 3}, path)
    elif form == "segmentation":
        body = {f"backbone.{key}": value for key, value in classifier.items()}
        torch.save(body | {"classifier.0.weight": torch.zeros(2)}, path)
    else:
        torch.save(classifier, path)
    backbone = build_backbone("resnet18", 8)
    told: list[str] = []
    assert load_backbone(backbone, "resnet18", str(path), say=told.append) == path.name
    assert len(told) == 1
    assert torch.equal(
        backbone.state_dict()["layer4.1.conv2.weight"], classifier["layer4.1.conv2.weight"]
    )


def test_files_of_another_architecture_are_one_line(
    classifier: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "w.pth"
    torch.save(classifier, path)
    with pytest.raises(WeightsError, match=r"another architecture \(\d+ tensors missing"):
        load_backbone(build_backbone("resnet50", 8), "resnet50", str(path), say=print)
    classifier["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    with pytest.raises(WeightsError, match=r"conv1.weight is \(64, 1, 7, 7\)"):
        fill(build_backbone("resnet18", 8), classifier, "w")
    classifier["conv1.weight"] = torch.full((64, 3, 7, 7), torch.nan)
    with pytest.raises(WeightsError, match="not finite"):
        fill(build_backbone("resnet18", 8), classifier, "w")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x04N."], ids=["empty", "junk", "pickle"])
def test_files_that_are_no_weights_are_one_line(content: bytes, tmp_path: Path) -> None:
    for name in ("w.pth", "w.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=name) as error:
            read_tensors(path)
        assert "\n" not in str(error.value)
    with pytest.raises(WeightsError, match="no file"):
        read_tensors(tmp_path / "absent")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"conv1.weight": Evil()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="other than tensors"):
        read_tensors(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_without_a_network_training_starts_from_scratch_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    told: list[str] = []
    assert (
        load_backbone(build_backbone("resnet18", 8), "resnet18", "auto", say=told.append) == "none"
    )
    assert "no route to host" in told[-1]
    assert "--backbone-weights FILE" in told[-1]
    assert (
        load_backbone(build_backbone("resnet50_v1", 8), "resnet50_v1", "auto", say=told.append)
        == "none"
    )
    assert "--backbone-weights FILE" in told[-1]
