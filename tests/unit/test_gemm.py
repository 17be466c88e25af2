"""The fast linear layer is the linear layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from clipes.kernels import linear as gemm

# Less than a tile, a tile and a rest that has no full vector or one; several stretches of inputs.
SHAPES = [(1, 48), (7, 48), (2, 15, 48), (3, 2, 5, 48), (31, 800)]


@pytest.mark.parametrize("way", ["linear_by_tiles", "linear_by_convolution"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outputs", [20, 64, 192])
@pytest.mark.parametrize("transposed", [False, True])
def test_all_ways_are_a_linear_layer(
    way: str, shape: tuple[int, ...], outputs: int, transposed: bool
) -> None:
    torch.manual_seed(0)
    x, bias, inputs = torch.randn(shape), torch.randn(outputs), shape[-1]
    weight = torch.randn(inputs, outputs).T if transposed else torch.randn(outputs, inputs)
    for some in (bias, None):
        expected = F.linear(x.double(), weight.double(), None if some is None else some.double())
        got = getattr(gemm, way)(x, weight, some)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-4)
        assert got.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameter", [False, True])
def test_rounding_rounds_the_factors_and_nothing_else(dtype: torch.dtype, parameter: bool) -> None:
    linear = gemm.RoundedLinear(dtype)
    x, bias = torch.randn(3, 7, 64), torch.randn(20)
    weight = torch.randn(20, 64)
    given = torch.nn.Parameter(weight) if parameter else weight
    # Products of rounded factors are exact in double; the sum is rounded to the type once.
    exact = F.linear(x.to(dtype).double(), weight.to(dtype).double())
    step = torch.finfo(dtype).eps
    with torch.inference_mode():
        for _ in range(2):
            got = linear(x, given, None)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), exact, rtol=step, atol=1e-5)
            torch.testing.assert_close(linear(x, given, bias), got + bias)
