"""Where to compute."""

from __future__ import annotations

import torch

from clipes.errors import UsageError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device to compute on; of several GPUs, that of the local rank.

    Raises:
        UsageError: It is unknown or not here.
    """
    if name in ("auto", "cuda"):
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        if name == "auto":
            return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device '{name}'", "use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device '{name}': no CUDA device here", "use --device cpu")
    return device
