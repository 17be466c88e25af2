"""WeCLIP's choice of attention maps, as published in code and in the paper."""

from __future__ import annotations

import pytest
import torch

from clipes.maps.rfm import kept_blocks, refined_attention

BLOCKS, PATCHES = 6, 30


def attention(seed: int) -> torch.Tensor:
    """Attention without CLS: rows sum to less than 1, as much as the block looks at patches."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(BLOCKS, PATCHES, 1 + PATCHES, generator=generator).mul_(2).softmax(-1)
    return rows[..., 1:]


def affinity(seed: int) -> torch.Tensor:
    tokens = torch.randn(PATCHES, 8, generator=torch.Generator().manual_seed(100 + seed))
    return (tokens @ tokens.T).sigmoid()


def literal(maps: torch.Tensor, other: torch.Tensor, *, absolute: bool) -> list[bool]:
    differences = [(other - one).double() for one in maps]
    sums = [float((one.abs() if absolute else one).sum()) for one in differences]
    return [value <= sum(sums) / len(sums) for value in sums]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("absolute", [False, True])
def test_blocks_are_those_of_the_sum_of_differences(seed: int, absolute: bool) -> None:
    maps, other = attention(seed), affinity(seed)
    got = kept_blocks(maps, other, absolute=absolute).tolist()
    assert got == literal(maps, other, absolute=absolute)
    assert any(got)
    assert not all(got)


def test_signed_the_choice_is_the_same_whatever_has_been_learnt() -> None:
    maps = attention(0)
    chosen = {tuple(literal(maps, affinity(seed), absolute=False)) for seed in range(20)}
    assert chosen == {tuple(kept_blocks(maps, affinity(0), absolute=False).tolist())}


def test_with_the_papers_absolute_value_what_is_learnt_decides() -> None:
    maps = torch.linspace(0.01, 0.5, BLOCKS)[:, None, None].expand(-1, PATCHES, PATCHES)
    others = [affinity(0), affinity(0) * 0.01]
    first, second = (kept_blocks(maps, other, absolute=True).tolist() for other in others)
    assert first != second
    signed = kept_blocks(maps, others[0], absolute=False).tolist()
    assert signed == kept_blocks(maps, others[1], absolute=False).tolist()


def test_what_is_kept_is_averaged_and_weighed() -> None:
    maps, other = attention(3), affinity(3)
    kept = literal(maps, other, absolute=False)
    total = sum(one for one, take in zip(maps, kept, strict=True) if take)
    expected = total / (sum(kept) + 1e-5) * other
    torch.testing.assert_close(refined_attention(maps, other, absolute=False), expected)


@pytest.mark.parametrize("absolute", [False, True])
def test_equal_blocks_are_kept_whatever_rounding_does(absolute: bool) -> None:
    maps = attention(0)[:1].repeat(BLOCKS, 1, 1)
    assert bool(kept_blocks(maps, affinity(0), absolute=absolute).all())
