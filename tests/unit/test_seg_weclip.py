"""WeCLIP's decoder and loss against their published numbers and against loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from clipes.seg.weclip import WeClip, WeClipSpec
from clipes.seg.weclip_loss import (
    affinity_loss,
    affinity_target,
    balanced_cross_entropy,
    weclip_loss,
)
from clipes.types import IGNORE

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = WeClipSpec(("a", "b"), layers=3, channels=12, width=16, blocks=2, heads=2)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))


def small() -> WeClip:
    torch.manual_seed(0)
    return SPEC.build()


@pytest.mark.parametrize(("classes", "count"), [(20, 5_985_045), (80, 6_000_465)])
def test_the_published_decoder_has_the_published_size(classes: int, count: int) -> None:
    model = WeClipSpec(names(classes)).build()
    assert sum(one.numel() for one in model.parameters()) == count


def test_first_weights_are_torchs_and_the_attentions_biases_zero() -> None:
    model = WeClipSpec(names(20)).build().requires_grad_(False)
    attention = model.blocks[0].attention
    assert not attention.in_proj_bias.any()
    assert not attention.out_proj.bias.any()
    # Xavier-uniform on the stacked matrix: within sqrt(6 / (256 + 768)).
    assert attention.in_proj_weight.abs().max() == pytest.approx((6 / 1024) ** 0.5, rel=1e-3)
    # A linear layer's and a 1 x 1 convolution's: within 1 / sqrt(inputs).
    assert model.fuse.weight.abs().max() == pytest.approx(2816**-0.5, rel=1e-3)
    assert model.classify.bias.abs().max() <= 256**-0.5


def test_permuted_patches_come_out_permuted() -> None:
    model = small().eval()
    tokens = torch.randn(2, 3, 4, 5, 12)
    order = torch.randperm(20)
    permuted = tokens.flatten(2, 3)[:, :, order].unflatten(2, (4, 5))
    with torch.no_grad():
        (logits, affinity), (moved, also) = model(tokens), model(permuted)
    assert logits.shape == (2, 3, 4, 5)
    torch.testing.assert_close(moved.flatten(2), logits.flatten(2)[..., order])
    torch.testing.assert_close(also, affinity[:, order][:, :, order])


def test_the_affinity_is_the_sigmoid_of_products_of_fused_tokens() -> None:
    model = small().eval()
    tokens = torch.randn(1, 3, 2, 3, 12)
    read = [model.readers[layer](tokens[0, layer].flatten(0, 1)) for layer in range(3)]
    fused = torch.cat(read, 1) @ model.fuse.weight.T + model.fuse.bias
    _, affinity = model(tokens)
    torch.testing.assert_close(affinity[0], (fused @ fused.T).sigmoid())


def test_dropout_takes_whole_channels() -> None:
    seen: list[torch.Tensor] = []
    model = replace(SPEC, dropout=0.5).build()
    model.blocks.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    model(torch.randn(2, 3, 4, 5, 12))
    dropped = (seen[0] == 0).float().mean(1)  # (2, 16), share of the patches
    assert dropped.unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    "wrong",
    [{"heads": 3}, {"layers": 0}, {"width": 1 << 20}, {"dropout": 1.0}, {"normalise": "x"}],
)
def test_specs_of_no_decoder_say_so(wrong: dict[str, object]) -> None:
    assert not SPEC.problem()
    assert replace(SPEC, **wrong).problem()


def test_pairs_within_the_radius_are_the_published_number() -> None:
    target = affinity_target(torch.zeros(1, 320, 320, dtype=torch.long), (20, 20))
    assert target.shape == (1, 400, 400)
    assert int((target != IGNORE).sum()) == 71_824
    assert bool((target[target != IGNORE] == 1).all())


def test_the_affinity_target_equals_a_loop_over_pairs() -> None:
    labels = torch.randint(0, 3, (2, 48, 64))
    target = affinity_target(labels, (3, 4), radius=1)
    for image in range(2):
        for i in range(12):
            for j in range(12):
                (r, c), (s, d) = divmod(i, 4), divmod(j, 4)
                same = int(labels[image, 16 * r, 16 * c] == labels[image, 16 * s, 16 * d])
                near = abs(r - s) <= 1 and abs(c - d) <= 1
                assert target[image, i, j] == (same if near else IGNORE)


def test_the_affinity_loss_counts_either_kind_as_half() -> None:
    affinity = torch.tensor([[[0.9, 0.2], [0.4, 0.7]]])
    target = torch.tensor([[[1, 0], [IGNORE, 1]]])
    expected = 0.5 * (0.1 + 0.3) / 3 + 0.5 * 0.2 / 2
    assert float(affinity_loss(affinity, target)) == pytest.approx(expected)


def test_background_and_foreground_count_the_same() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[0] = 0
    flat, wanted = logits.permute(0, 2, 3, 1).flatten(0, 2), labels.flatten()
    expected = 0.5 * (
        functional.cross_entropy(flat[wanted == 0], wanted[wanted == 0])
        + functional.cross_entropy(flat[wanted > 0], wanted[wanted > 0])
    )
    torch.testing.assert_close(balanced_cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("label", [0, 1])
def test_batches_of_one_kind_have_a_finite_loss_and_gradient(label: int) -> None:
    model = small()
    logits, affinity = model(torch.randn(2, 3, 4, 5, 12))
    loss = weclip_loss(logits, affinity, torch.full((2, 64, 80), label))
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(one.grad.isfinite().all()) for one in model.parameters())
