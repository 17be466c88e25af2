"""The compiled gradient at the hidden units against the formula in double."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from clipes.clip.hidden_gradient import gradient_at_hidden
from tests.torch_threads import torch_threads


@pytest.fixture(autouse=True, params=[1, 2], ids="{} threads".format)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch_threads(request.param):
        yield


@pytest.mark.parametrize("channels", [24, 64, 256])
@pytest.mark.parametrize("tokens", [1, 37])
def test_compiled_and_plain_agree(tokens: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    shapes = [(channels,), (tokens,), (tokens, channels), (tokens, channels), (tokens,)]
    shapes += [(tokens, channels), (channels,), (channels,)]
    parts = [torch.randn(shape, generator=generator) for shape in shapes]
    direct, along, common, slope, factor, unit, offset, mean = (part.double() for part in parts)
    gradient = factor[:, None] * slope * (direct - along[:, None] * common)
    expected = gradient, (gradient * (unit - offset)).sum(1), gradient @ mean
    for given, close in (
        (parts, {"rtol": 1e-5, "atol": 1e-4}),
        ([part.double() for part in parts], {"rtol": 1e-12, "atol": 1e-12}),
    ):
        got = gradient_at_hidden(*given[:5], (given[5], given[6]), given[7])
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one.double(), other, **close)
