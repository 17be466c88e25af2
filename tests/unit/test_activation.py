"""The compiled activation function against torch's, and the slopes against autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import nn

from clipes.clip.activation import activate, activate_with_slope
from tests.torch_threads import torch_threads


@pytest.fixture(autouse=True, params=[1, 2], ids="{} threads".format)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch_threads(request.param):
        yield


@pytest.mark.parametrize("function", [QuickGELU(), nn.GELU()])
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


def test_small_values_are_as_exact_as_large_ones() -> None:
    x = -torch.rand(100, generator=torch.Generator().manual_seed(0)) * 25
    expected = QuickGELU()(x.double())
    torch.testing.assert_close(activate(QuickGELU(), x).double(), expected, rtol=1e-5, atol=0)


def test_far_away_it_is_zero_or_the_identity() -> None:
    x = torch.tensor([-1e6, -1e4, -100.0, 100.0, 1e4, 1e6])
    output, slope = activate_with_slope(QuickGELU(), x)
    torch.testing.assert_close(output, x.clamp(min=0))
    torch.testing.assert_close(slope, (x > 0).float())
