"""A pass leaves behind what is asked for, as the literal walk has it, and does no more."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer

from clipes.bench import literal
from clipes.towers.clip import Backbone
from clipes.towers.taps import Encoded, Taps

pytestmark = pytest.mark.usefixtures("one_thread")

DEPTH, HALF = 5, (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    visual = VisionTransformer(64, 16, 64, DEPTH, 4, 4.0, output_dim=32, act_layer=QuickGELU)
    return Backbone(visual, 100.0, HALF, HALF)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def walks(backbone, images) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Tokens after, and attention of, each block, image by image."""
    return [walk(backbone, image) for image in images]


@torch.inference_mode()
def walk(backbone: Backbone, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    # The literal walk ends with what enters the last of the blocks; so one more leads past each.
    blocks = [*backbone.blocks, deepcopy(backbone.blocks[0])]
    embedded = literal.embed(backbone.visual, image)
    after = []
    for count in range(2, DEPTH + 2):
        some = SimpleNamespace(transformer=SimpleNamespace(resblocks=blocks[:count]))
        tokens, maps = literal.run_blocks(some, embedded)
        after.append(tokens)
    return after, [attention[1:, 1:] for attention in maps[:DEPTH]]


@pytest.mark.parametrize("last", ["", "inputs", "gradient"])
def test_tokens_of_any_block_are_those_of_the_literal_walk(backbone, images, walks, last):
    encoded = backbone.encode(images, Taps(tokens=(1, 3, DEPTH), last=last))
    assert sorted(encoded.tokens) == [1, 3, DEPTH]
    for number, tokens in encoded.tokens.items():
        for image, (after, _) in zip(tokens, walks, strict=True):
            torch.testing.assert_close(image, after[number - 1], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("asked", [(2,), (4, DEPTH), (DEPTH, 1, 3), tuple(range(1, DEPTH + 1))])
@pytest.mark.parametrize("last", ["", "inputs", "gradient"])
def test_attention_is_the_mean_of_blocks_or_that_of_each(backbone, images, walks, asked, last):
    mean = backbone.encode(images, Taps(attention=asked, last=last)).attention
    each = backbone.encode(images, Taps(attention=asked, each=True, last=last)).attention
    assert each.shape == (2, len(asked), 12, 12)
    for image, (_, maps) in enumerate(walks):
        expected = torch.stack([maps[number - 1] for number in sorted(asked)])
        torch.testing.assert_close(each[image], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mean[image], expected.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("last", ["inputs", "gradient"])
def test_other_taps_do_not_change_what_the_last_block_leaves(backbone, images, last):
    def left(**more: tuple[int, ...]) -> list[torch.Tensor]:
        encoded = backbone.encode(images, Taps(last=last, **more))
        parts = [encoded.last] if last == "inputs" else encoded.gradients
        return [getattr(part, name) for part in parts for name in ("activations", "query", "value")]

    alone = left()
    for some, same in zip(alone, left(tokens=(2, DEPTH), attention=(DEPTH,)), strict=True):
        torch.testing.assert_close(some, same, rtol=1e-5, atol=1e-6)


def is_there(encoded: Encoded, name: str) -> bool:
    if name in ("tokens", "gradients"):
        return bool(getattr(encoded, name))
    try:
        getattr(encoded, name)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("taps", "there"),
    [
        (Taps(), ""),
        (Taps(tokens=(DEPTH,)), "tokens"),
        (Taps(attention=(DEPTH,)), "attention"),
        (Taps(attention=(2,), each=True), "attention"),
        (Taps(last="inputs"), "last"),
        (Taps(last="gradient"), "gradients"),
    ],
)
def test_what_is_not_asked_for_is_not_there(backbone, images, taps, there):
    encoded = backbone.encode(images, taps)
    names = ("tokens", "attention", "gradients", "last")
    assert {name for name in names if is_there(encoded, name)} == ({there} - {""})
    if there != "last":
        with pytest.raises(ValueError, match="the taps did not ask for 'last'"):
            _ = encoded.last


LAST = DEPTH - 1  # whole blocks before the last one


@pytest.mark.parametrize(
    ("taps", "begun", "whole", "attentions"),
    [
        (Taps(), 0, 0, 0),
        (Taps(tokens=(2,)), 2, 2, 0),
        (Taps(attention=(3,)), 3, 2, 1),
        (Taps(tokens=(3,), attention=(1, 3)), 3, 3, 2),
        (Taps(tokens=(1,), attention=(DEPTH,)), DEPTH, LAST, 1),
        (Taps(tokens=(DEPTH,), attention=(DEPTH,)), DEPTH, DEPTH, 1),
        (Taps(last="inputs"), DEPTH, LAST, 0),
        (Taps(attention=(2, DEPTH), last="inputs"), DEPTH, LAST, 2),
    ],
)
def test_nothing_is_computed_that_is_not_asked_for(
    backbone, images, taps, begun, whole, attentions, monkeypatch
):
    ran: dict[str, int] = {"ln_1": 0, "ln_2": 0}
    sums: list[object] = []
    attend = backbone.attend

    def count(name: str) -> None:
        ran[name] += 1

    def spy(projected: torch.Tensor, heads: int, total: object, attention: object) -> object:
        sums.append(total)
        return attend(projected, heads, total, attention)

    monkeypatch.setattr(backbone, "attend", spy)
    hooks = [
        getattr(block, name).register_forward_hook(lambda *_, name=name: count(name))
        for block in backbone.blocks
        for name in ran
    ]
    backbone.encode(images, taps)
    for hook in hooks:
        hook.remove()
    assert ran == {"ln_1": begun, "ln_2": whole}
    assert sum(total is not None for total in sums) == attentions


@pytest.mark.parametrize("taps", [Taps(tokens=(0,)), Taps(attention=(2, DEPTH + 1))])
def test_a_block_that_is_not_there_is_refused(backbone, images, taps):
    with pytest.raises(ValueError, match="blocks are 1 to 5, not"):
        backbone.encode(images, taps)


def test_the_last_blocks_are_all_where_there_are_fewer(backbone):
    assert backbone.last_blocks(2) == (4, 5)
    assert backbone.last_blocks(8) == (1, 2, 3, 4, 5)


def test_a_batch_gives_what_its_images_give_alone(backbone, images):
    taps = Taps(tokens=(2,), attention=(3, 4), last="inputs")
    together = backbone.encode(images, taps)
    for number, image in enumerate(images):
        alone = backbone.encode(image[None], taps)
        pairs = [
            (together.tokens[2], alone.tokens[2]),
            (together.attention, alone.attention),
            (together.last.key, alone.last.key),
        ]
        for both, one in pairs:
            np.testing.assert_allclose(both[number], one[0], rtol=1e-4, atol=1e-5)
