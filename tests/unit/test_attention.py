"""Attention by tiles is attention, whatever the number of tokens, heads and threads."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from clipes.kernels.attention import (
    attend_by_products,
    attend_by_tiles,
    split_heads,
)
from clipes.maps.attention_gradient import sum_gradients
from tests.torch_threads import torch_threads

# (tokens, heads, width of a head): less than a tile, whole tiles, a few more, CLS alone
SHAPES = [(2, 1, 64), (24, 3, 16), (97, 2, 48), (50, 12, 64), (65, 4, 32), (1, 2, 32)]


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    with torch_threads(request.param):
        yield


def projected(tokens: int, heads: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(2, tokens, 3 * heads * width, generator=generator)


@pytest.mark.parametrize(("tokens", "heads", "width"), SHAPES)
def test_tiles_attend_as_written_in_the_transformer_paper(tokens, heads, width, threads):
    x = projected(tokens, heads, width)
    total = torch.ones(2, tokens - 1, tokens - 1)
    probabilities = torch.full((2, heads, tokens - 1, tokens), torch.nan)
    mixed = attend_by_tiles(x, heads, total, probabilities)
    for image in range(2):
        query, key, value = x[image].double().view(tokens, 3, heads, width).permute(1, 2, 0, 3)
        weights = torch.softmax(query @ key.mT / width**0.5, -1)
        expected = (weights @ value).transpose(0, 1).flatten(1)
        torch.testing.assert_close(mixed[image].double(), expected, rtol=0, atol=5e-6)
        summed = 1 + weights[:, 1:, 1:].sum(0)
        torch.testing.assert_close(total[image].double(), summed, rtol=0, atol=5e-6)
        kept = probabilities[image].double()
        torch.testing.assert_close(kept, weights[:, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=2)])
def test_both_ways_do_the_same_whatever_is_wanted(wanted):
    x = projected(40, 3, 64)
    outputs = []
    for attend in (attend_by_products, attend_by_tiles):
        total = torch.zeros(2, 39, 39) if wanted[0] else None
        probabilities = torch.zeros(2, 3, 39, 40) if wanted[1] else None
        mixed = attend(x, 3, total, probabilities)
        outputs.append([mixed, *(part for part in (total, probabilities) if part is not None)])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_scores_far_apart_and_equal_ones_are_safe():
    x = projected(30, 2, 64)
    x[0] *= 100
    x[1] = 3.0
    mixed = attend_by_tiles(x, 2, None, None)
    torch.testing.assert_close(mixed, attend_by_products(x, 2, None, None), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed[1], torch.full_like(mixed[1], 3.0))


def test_a_spoilt_image_shows():
    x = projected(30, 2, 64)
    x[0, 7, 5] = torch.nan
    mixed = attend_by_tiles(x, 2, None, None)
    assert mixed[0].isnan().any()
    assert not mixed[1].isnan().any()


@pytest.mark.parametrize(("tokens", "heads", "width"), SHAPES)
def test_gradients_are_those_of_autograd(tokens, heads, width):
    given = torch.randn(3, tokens - 1, heads * width, generator=torch.Generator().manual_seed(1))
    x = projected(tokens, heads, width)[0].double().requires_grad_()
    query, key, value = split_heads(x, heads)
    attention = torch.softmax(query[:, 1:] @ key.mT / width**0.5, -1)
    mixed = attention @ value
    for dtype, rtol, atol in ((torch.float64, 1e-9, 1e-9), (torch.float32, 1e-4, 1e-4)):
        parts = [
            part.detach().to(dtype) for part in (attention, query[:, 1:], key, value, mixed, given)
        ]
        for one, sums in zip(given, sum_gradients(*parts, F.linear), strict=True):
            side_by_side = mixed.transpose(0, 1).flatten(1)
            (gradient,) = torch.autograd.grad(side_by_side, x, one.double(), retain_graph=True)
            expected = gradient[1:].sum(0).to(dtype)
            torch.testing.assert_close(sums, expected, rtol=rtol, atol=atol)


def test_the_number_of_threads_does_not_change_a_bit():
    x, results = projected(97, 3, 64), []
    for count in (1, 2, 5):
        total = torch.zeros(2, 96, 96)
        with torch_threads(count):
            results.append((attend_by_tiles(x, 3, total, None), total))
    for mixed, total in results[1:]:
        assert torch.equal(mixed, results[0][0])
        assert torch.equal(total, results[0][1])
