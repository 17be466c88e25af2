"""Which code runs is decided by what is known about the machine, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipes.choices import Precision
from clipes.kernels import choose
from clipes.kernels.choose import Kernels, choose_kernels, processor_features, products
from clipes.kernels.linear import has_onednn
from clipes.towers.clip import Backbone
from clipes.towers.load import load_visual
from clipes.weights import read_state_dict
from tests.torch_threads import torch_threads

CPU, FP32, EXACT, AUTO = torch.device("cpu"), torch.float32, Precision.fp32, Precision.auto
AVX2 = {"avx2": True, "avx512f": False}
AVX512 = {"avx2": True, "avx512f": True}
BF16 = {**AVX512, "avx512bf16": True}


@pytest.mark.parametrize(
    ("device", "dtype", "head_width", "precision", "features", "expected"),
    [
        ("cpu", FP32, 64, EXACT, AVX2, ("onednn", "tiles")),
        ("cpu", FP32, 64, EXACT, AVX512, ("onednn", "tiles")),
        ("cpu", FP32, 64, EXACT, {}, ("torch", "torch")),
        ("cpu", FP32, 80, EXACT, AVX2, ("onednn", "torch")),
        ("cpu", FP32, 128, EXACT, AVX2, ("onednn", "torch")),
        ("cpu", torch.bfloat16, 64, EXACT, AVX2, ("torch", "torch")),
        ("meta", FP32, 64, EXACT, AVX512, ("torch", "torch")),
        ("cpu", FP32, 64, AUTO, AVX512, ("onednn", "tiles")),
        ("cpu", FP32, 64, AUTO, BF16, ("bfloat16", "tiles")),
        ("cpu", FP32, 64, AUTO, {**AVX512, "amx-bf16": True}, ("bfloat16", "tiles")),
        ("cpu", FP32, 64, Precision.bf16, {}, ("bfloat16", "torch")),
        ("cpu", FP32, 64, Precision.fp16, AVX2, ("float16", "tiles")),
    ],
)
def test_the_rule(device, dtype, head_width, precision, features, expected):
    got = choose_kernels(torch.device(device), dtype, head_width, precision, features)
    assert got == Kernels(*expected)


@pytest.mark.parametrize("multiplies", [False, True])
def test_auto_asks_the_gpu_not_the_processor_that_feeds_it(multiplies, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: multiplies)
    got = choose_kernels(torch.device("cuda"), FP32, 64, AUTO, {} if multiplies else BF16)
    assert got == Kernels("bfloat16" if multiplies else "torch", "torch")


def test_without_onednn_linear_layers_are_torchs(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_kernels(CPU, FP32, 64, EXACT, AVX2) == Kernels("torch", "tiles")


@pytest.mark.parametrize("dtype", [FP32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("features", [{}, AVX2])
@pytest.mark.parametrize("shape", [(7, 48), (2, 7, 48), (0, 48), (7, 0)])
def test_products_are_of_all_with_all(dtype, features, shape, monkeypatch):
    monkeypatch.setattr(choose, "processor_features", lambda: features)
    torch.manual_seed(0)
    left, right = torch.randn(shape).to(dtype), torch.randn(shape[-1], 9).to(dtype).T
    with torch.inference_mode():
        got = products(left, right)
    assert (got.shape, got.dtype) == ((*shape[:-1], 9), dtype)
    atol = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got.double(), left.double() @ right.double().T, atol=atol, rtol=0.01)


@pytest.mark.parametrize("precision", list(Precision))
def test_a_tower_says_what_it_computes_with_whatever_its_threads(
    tiny_weights: Path, precision: Precision
):
    half = (0.5, 0.5, 0.5)
    visual = load_visual(read_state_dict(tiny_weights))
    width = len(visual.proj) // visual.transformer.resblocks[0].attn.num_heads
    expected = choose_kernels(CPU, FP32, width, precision, processor_features())
    for threads in (1, 2):
        with torch_threads(threads):
            assert Backbone(visual, 100.0, half, half, precision=precision).kernels == expected


@pytest.mark.skipif(not processor_features().get("avx2"), reason="a processor without AVX2")
def test_pytorch_still_lends_onednn():
    """Its functions are not public; without them linear layers take twice as long on AMD's."""
    assert has_onednn()
