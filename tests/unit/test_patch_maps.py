"""Patches compared with words, against a literal version, one head and one patch at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from clipes.bench import literal
from clipes.config import CamParams, PatchParams
from clipes.maps.evidence import Evidence, first_maps
from clipes.maps.patches import compare, patch_features, strong_patches
from clipes.towers.clip import Backbone
from clipes.towers.load import load_visual
from clipes.towers.taps import Encoded, Taps
from clipes.weights import read_state_dict

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture(scope="module")
def backbone(tiny_weights) -> Backbone:
    return Backbone(load_visual(read_state_dict(tiny_weights)), 100.0, MEAN, STD)


@pytest.fixture(scope="module")
def prepared(backbone):
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    return backbone.prepare(image, 1600)[None]


def encode(backbone: Backbone, images: torch.Tensor, last: str = "inputs") -> Encoded:
    return backbone.encode(images, Taps(attention=backbone.last_blocks(3), last=last))


def units(seed: int, rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=-1)


@torch.inference_mode()
def features_literally(backbone: Backbone, image: torch.Tensor) -> list[torch.Tensor]:
    visual = backbone.visual
    block = visual.transformer.resblocks[-1]
    tokens, _ = literal.run_blocks(visual, literal.embed(visual, image))
    attn = block.attn
    projected = block.ln_1(tokens) @ attn.in_proj_weight.T + attn.in_proj_bias
    query, key, value = projected[1:].chunk(3, -1)  # patches only
    width = attn.head_dim
    mixed = torch.zeros_like(value)
    for head in range(attn.num_heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(len(value)):
            for like in (query[:, part], key[:, part]):
                weights = torch.softmax(like @ like[i] / width**0.5, 0)
                mixed[i, part] += weights @ value[:, part] / 2
    return [
        F.normalize(visual.ln_post(attn.out_proj(rows)) @ visual.proj, dim=-1)
        for rows in (value, mixed)
    ]


def test_features_against_the_plain_formula(backbone, prepared):
    encoded = encode(backbone, prepared)
    for got, expected in zip(
        patch_features(backbone, encoded.last.of(0)),
        features_literally(backbone, prepared[0]),
        strict=True,
    ):
        assert got.shape == (24, backbone.visual.proj.shape[1])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_the_shorter_pass_is_the_longer_one_cut_off(backbone, prepared):
    full, short = encode(backbone, prepared, "gradient"), encode(backbone, prepared)
    assert short.grid == full.grid
    torch.testing.assert_close(short.attention, full.attention, rtol=1e-5, atol=1e-7)
    (last,) = full.gradients
    for name in ("activations", "query", "key", "value"):
        torch.testing.assert_close(getattr(short.last.of(0), name), getattr(last, name))


def test_a_patch_that_shows_a_word_says_so():
    text, background = units(1, 2, 64), units(2, 3, 64)
    words = torch.cat([text, background])
    shown = [0, 1, 2, 4, 0, 1]  # which word each of 2 x 3 patches is
    sources, log_words = compare((words[shown], words[shown]), text, background, (2, 3), 50.0)
    np.testing.assert_allclose(sources[0].ravel(), [1, 0, 0, 0, 1, 0], atol=1e-3)
    np.testing.assert_allclose(sources[1].ravel(), [0, 1, 0, 0, 0, 1], atol=1e-3)
    probabilities = log_words.exp()
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-4)
    assert probabilities.argmax(0).tolist() == [1, 2, 0, 0, 1, 2]


def test_both_features_have_a_say():
    text, background = units(1, 1, 64), units(2, 2, 64)
    words = torch.cat([text, background])
    first, second = words[[0, 1, 1]], words[[1, 0, 1]]
    sources, _ = compare((first, second), text, background, (1, 3), 50.0)
    np.testing.assert_allclose(sources.ravel(), [1, 1, 0], atol=1e-3)


def test_first_maps_are_sources_in_boxes_spread_twice(backbone, prepared):
    sources = np.random.default_rng(3).random((2, 4, 6), dtype=np.float32)
    (attention,) = encode(backbone, prepared).attention
    spread = literal.walk_matrix(attention, 3).numpy()
    got = first_maps(
        Evidence(sources, attention), CamParams(box_threshold=0.0)
    )  # boxes hold everything above zero
    for source, found in zip(sources, got, strict=True):
        raw = spread @ spread @ source.ravel()
        expected = (raw - raw.min()) / (raw.max() - raw.min())
        np.testing.assert_allclose(found.ravel(), expected, atol=1e-3)


def test_strong_patches_are_those_beyond_doubt():
    maps = np.array([[[0.9, 0.8, 0.2, 0.5, 0.71]], [[0.1, 0.85, 0.29, 0.2, 0.1]]], np.float32)
    background, first, second = strong_patches(maps, PatchParams(strong=0.7, weak=0.3))
    assert background.tolist() == [False, False, True, False, False]
    assert first.tolist() == [True, False, False, False, True]
    assert second.tolist() == [False, True, False, False, False]
