from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from clipes.bench import literal
from clipes.config import TagParams
from clipes.datasets import open_dataset
from clipes.datasets.base import Dataset
from clipes.errors import DatasetError
from clipes.listener import Listener
from clipes.maps.tags import choose_tags, class_scores, key_key_features
from clipes.stages.tag import Tagger
from clipes.stages.tag_file import make_tags, untagged
from clipes.towers.clip import Backbone
from clipes.towers.load import load_visual
from clipes.towers.taps import LastInput, Taps
from clipes.types import Failure
from clipes.weights import read_state_dict
from clipes.words.features import TextFeatures, unit_rows
from tests.unit.coco_support import write_image

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture(scope="module")
def backbone(tiny_weights: Path) -> Backbone:
    return Backbone(load_visual(read_state_dict(tiny_weights)), 100.0, MEAN, STD)


def last_input(backbone: Backbone, seed: int, size: tuple[int, int]) -> LastInput:
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    prepared = backbone.prepare(image, 1600)
    return backbone.encode(prepared[None], Taps(last="inputs")).last.of(0)


@pytest.fixture
def last(backbone):
    return last_input(backbone, 0, (64, 96))


@pytest.fixture
def words(backbone):
    rows = np.random.default_rng(1).standard_normal((9, backbone.visual.proj.shape[1]))
    return torch.from_numpy(unit_rows(rows[:5])), torch.from_numpy(unit_rows(rows[5:]))


def features_literally(backbone: Backbone, tokens: torch.Tensor) -> np.ndarray:
    """One head and one patch at a time, from the tokens that enter the last block."""
    block = backbone.blocks[-1]
    attn = block.attn
    normed = block.ln_1(tokens)
    projected = normed @ attn.in_proj_weight.T + attn.in_proj_bias
    _, key, value = projected.chunk(3, -1)
    width = key.shape[-1] // attn.num_heads
    mixed = torch.zeros_like(value[1:])
    for head in range(attn.num_heads):
        part = slice(head * width, (head + 1) * width)
        keys, values = key[1:, part], value[1:, part]
        for patch in range(len(keys)):
            weights = torch.softmax(keys @ keys[patch] / width**0.5, 0)
            mixed[patch, part] = (weights[:, None] * values).sum(0)
    output = backbone.visual.ln_post(attn.out_proj(mixed)) @ backbone.visual.proj
    return (output / output.norm(dim=-1, keepdim=True)).numpy()


@torch.inference_mode()
def test_patch_features_against_the_plain_formula(backbone):
    image = np.random.default_rng(2).integers(0, 256, (48, 64, 3), np.uint8)
    visual = backbone.visual
    entering, _ = literal.run_blocks(visual, literal.embed(visual, backbone.prepare(image, 1600)))
    expected = features_literally(backbone, entering)
    features = key_key_features(backbone, last_input(backbone, 2, (48, 64))).numpy()
    assert features.shape == (12, backbone.visual.proj.shape[1])
    np.testing.assert_allclose(features, expected, atol=2e-5)


def test_scores_are_means_over_the_best_patches(backbone, last, words):
    text, background = words
    features = key_key_features(backbone, last).numpy()
    logits = 100.0 * features @ np.concatenate([text, background]).T
    odds = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = (odds / odds.sum(1, keepdims=True))[:, :5]
    for share, count in ((1e-9, 1), (0.25, 6), (1.0, 24)):
        params = TagParams(patch_share=share)
        scores = class_scores(backbone, last, text, background, params)
        expected = np.sort(probabilities, 0)[-count:].mean(0)
        np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_the_order_of_the_classes_changes_no_score(backbone, last, words):
    text, background = words
    order = [3, 0, 4, 1, 2]
    scores = class_scores(backbone, last, text, background, TagParams())
    again = class_scores(backbone, last, text[order], background, TagParams())
    np.testing.assert_allclose(again, scores[order], atol=1e-6)
    assert scores.shape == (5,)
    assert (scores >= 0).all()
    assert (scores <= 1).all()


def test_a_class_that_is_a_patch_is_found(backbone, last, words):
    text, background = words
    text = torch.cat([text, key_key_features(backbone, last)[7:8]])
    scores = class_scores(backbone, last, text, background, TagParams())
    assert scores.argmax() == 5


def test_tags_are_the_scores_that_reach_the_threshold():
    scores = np.array([0.1, 0.38, 0.9, 0.379], np.float32)
    assert choose_tags(scores, np.float32(0.38)) == (2, 1)
    assert choose_tags(scores, 0.95) == ()
    assert choose_tags(scores, 0.0) == (2, 1, 3, 0)


# The label file


CLASSES = ("cat", "dining table", "a;b")
SCORES = {"one": [0.9, 0.5, 0.0], "two": [0.0, 0.1, 0.0], "three": [0.1, 0.2, 0.8]}


@pytest.fixture
def images(tmp_path: Path) -> Dataset:
    root = tmp_path / "images"
    for index, name in enumerate(SCORES):
        write_image(root / f"{name}.png", (8 + index, 9))
    return open_dataset("folder", root=root, labelled=False, classes=CLASSES)


