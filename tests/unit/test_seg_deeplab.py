"""Heads, the branches of multi-scale training, frozen normalisation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from clipes.choices import Arch
from clipes.seg.deeplab import DeepLab, DeepLabSpec, MultiScale, branch_sizes, freeze_norms

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("cat", "dog")


def segmenter(arch: str = "deeplabv2", stride: int = 8) -> DeepLab:
    torch.manual_seed(0)
    return DeepLab(DeepLabSpec(arch, "resnet18", stride, CLASSES))


@pytest.mark.parametrize("arch", Arch.names())
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("size", [(64, 64), (65, 90), (33, 31)])
def test_logits_have_the_size_that_is_announced(
    arch: str, stride: int, size: tuple[int, int]
) -> None:
    model = segmenter(arch, stride).eval()
    with torch.inference_mode():
        logits = model(torch.zeros(1, 3, *size))
    assert logits.shape == (1, 3, *branch_sizes(model.spec, [1.0], size)[0])


def test_v2_sums_four_dilated_convolutions() -> None:
    model = segmenter().eval()
    images = torch.randn(2, 3, 40, 56)
    with torch.inference_mode():
        _, features = model.backbone(images)
        expected = torch.zeros(2, 3, 5, 7)
        for index, rate in enumerate((6, 12, 18, 24)):
            weight = model.state_dict()[f"head.branches.{index}.weight"]
            bias = model.state_dict()[f"head.branches.{index}.bias"]
            expected += functional.conv2d(features, weight, bias, padding=rate, dilation=rate)
        torch.testing.assert_close(model(images), expected)


def test_branches_are_the_scales_and_their_maximum() -> None:
    model = segmenter().eval()
    branches = MultiScale(model, (1.0, 0.75, 0.5))
    images = torch.randn(1, 3, 65, 80)
    with torch.inference_mode():
        full, three_quarters, half, most = branches(images)
        small = functional.interpolate(images, size=(32, 40), mode="bilinear")
        torch.testing.assert_close(half, model(small))
        torch.testing.assert_close(full, model(images))
    sizes = [tuple(one.shape[2:]) for one in (full, three_quarters, half, most)]
    assert (
        sizes
        == branch_sizes(model.spec, branches.scales, (65, 80))
        == [(9, 10), (6, 8), (4, 5), (9, 10)]
    )
    enlarged = [
        functional.interpolate(one, size=(9, 10), mode="bilinear") for one in (three_quarters, half)
    ]
    assert torch.equal(most, torch.maximum(torch.maximum(full, enlarged[0]), enlarged[1]))


def test_one_scale_is_one_branch() -> None:
    branches = MultiScale(segmenter().eval(), (1.0,))
    with torch.inference_mode():
        assert len(branches(torch.zeros(1, 3, 32, 32))) == 1
    assert branch_sizes(branches.model.spec, [1.0], (32, 32)) == [(4, 4)]


def test_frozen_normalisation_does_not_move() -> None:
    model = segmenter().train()
    freeze_norms(model.backbone)
    before = {key: value.clone() for key, value in model.state_dict().items() if "bn" in key}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="unet"):
        segmenter("unet")
