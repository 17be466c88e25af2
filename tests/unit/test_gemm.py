"""The fast linear layer is the linear layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from clipes.clip import gemm, timing

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


@pytest.mark.parametrize(("threads", "way"), [(1, "linear_by_tiles"), (2, "linear_by_convolution")])
def test_a_path_that_drops_precision_is_never_chosen(
    threads: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sloppy(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x.bfloat16(), weight.bfloat16(), bias).float()

    monkeypatch.setattr(gemm, "best_times", lambda _ways: [2.0, 1.0])
    measure = gemm._measured.__wrapped__
    assert measure(threads) is getattr(gemm, way)
    monkeypatch.setattr(gemm, way, sloppy)
    assert measure(threads) is F.linear


def test_other_types_and_devices_keep_torchs_own() -> None:
    assert gemm.choose_linear(torch.device("cpu"), torch.bfloat16) is F.linear
    assert gemm.choose_linear(torch.device("meta"), torch.float32) is F.linear


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


@pytest.mark.parametrize("pays", [False, True])
def test_auto_rounds_where_that_is_faster(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_rounding_pays", lambda _threads: pays)
    cpu = torch.device("cpu")
    chosen = gemm.choose_linear(cpu, torch.float32, gemm.Precision.auto)
    assert isinstance(chosen, gemm.RoundedLinear) == pays
    assert isinstance(
        gemm.choose_linear(cpu, torch.float32, gemm.Precision.bf16), gemm.RoundedLinear
    )
    exact = gemm.choose_linear(cpu, torch.float32)
    assert not isinstance(exact, gemm.RoundedLinear)


def test_whether_rounding_pays_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = gemm._rounding_pays.__wrapped__
    monkeypatch.setattr(gemm, "_measured", lambda _threads: F.linear)
    for times, expected in (([2.0, 1.0], True), ([1.0, 2.0], False)):
        monkeypatch.setattr(gemm, "best_times", lambda _ways, times=times: times)
        assert measure(1) is expected


def test_ways_are_timed_in_turns_and_the_shortest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    seen: list[str] = []

    def way(name: str, seconds: list[float]) -> None:
        seen.append(name)
        clock["now"] += seconds[(len(seen) - 1) // 2]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])
    first, second = [9.0, 3.0, 4.0, 5.0, 6.0, 7.0], [2.0] * 6
    times = timing.best_times([lambda: way("a", first), lambda: way("b", second)])
    assert times == [3.0, 2.0]
    assert seen == ["a", "b"] * 6
