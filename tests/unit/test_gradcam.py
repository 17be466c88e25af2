"""The closed-form gradient against autograd, and what must not change a map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import nn

from clipes.bench import literal
from clipes.config import CamParams
from clipes.maps.affinity import propagate, sinkhorn
from clipes.maps.gradcam import channel_weights, class_probabilities, min_max, softmax_gradcam
from clipes.towers.clip import Backbone
from clipes.towers.taps import Encoded, Taps

WIDTH, OUT, SCALE = 64, 32, 30.0
BLOCKS = 5


def make_backbone(act: type[nn.Module]) -> Backbone:
    torch.manual_seed(0)
    visual = VisionTransformer(64, 16, WIDTH, 6, 4, 4.0, output_dim=OUT, act_layer=act)
    for name, parameter in visual.named_parameters():
        # LayerNorm weights of 1 and biases of 0 would hide a missing factor.
        if "ln_" in name or name.endswith("bias"):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    mean = (0.5, 0.5, 0.5)
    return Backbone(visual, SCALE, mean, mean)


def encode(backbone: Backbone, images: torch.Tensor) -> Encoded:
    return backbone.encode(images, Taps(attention=backbone.last_blocks(BLOCKS), last="gradient"))


def make_text(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return F.normalize(torch.randn(count, OUT, generator=generator), dim=1)


def make_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("act", [QuickGELU, nn.GELU])
@pytest.mark.parametrize("classes", [1, 3, 11, 19])
def test_closed_form_equals_one_autograd_pass_per_class(act: type[nn.Module], classes: int) -> None:
    backbone = make_backbone(act)
    prepared = backbone.prepare(make_image(70, 100), 1600)
    encoded = encode(backbone, prepared[None])
    (last,) = encoded.gradients
    assert encoded.grid == (5, 7)
    text, background = make_text(classes), make_text(4)

    visual = backbone.visual
    tokens, maps = literal.run_blocks(visual, literal.embed(visual, prepared))
    expected, activations = literal.channel_weights(visual, tokens, text, background, SCALE)

    weights = channel_weights(backbone, last, text, background)
    torch.testing.assert_close(last.activations, activations, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        weights, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )
    attention = torch.stack(maps[-BLOCKS:]).mean(0)[1:, 1:]
    torch.testing.assert_close(encoded.attention[0], attention, rtol=1e-4, atol=1e-6)


def test_the_whole_stage_equals_the_literal_way() -> None:
    backbone = make_backbone(QuickGELU)
    prepared = backbone.prepare(make_image(90, 75), 1600)
    text, background = make_text(3), make_text(4)
    encoded = encode(backbone, prepared[None])
    cams = softmax_gradcam(backbone, encoded.gradients[0], encoded.grid, text, background)
    for last_row_in_box in (True, False):
        params = CamParams(affinity_blocks=BLOCKS, last_row_in_box=last_row_in_box)
        expected = literal.refined_maps(backbone.visual, prepared, text, background, SCALE, params)
        walk = sinkhorn(encoded.attention[0], params.sinkhorn_iterations)
        refined = propagate(walk, cams, params, params.walk_power)
        np.testing.assert_allclose(refined, expected, atol=2e-3)  # scaling magnifies


def test_order_of_classes_and_background_does_not_matter() -> None:
    backbone = make_backbone(QuickGELU)
    encoded = encode(backbone, backbone.prepare(make_image(64, 48), 1600)[None])
    seen = encoded.gradients[0], encoded.grid
    text, background = make_text(4), make_text(3)
    order = [2, 0, 3, 1]
    maps = softmax_gradcam(backbone, *seen, text, background)
    shuffled = softmax_gradcam(backbone, *seen, text[order], background.flip(0))
    np.testing.assert_allclose(shuffled, maps[order], atol=1e-5)
    assert maps.shape == (4, 4, 3)
    assert maps.min() >= 0
    assert maps.max() <= 1


def test_a_batch_gives_what_its_images_give_alone() -> None:
    backbone = make_backbone(QuickGELU)
    images = torch.randn(3, 3, 48, 64)
    together = encode(backbone, images)
    for image, attention, last in zip(images, together.attention, together.gradients, strict=True):
        alone = encode(backbone, image[None])
        torch.testing.assert_close(attention, alone.attention[0], rtol=1e-4, atol=1e-6)
        feature = alone.gradients[0].feature
        torch.testing.assert_close(last.feature, feature, rtol=1e-4, atol=1e-5)


def test_probabilities_ignore_the_length_of_the_image_feature() -> None:
    feature = torch.randn(OUT)
    probs = class_probabilities(feature, make_text(2), make_text(3), SCALE)
    torch.testing.assert_close(
        class_probabilities(7 * feature, make_text(2), make_text(3), SCALE), probs
    )
    assert float(probs.sum()) == pytest.approx(1)


def test_min_max_reaches_both_ends_and_survives_a_constant_map() -> None:
    maps = np.stack([np.linspace(2, 6, 12).reshape(3, 4), np.full((3, 4), 0.7)]).astype(np.float32)
    scaled = min_max(maps)
    assert scaled[0].min() == 0
    assert scaled[0].max() == pytest.approx(1, abs=1e-6)
    assert (scaled[1] == 0).all()


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((375, 500), (24, 32)),
        ((16, 17), (1, 2)),
        ((1, 1), (1, 1)),
        ((40, 4000), (3, 250)),
    ],
)
def test_the_grid_covers_the_image(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert make_backbone(QuickGELU).grid(size, 1600) == grid


@pytest.mark.parametrize("size", [(12000, 9000), (9000, 12000), (16, 100_000), (100_000, 40)])
def test_a_huge_image_gets_a_bounded_grid_of_its_shape(size: tuple[int, int]) -> None:
    h, w = make_backbone(QuickGELU).grid(size, 1600)
    assert 1200 < h * w <= 1600
    if min(size) > 1000:
        assert h / w == pytest.approx(size[0] / size[1], rel=0.05)
