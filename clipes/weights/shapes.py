"""Whether a tower's tensors are all there and have the shapes that follow from a few of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from clipes.errors import WeightsError

Refusal: TypeAlias = Callable[[str], WeightsError]
"""Makes the error of a reason."""


def checked(
    state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], refuse: Refusal
) -> dict[str, torch.Tensor]:
    """Return the tensors that ``shapes`` names if all are there and have those shapes.

    Raises:
        WeightsError: One is missing, of another shape, not floating, or claims more than it has.
    """
    result = {}
    for key, shape in shapes.items():
        tensor = state.get(key)
        if tensor is None:
            raise refuse(f"{key} is missing")
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            found = f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")
            raise refuse(f"{key} is {found}, not {shape} of a floating type")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise refuse(f"{key} claims more values than it has")
        result[key] = tensor
    return result


def dims(
    state: Mapping[str, torch.Tensor], key: str, count: int, refuse: Refusal
) -> tuple[int, ...]:
    """Return the shape of a tensor from which the others' shapes follow.

    Raises:
        WeightsError: It is missing, or has not ``count`` dimensions.
    """
    if key not in state:
        raise refuse(f"{key} is missing")
    shape = tuple(state[key].shape)
    if len(shape) != count:
        raise refuse(f"{key} has shape {shape}, not {count} dimensions")
    return shape


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a LayerNorm of that name."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear_shapes(name: str, into: int, out: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a linear layer of that name, from ``into`` to ``out`` channels."""
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
