"""Devices, and how a process shares its threads and keeps its memory."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from clipes.device import batch_size, choose_device, share_processor
from clipes.errors import UsageError
from tests.torch_threads import torch_threads


@pytest.fixture
def four_threads():
    with torch_threads(4):
        yield


@pytest.mark.parametrize(
    ("device", "asked", "workers", "threads"),
    [("cpu", None, 4, 1), ("cpu", 1, 1, 4), ("cpu", 3, 3, 1), ("cpu", 9, 9, 1), ("cuda", 2, 2, 2)],
)
def test_threads_are_divided_among_images(device, asked, workers, threads, four_threads):
    assert share_processor(torch.device(device), asked) == workers
    assert torch.get_num_threads() == threads


def test_a_gpu_is_fed_by_several(four_threads):
    assert share_processor(torch.device("cuda"), None) == 4
    torch.set_num_threads(64)
    assert share_processor(torch.device("cuda"), None) == 16
    torch.set_num_threads(1)  # as torchrun leaves it
    assert share_processor(torch.device("cuda"), None) == 4


def test_only_a_gpu_gets_several_images_together():
    assert batch_size(torch.device("cpu"), None) == 1
    assert batch_size(torch.device("cuda"), None) > 1
    assert batch_size(torch.device("cpu"), 5) == batch_size(torch.device("cuda"), 5) == 5


@pytest.mark.parametrize("name", ["nonsense", "cuda:x"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(UsageError, match="unknown device"):
        choose_device(name)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is Linux's")
def test_memory_is_used_again():
    """Large arrays made and freed again and again fault their pages in only once."""
    code = (
        "import resource, numpy as np\n"
        "from clipes.device import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "for turn in range(20):\n"
        "    if turn == 2: before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    parts = [np.ones(4_000_000 // 4, np.float32) for _ in range(5)]\n"
        "    del parts\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = int(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    )
    pages = 18 * 5 * 4_000_000 // resource.getpagesize()
    assert faults < pages / 4
