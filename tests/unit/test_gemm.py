"""The fast linear layer is the linear layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from clipes.kernels import linear as gemm

SHAPES = [(1, 48), (7, 48), (2, 15, 48), (3, 2, 5, 48), (31, 800)]


@pytest.mark.skipif(not gemm.has_onednn(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outputs", [20, 64, 192])
@pytest.mark.parametrize("kind", ["parameter", "tensor", "transposed"])
def test_onednns_layer_is_a_linear_layer(shape: tuple[int, ...], outputs: int, kind: str) -> None:
    torch.manual_seed(0)
    x, bias, inputs = torch.randn(shape), torch.randn(outputs), shape[-1]
    weight = torch.randn(outputs, inputs)
    if kind == "transposed":
        weight = weight.T.contiguous().T
    given = torch.nn.Parameter(weight) if kind == "parameter" else weight
    linear = gemm.make_linear("onednn")
    with torch.inference_mode():
        for some in (bias, None, bias):
            expected = F.linear(
                x.double(), weight.double(), some if some is None else some.double()
            )
            got = linear(x, given, some)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-4)
            assert got.is_contiguous()


@pytest.mark.skipif(not gemm.has_onednn(), reason="this PyTorch has no oneDNN")
def test_another_image_before_does_not_change_a_bit() -> None:
    torch.manual_seed(0)
    weight, x = torch.nn.Parameter(torch.randn(192, 48), requires_grad=False), torch.randn(99, 48)
    results = []
    with torch.inference_mode():
        for before in (1, 17, 300):
            linear = gemm.make_linear("onednn")
            linear(torch.randn(before, 48), weight, None)
            results.append(linear(x, weight, None))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


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