def tag_all(data: Dataset, path: Path) -> tuple[list[str], list[Failure], object]:
    """Tag with scores that are told by the height of the image."""
    seen: list[str] = []
    told: list[Failure] = []
    names = list(SCORES)

    def tagger(image):
        seen.append(names[image.shape[0] - 8])
        return np.array(SCORES[seen[-1]], np.float32)

    todo = untagged(data.samples, path)
    choose = partial(choose_tags, threshold=0.38)
    summary = make_tags(todo, CLASSES, tagger, choose, path, Listener(report=told.append))
    return seen, told, summary


def start_of_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def labels(data: Dataset) -> dict[str, list[str]]:
    return {sample.id: [CLASSES[k] for k in sample.labels] for sample in data.samples}


def reopened(data: Dataset, path: Path) -> Dataset:
    return open_dataset("folder", root=data.root, labels=path, classes=CLASSES)


def test_tags_come_back_as_labels(images, tmp_path):
    path = tmp_path / "run/labels.csv"
    seen, told, summary = tag_all(images, path)
    assert (sorted(seen), told) == (sorted(SCORES), [])
    assert summary.done == 3
    assert path.read_text().splitlines() == [
        "image,labels,scores,picture",
        f"one.png,cat;dining table,0.90;0.50,{start_of_sha256(images.root / 'one.png')}",
        f"three.png,2,0.80,{start_of_sha256(images.root / 'three.png')}",
        f"two.png,,,{start_of_sha256(images.root / 'two.png')}",
    ]
    data = reopened(images, path).without_unlabelled()
    assert labels(data) == {"one": ["cat", "dining table"], "three": ["a;b"]}
    assert data.empty == ("two",)
    assert data.failures == ()


def test_rows_a_person_has_corrected_stay(images, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("labels;image\r\ncat|dining table;two.png\r\n;one\r\n")
    seen, _, summary = tag_all(images, path)
    assert seen == ["three"]
    assert summary.done == 1
    assert untagged(images.samples, path) == []
    assert labels(reopened(images, path).without_unlabelled()) == {
        "two": ["cat", "dining table"],
        "three": ["a;b"],
    }
    before = path.read_bytes()
    assert tag_all(images, path)[0] == []
    assert path.read_bytes() == before


def test_rows_of_images_in_folders_are_known_by_path_and_by_id(tmp_path):
    for name in ("one.png", "a/one.png", "b/one.png"):
        write_image(tmp_path / "images" / name)
    data = open_dataset("folder", root=tmp_path, labelled=False, classes=CLASSES)
    path = tmp_path / "tags.csv"
    path.write_text("image,labels\na/one.png,cat\nb_one.png,cat\n")
    assert [sample.id for sample in untagged(data.samples, path)] == ["one"]
    assert labels(reopened(data, path).without_unlabelled()) == {"a_one": ["cat"], "b_one": ["cat"]}


def test_an_unreadable_image_is_told_and_tried_again(images, tmp_path):
    path = tmp_path / "labels.csv"
    broken = images.root / "one.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    _, told, summary = tag_all(images, path)
    assert [failure.id for failure in told] == ["one"]
    assert (summary.done, len(summary.failures)) == (2, 1)
    broken.write_bytes(whole)
    assert tag_all(images, path)[0] == ["one"]
    assert set(labels(reopened(images, path).without_unlabelled())) == {"one", "three"}


@pytest.mark.parametrize("text", ["", "one.png,cat\n", "image\none.png\n", "\x00"])
def test_a_label_file_that_lost_its_columns_is_an_error(images, tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(DatasetError, match=r"labels\.csv"):
        tag_all(images, path)
    assert path.read_text() == text


def test_another_picture_of_the_same_name_is_tagged_again(images, tmp_path):
    path = tmp_path / "labels.csv"
    tag_all(images, path)
    corrected = path.read_text().replace("cat;dining table", "cat")
    path.write_text(corrected)
    assert tag_all(images, path)[0] == []
    write_image(images.root / "two.png", (8 + 2, 9))  # it looks like the third now
    seen, _, summary = tag_all(images, path)
    assert (seen, summary.done) == (["three"], 1)
    found = labels(reopened(images, path).without_unlabelled())
    assert found == {"one": ["cat"], "two": ["a;b"], "three": ["a;b"]}
    assert tag_all(images, path)[0] == []


def test_what_a_person_corrected_is_not_lost_where_another_picture_is(images, tmp_path):
    path = tmp_path / "labels.csv"
    tag_all(images, path)
    path.write_text(path.read_text().replace("cat;dining table", "cat"))
    write_image(images.root / "two.png", (8 + 2, 9))
    tag_all(images, path)
    assert labels(reopened(images, path).without_unlabelled())["one"] == ["cat"]


def test_a_tagger_scores_any_image(backbone):
    rows = unit_rows(np.random.default_rng(3).standard_normal((5, backbone.visual.proj.shape[1])))
    text = TextFeatures(("a", "b", "c"), ("x", "y"), rows[:3], rows[3:], "tiny")
    tagger = Tagger(backbone, text, TagParams())
    for size in ((1, 1), (17, 300), (64, 64)):
        scores = tagger(np.full((*size, 3), 90, np.uint8))
        assert scores.shape == (3,)
        assert np.isfinite(scores).all()
