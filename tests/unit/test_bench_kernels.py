"""A kernel that cannot be left out is refused by name, not timed against itself."""

from __future__ import annotations

import sys

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer

from clipes.bench import cam, kernels
from clipes.bench.kernels import KERNELS, compare_without
from clipes.cli.bench import Kernel
from clipes.errors import BackendError, UsageError
from clipes.kernels.choose import Kernels


@pytest.fixture(autouse=True)
def _small_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    def tower() -> VisionTransformer:
        torch.manual_seed(0)
        visual = VisionTransformer(64, 16, 64, 9, 4, 4.0, output_dim=512, act_layer=QuickGELU)
        return visual.eval().requires_grad_(False)

    monkeypatch.setattr(cam, "random_tower", tower)


def test_the_command_line_knows_the_kernels() -> None:
    assert tuple(kernel.value for kernel in Kernel) == KERNELS


def test_both_ways_are_timed_on_one_thread_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, done = torch.get_num_threads(), []
    built, seconds = [], iter([1.0, 3.0, 2.0, 2.0, 1.0, 2.0])

    def timed(run) -> float:
        assert torch.get_num_threads() == 1
        assert run().mask.shape == (375, 500)
        return next(seconds)

    def backbone(**given):
        made = cam.random_backbone(**{"kernels": Kernels("torch", "tiles"), **given})
        built.append(made.kernels)
        return made

    monkeypatch.setattr(kernels, "random_backbone", backbone)
    monkeypatch.setattr(kernels, "_cpu_seconds", timed)
    worth = compare_without("attention", 3, lambda *step: done.append(step))
    assert built[0] == Kernels("torch", "tiles")
    assert built[-1] == Kernels("torch", "torch")
    assert worth == {
        "kernel": "attention", "seconds_with": 1.0, "seconds_without": 2.0, "ratio": 2.0
    }  # fmt: skip
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert torch.get_num_threads() == threads


def test_what_is_not_used_here_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cam.random_backbone(kernels=Kernels("torch", "torch"))
    monkeypatch.setattr(kernels, "random_backbone", lambda **_: plain)
    with pytest.raises(UsageError, match="computes without 'linear' anyway"):
        compare_without("linear", 1, lambda *_: None)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'gelu'.*linear, attention, lattice"):
        compare_without("gelu", 1, lambda *_: None)


def test_the_lattice_is_left_out_for_pydensecrf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(BackendError, match="pydensecrf"):
        compare_without("lattice", 1, lambda *_: None)
