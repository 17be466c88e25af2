"""Preset ``reference`` against what the published code computed (see docs/weights.md).

The numbers were made by running linyq2117/CLIP-ES in fp32 on synthetic weights and four VOC images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from clipes.config import get_preset
from clipes.disk.images import read_image
from clipes.maps.affinity import box_mask, propagate, sinkhorn, spread
from clipes.maps.gradcam import channel_weights, class_probabilities, softmax_gradcam
from clipes.masks.pseudo import upsample
from clipes.towers.clip import Backbone
from clipes.towers.clip_text import encode_prompts
from clipes.towers.load import load_text, load_visual
from clipes.towers.taps import Taps
from clipes.weights import read_state_dict, resolve
from clipes.words.vocabulary import load_vocabulary

IMAGES = ("2007_000364", "2007_000733", "2007_000836", "2007_001149")
PARAMS = get_preset("reference").cam


@dataclass
class Model:
    backbone: Backbone
    prompts: np.ndarray
    golden: Path


def load(weights: Path, golden: Path) -> Model:
    state = read_state_dict(weights)
    recipe = resolve(str(weights)).recipe
    backbone = Backbone(
        load_visual(state),
        float(state["logit_scale"].exp()),
        recipe.mean,
        recipe.std,
        fp16_positions=PARAMS.fp16_positions,
    )
    prompts = encode_prompts(load_text(state), load_vocabulary("voc").prompts())
    return Model(backbone, prompts, golden)


@pytest.fixture(scope="session")
def tiny(golden_tiny_weights: Path, shared: Path) -> Model:
    return load(golden_tiny_weights, shared / "golden" / "tiny")


@pytest.fixture(scope="session")
def full(golden_full_weights: Path, shared: Path) -> Model:
    return load(golden_full_weights, shared / "golden" / "vit-b-16")


@pytest.fixture(params=["tiny", pytest.param("full", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Model:
    return request.getfixturevalue(request.param)


def test_text_features(model: Model) -> None:
    expected = np.load(model.golden / "text.npz", allow_pickle=False)
    both = np.concatenate([expected["fg"], expected["bg"]])
    np.testing.assert_allclose(model.prompts, both, atol=2e-6)


@pytest.mark.parametrize("image_id", IMAGES)
def test_maps(model: Model, image_id: str, shared: Path) -> None:
    want = np.load(model.golden / f"{image_id}.npz", allow_pickle=False)
    keys = want["keys"]
    text = torch.from_numpy(model.prompts[keys])
    background = torch.from_numpy(model.prompts[20:])
    image = read_image(shared / "data" / "voc_sample" / "JPEGImages" / f"{image_id}.jpg")
    backbone = model.backbone
    prepared = backbone.prepare(image, PARAMS.max_patches)
    taps = Taps(attention=backbone.last_blocks(PARAMS.affinity_blocks), last="gradient")
    encoded = backbone.encode(prepared[None], taps)
    (last,), (attention,) = encoded.gradients, encoded.attention

    probs = class_probabilities(last.feature, text, background, backbone.logit_scale)
    np.testing.assert_allclose(probs[: len(keys)].numpy(), want["probs"], rtol=1e-5)
    weights = channel_weights(backbone, last, text, background).numpy()
    largest = np.abs(want["channel_weights"]).max()
    np.testing.assert_allclose(weights, want["channel_weights"], atol=1e-5 * largest)

    cam = softmax_gradcam(backbone, last, encoded.grid, text, background)
    np.testing.assert_allclose(cam, want["cam"], atol=1e-5)
    np.testing.assert_allclose(attention[:8].numpy(), want["attention_rows"], atol=1e-6)

    walk = sinkhorn(attention, PARAMS.sinkhorn_iterations)
    eye = torch.eye(len(attention))[:, :8]
    np.testing.assert_allclose(walk.step(eye).T.numpy(), want["walk_rows"], atol=1e-6)
    boxes = [box_mask(c, PARAMS.box_threshold, last_row_in_box=False) for c in cam]
    np.testing.assert_array_equal(boxes, want["box_mask"])
    refined = spread(walk, cam, PARAMS, PARAMS.walk_power)
    np.testing.assert_allclose(refined, want["refined"], rtol=1e-4, atol=1e-6)

    final = propagate(walk, cam, PARAMS, PARAMS.walk_power)
    full_size = upsample(final, image.shape[:2])[:, ::7, ::7]
    np.testing.assert_allclose(full_size, want["upsampled_stride7"].astype(np.float32), atol=1e-3)
