"""Tokens by name: those of the blocks that the names say, on one grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer

from clipes.config import BOTH_TOWERS, IMAGENET_MEAN, IMAGENET_STD
from clipes.errors import UsageError
from clipes.towers import tokens
from clipes.towers.clip import Backbone
from clipes.towers.side_by_side import Towers
from clipes.towers.taps import Taps
from clipes.towers.tokens import ATTENTION, TowerTokens
from tests.dino_support import tiny_dino

pytestmark = pytest.mark.usefixtures("one_thread")

DIGESTS = {"clip": "a", "dino": "b"}
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def towers() -> Towers:
    torch.manual_seed(0)
    visual = VisionTransformer(64, 16, 64, 4, 1, 4.0, output_dim=16, act_layer=QuickGELU)
    clip = Backbone(visual, 100.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return Towers(clip, {"dino": tiny_dino()})


def test_tokens_are_those_of_the_blocks(towers: Towers) -> None:
    source = TowerTokens(towers, ("clip.3", "dino.2", "clip.1"), DIGESTS, 1600)
    assert source.widths == {"clip.3": 64, "dino.2": 32, "clip.1": 64}
    found = source.tokens(IMAGE)
    assert {name: one.shape for name, one in found.items()} == {
        "clip.3": (3, 4, 64),
        "dino.2": (3, 4, 32),
        "clip.1": (3, 4, 64),
    }
    pixels = towers.prepare(IMAGE, 1600)
    visual = towers.clip.visual
    kept = []
    hooks = [
        visual.transformer.resblocks[0].register_forward_hook(lambda *a: kept.append(a[2])),
        visual.transformer.resblocks[3].ln_1.register_forward_hook(lambda *a: kept.append(a[2])),
    ]
    with torch.inference_mode():
        tokens = towers.clip._embed(pixels["clip"][None], (3, 4))
        visual.transformer(tokens)
    for hook in hooks:
        hook.remove()
    for name, expected in zip(("clip.1", "clip.3"), kept, strict=True):
        torch.testing.assert_close(found[name].flatten(0, 1), expected[0, 1:], rtol=1e-3, atol=1e-4)
    expected = towers.others["dino"].encode(pixels["dino"][None])[0]
    assert torch.equal(found["dino.2"].flatten(0, 1), expected)


def test_an_image_is_seen_at_another_scale_once_it_is_shrunk(towers: Towers) -> None:
    source = TowerTokens(towers, ("clip.2", "dino.2"), DIGESTS, 1600)
    found = source.tokens(IMAGE, 2.0)
    assert {one.shape[:2] for one in found.values()} == {(5, 8)}
    pixels = towers.prepare(IMAGE, 1600, (5, 8))
    expected = source.encode({name: one[None] for name, one in pixels.items()})
    assert torch.equal(found["clip.2"], expected["clip.2"][0])
    small = TowerTokens(towers, ("clip.2",), DIGESTS, 6)
    seen = [np.prod(small.tokens(IMAGE, scale)["clip.2"].shape[:2]) for scale in (1.0, 2.0)]
    assert seen[0] <= 6 < seen[1] <= 24, "it is shrunk first; the scale is of what is left"


def test_a_closer_look_is_of_a_block_half_way_up(
    towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BOTH_TOWERS", replace(BOTH_TOWERS, finer_block=1))
    source = TowerTokens(towers, ("clip.2", "dino.2"), DIGESTS, 1600)
    found = source.tokens(IMAGE, closer=1.5)
    assert set(found) == {"clip.2", "dino.2", "dino.near", "dino.closer"}
    dino = towers.others["dino"]
    (near,) = dino.after(dino.prepare(IMAGE, (3, 4))[None], (1,))
    assert torch.equal(found["dino.near"], near[0].unflatten(0, (3, 4)))
    far = dino.closer(dino.prepare(IMAGE, (4, 6))[None], 1, BOTH_TOWERS.finer_parts)
    assert torch.equal(found["dino.closer"], far[0])
    plain = source.tokens(IMAGE)
    assert set(plain) == {"clip.2", "dino.2"}
    assert torch.equal(plain["dino.2"], found["dino.2"])


def test_attention_is_the_mean_over_the_last_blocks(towers: Towers) -> None:
    source = TowerTokens(towers, ("clip.2",), DIGESTS, 1600, attention=2)
    found = source.tokens(IMAGE, attention=True)
    assert set(found) == {"clip.2", ATTENTION}
    assert found[ATTENTION].shape == (3, 4, 12)
    pixels = towers.prepare(IMAGE, 1600)["clip"][None]
    with torch.inference_mode():
        wanted = towers.clip.encode(pixels, Taps(attention=(3, 4))).attention[0]
    torch.testing.assert_close(found[ATTENTION].flatten(0, 1), wanted)
    assert ATTENTION not in source.tokens(IMAGE)


def test_large_images_are_shrunk(towers: Towers) -> None:
    source = TowerTokens(towers, ("clip.2",), DIGESTS, 6)
    h, w, _ = source.tokens(IMAGE)["clip.2"].shape
    assert 1 <= h * w <= 6


def test_a_fingerprint_is_of_all_that_changes_tokens_of_that_name(towers: Towers) -> None:
    visual, both = towers.clip.visual, ("clip.1", "dino.12")
    first = TowerTokens(towers, both, DIGESTS, 1600).fingerprints
    assert set(first) == set(both)
    assert first["clip.1"] != first["dino.12"]
    other_colours = Towers(Backbone(visual, 100.0, IMAGENET_MEAN, IMAGENET_STD), towers.others)
    for changed, same in (
        (TowerTokens(towers, both, {"clip": "c", "dino": DIGESTS["dino"]}, 1600), ["dino.12"]),
        (TowerTokens(towers, both, {"clip": DIGESTS["clip"], "dino": "c"}, 1600), ["clip.1"]),
        (TowerTokens(other_colours, both, DIGESTS, 1600), ["dino.12"]),
        (TowerTokens(towers, both, DIGESTS, 1600, raw=True), ["dino.12"]),
        (TowerTokens(towers, both, DIGESTS, 1600, own_grids=True), ["clip.1"]),
        (TowerTokens(towers, both, DIGESTS, 900), []),
        (TowerTokens(towers, ("clip.2", *both), DIGESTS, 1600), [*both]),
    ):
        found = changed.fingerprints
        assert [name for name in both if found[name] == first[name]] == same


def test_a_line_of_pixels_has_a_patch_at_any_scale(towers: Towers) -> None:
    source = TowerTokens(towers, ("clip.2",), DIGESTS, 1600)
    assert source.tokens(IMAGE[:1], 0.05)["clip.2"].shape[:2] == (1, 1)


@pytest.mark.parametrize("name", ["clip.0", "clip.5", "clip.11"])
def test_blocks_that_a_tower_lacks_are_refused(towers: Towers, name: str) -> None:
    with pytest.raises(UsageError, match=f"a CLIP of 4 blocks has no tokens {name}"):
        TowerTokens(towers, (name,), DIGESTS, 1600)
