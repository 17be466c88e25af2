"""The fast linear layer is the linear layer."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from clipes.clip import gemm


@pytest.mark.parametrize("shape", [(7, 48), (2, 7, 48), (3, 2, 5, 48), (1, 48)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_convolution_is_a_linear_layer(shape: tuple[int, ...], transposed: bool) -> None:
    x, bias = torch.randn(shape), torch.randn(20)
    weight = torch.randn(48, 20).T if transposed else torch.randn(20, 48)
    for some in (bias, None):
        expected = F.linear(x.double(), weight.double(), None if some is None else some.double())
        got = gemm.linear_by_convolution(x, weight, some)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        assert got.is_contiguous()


def test_a_path_that_drops_precision_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def sloppy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x.bfloat16(), weight.bfloat16(), bias).float()

    times = itertools.cycle([2.0, 1.0])
    monkeypatch.setattr(gemm, "_time", lambda *_: next(times))
    measure = gemm._measured.__wrapped__
    assert measure(1) is gemm.linear_by_convolution
    monkeypatch.setattr(gemm, "linear_by_convolution", sloppy)
    assert measure(1) is F.linear


def test_other_types_and_devices_keep_torchs_own() -> None:
    assert gemm.choose_linear(torch.device("cpu"), torch.bfloat16) is F.linear
    assert gemm.choose_linear(torch.device("meta"), torch.float32) is F.linear
