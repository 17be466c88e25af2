"""The activation functions and their slopes against autograd, and QuickGELU folded into a tower."""

from __future__ import annotations

import copy

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from clipes.kernels.activation import activate, activate_with_slope, fold_quick_gelu


def make_tower(act: type[nn.Module]) -> VisionTransformer:
    torch.manual_seed(0)
    visual = VisionTransformer(64, 16, 64, 2, 4, 4.0, output_dim=32, act_layer=act)
    for parameter in visual.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return visual.eval().requires_grad_(False)


@pytest.mark.parametrize("function", [QuickGELU(), nn.GELU(), nn.SiLU()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 16, 1003])
def test_function_and_slope(function: nn.Module, dtype: torch.dtype, count: int) -> None:
    x = torch.linspace(-9, 9, count, dtype=dtype)
    exact = x.double().requires_grad_()
    expected = function(exact)
    expected.sum().backward()
    output, slope = activate_with_slope(function, x)
    close = {"rtol": 1e-5, "atol": 3e-6, "check_dtype": False}
    torch.testing.assert_close(output, expected.detach(), **close)
    torch.testing.assert_close(slope, exact.grad, **close)
    torch.testing.assert_close(activate(function, x.clone()), expected.detach(), **close)


def test_far_away_it_is_zero_or_the_identity() -> None:
    x = torch.tensor([-1e6, -1e4, -100.0, 100.0, 1e4, 1e6])
    output, slope = activate_with_slope(nn.SiLU(), x)
    torch.testing.assert_close(output, x.clamp(min=0))
    torch.testing.assert_close(slope, (x > 0).float())


def error(mlp: nn.Module, exact: nn.Module, x: Tensor) -> float:
    """The largest error of an MLP, in units of the last place of the largest number it makes."""
    expected = exact(x.double())
    ulp = torch.finfo(torch.float32).eps * float(expected.abs().max())
    return float((mlp(x) - expected).abs().max()) / ulp


def test_folding_costs_no_more_than_the_rounding_there_is() -> None:
    before, after = make_tower(QuickGELU), make_tower(QuickGELU)
    fold_quick_gelu(after)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(1))
    for one, other in zip(before.transformer.resblocks, after.transformer.resblocks, strict=True):
        assert isinstance(other.mlp.gelu, nn.SiLU)
        exact = copy.deepcopy(one.mlp).double()
        assert error(other.mlp, exact, x) < max(2.0, 1.5 * error(one.mlp, exact, x))


def test_a_weight_and_its_factor_are_rounded_once() -> None:
    before, after = make_tower(QuickGELU), make_tower(QuickGELU)
    fold_quick_gelu(after)
    one, other = (tower.transformer.resblocks[0].mlp for tower in (before, after))
    half_ulp = torch.finfo(torch.float32).eps / 2
    for name, factor in (("c_fc", 1.702), ("c_proj", 1 / 1.702)):
        expected = getattr(one, name).weight.double() * factor
        got = getattr(other, name).weight.double()
        torch.testing.assert_close(got, expected, rtol=2 * half_ulp, atol=0)


def test_a_tower_is_folded_once_and_its_weights_are_left_alone() -> None:
    visual = make_tower(QuickGELU)
    given = [visual.transformer.resblocks[0].mlp.c_fc.weight, visual.proj]
    kept = [tensor.clone() for tensor in given]
    fold_quick_gelu(visual)
    once = copy.deepcopy(visual.state_dict())
    fold_quick_gelu(visual)
    assert all(torch.equal(visual.state_dict()[name], value) for name, value in once.items())
    assert all(torch.equal(tensor, copied) for tensor, copied in zip(given, kept, strict=True))


@pytest.mark.parametrize(("act", "dtype"), [(nn.GELU, torch.float32), (QuickGELU, torch.bfloat16)])
def test_other_functions_and_short_types_stay(act: type[nn.Module], dtype: torch.dtype) -> None:
    visual = make_tower(act).to(dtype)
    before = copy.deepcopy(visual.state_dict())
    fold_quick_gelu(visual)
    assert isinstance(visual.transformer.resblocks[0].mlp.gelu, act)
    assert all(torch.equal(visual.state_dict()[name], value) for name, value in before.items())
