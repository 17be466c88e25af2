"""Zero-shot tags: what an image says, what a run makes of it, and the file they go into."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clipes.bench import literal
from clipes.config import TagParams
from clipes.datasets import open_dataset
from clipes.datasets.base import Dataset
from clipes.disk.images import read_image
from clipes.errors import DatasetError
from clipes.maps.tag_odds import class_probabilities, looks_odds, mixture_odds
from clipes.maps.tags import (
    Candidates,
    Tagger,
    best_mean,
    cut_out,
    key_key_features,
    log_odds,
    mean_shown,
)
from clipes.run.folder import Run
from clipes.run.origin import Picture
from clipes.stages.tag import choose_tags
from clipes.stages.tag_candidates import is_kept, keep, kept
from clipes.stages.tag_file import Tagged, add_tags, untagged
from clipes.towers.clip import Backbone
from clipes.towers.load import load_visual
from clipes.towers.side_by_side import DINO, Towers
from clipes.towers.taps import LastInput, Taps
from clipes.weights import read_state_dict
from clipes.words.features import TextFeatures, unit_rows
from tests.dino_support import tiny_dino
from tests.unit.coco_support import write_image

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture(scope="module")
def backbone(tiny_weights: Path) -> Backbone:
    return Backbone(load_visual(read_state_dict(tiny_weights)), 100.0, MEAN, STD)


@pytest.fixture(scope="module")
def towers(backbone: Backbone) -> Towers:
    return Towers(backbone, {DINO: tiny_dino()})


def last_input(backbone: Backbone, seed: int, size: tuple[int, int]) -> LastInput:
    prepared = backbone.prepare(noise(seed, size), 1600)
    return backbone.encode(prepared[None], Taps(last="inputs")).last.of(0)


def noise(seed: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def words_of(backbone: Backbone, classes: int = 5, background: int = 4) -> TextFeatures:
    shape = (classes + background, backbone.visual.proj.shape[1])
    rows = unit_rows(np.random.default_rng(1).standard_normal(shape))
    names = tuple(f"c{k}" for k in range(classes)), tuple(f"b{k}" for k in range(background))
    return TextFeatures(*names, rows[:classes], rows[classes:], "tiny")


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


def test_the_best_patches_count():
    probabilities = torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.3, 0.4], [0.7, 0.0]])
    for share, expected in ((1e-9, [0.7, 0.9]), (0.5, [0.6, 0.65]), (1.0, [0.4, 0.375])):
        np.testing.assert_allclose(best_mean(probabilities, share), expected, rtol=1e-6)


def test_log_odds_are_finite():
    odds = log_odds(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    np.testing.assert_allclose(odds[1:3], [np.log(1 / 3), 0.0], atol=1e-6)
    assert -12 < odds[0] < -11
    assert 11 < odds[3] < 12


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (slice(4, 6), slice(4, 6), (slice(26, 74), slice(26, 74))),  # the smallest box
        (slice(2, 8), slice(3, 7), (slice(2, 98), slice(2, 98))),  # 60 x 40, with margin 96
        (slice(0, 1), slice(11, 12), (slice(0, 48), slice(72, 120))),  # in a corner
        (slice(0, 10), slice(0, 12), (slice(0, 100), slice(0, 120))),  # all of it
    ],
)
def test_a_box_is_cut_out_with_its_surroundings(rows, columns, expected):
    image = noise(0, (100, 120))
    shown = np.full((10, 12), 0.4, np.float32)
    shown[rows, columns] = 0.9
    found = cut_out(image, shown, 0.3)
    np.testing.assert_array_equal(found, image[expected])


def test_a_cut_out_of_a_tiny_image_is_the_image():
    image = noise(0, (1, 3))
    np.testing.assert_array_equal(cut_out(image, np.ones((1, 1), np.float32), 0.1), image)


def test_regions_are_weighted_means():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    maps = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.2, 0.6]])
    found = mean_shown(tokens, maps, 0.8)
    np.testing.assert_allclose(found, [[0.9 / 1.7, 0.8 / 1.7], [5.0, 5.0]], rtol=1e-6)


def test_what_an_image_says_by_the_plain_formulas(towers):
    """Every look once more, one class at a time."""
    backbone, params = towers.clip, TagParams(candidates=3)
    text = words_of(backbone)
    image = noise(4, (96, 128))
    said = Tagger(towers, text, params)(image)
    vectors = np.concatenate([text.class_vectors, text.background_vectors])

    def odds(features: np.ndarray) -> np.ndarray:
        logits = 100.0 * features @ vectors.T
        return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    side = backbone.visual.grid_size[0]

    def feature(part: np.ndarray) -> np.ndarray:
        pixels = backbone.prepare(part, 0, (side, side))[None]
        token = backbone.encode(pixels, Taps(tokens=(backbone.depth,))).tokens[backbone.depth]
        projected = backbone.visual.ln_post(token[0, 0]) @ backbone.visual.proj
        return (projected / projected.norm()).numpy()

    assert said.labels.shape == (3,)
    assert (np.diff(said.patches) <= 0).all()
    by_image = log_odds(torch.from_numpy(odds(feature(image)))).numpy()
    for label, patches, words in zip(said.labels, said.patches, said.words, strict=True):
        by_box = (words - 0.5 * patches - 0.12 * by_image[label]) / 0.25
        assert -12 < by_box < 12
    assert said.regions.shape == (3, 32)
    assert said.background.shape == (32,)
    assert said.regions.dtype == said.background.dtype == np.float16


def test_the_order_of_the_classes_changes_nothing(towers):
    text, order = words_of(towers.clip), [3, 0, 4, 1, 2]
    other = replace(text, class_vectors=text.class_vectors[order])
    image = noise(5, (64, 64))
    first, second = (Tagger(towers, one, TagParams(candidates=2))(image) for one in (text, other))
    np.testing.assert_array_equal(np.array(order)[second.labels], first.labels)
    np.testing.assert_allclose(second.words, first.words, atol=1e-4)
    np.testing.assert_allclose(second.regions, first.regions, atol=1e-2)


def test_a_class_that_is_the_image_comes_first(towers):
    image = noise(6, (64, 96))
    text = words_of(towers.clip)
    features = key_key_features(towers.clip, last_input(towers.clip, 6, (64, 96)))
    vectors = text.class_vectors.copy()
    vectors[2] = unit_rows(features.mean(0, keepdim=True).numpy())[0]
    said = Tagger(towers, replace(text, class_vectors=vectors), TagParams())(image)
    assert said.labels[0] == 2
    assert said.patches[0] > 0


def test_any_image_says_something(towers):
    tagger = Tagger(towers, words_of(towers.clip, classes=3), TagParams())
    for size in ((1, 1), (17, 300), (64, 64)):
        said = tagger(np.full((*size, 3), 90, np.uint8))
        assert sorted(said.labels) == [0, 1, 2]
        assert all(np.isfinite(value).all() for value in vars(said).values())


# What a run makes of it


def say(
    rng: np.random.Generator, shown: np.ndarray, words: np.ndarray, looks: np.ndarray
) -> Candidates:
    """An image whose words are given, and whose regions are what its classes look like."""
    regions = np.where(shown[:, None], looks[1:], looks[0]) + rng.normal(0, 0.3, looks[1:].shape)
    background = looks[0] + rng.normal(0, 0.3, looks.shape[1])
    parts = (words.astype(np.float32), regions.astype(np.float16), background.astype(np.float16))
    return Candidates(np.arange(len(words)), words.astype(np.float32), *parts)


def many(count: int, seed: int = 0) -> tuple[list[Candidates], np.ndarray]:
    """Images of four classes; the word of the first answers to anything, of the last to little."""
    rng = np.random.default_rng(seed)
    shown = rng.random((count, 4)) < 0.3
    words = np.where(shown, 1.5, -3.0) + np.array([2.0, 0, 0, -2.0]) + rng.normal(0, 1, shown.shape)
    looks = rng.normal(0, 1, (5, 12))
    return [say(rng, a, b, looks) for a, b in zip(shown, words, strict=True)], shown


def literally(
    images: list[Candidates], sure: np.ndarray, classes: int, params: TagParams
) -> np.ndarray:
    """The discriminant of each image, from the lists of the others' regions."""
    shown = [(i, 0, one.background) for i, one in enumerate(images)]
    shown += [
        (i, one.labels[k] + 1, one.regions[k])
        for i, one in enumerate(images)
        for k in np.flatnonzero(sure[i])
    ]
    every = {c: [x.astype(float) for _, d, x in shown if d == c] for c in range(classes + 1)}
    rest = np.concatenate([np.array(part) - np.mean(part, 0) for part in every.values() if part])
    within = rest.T @ rest / len(rest)
    within += params.ridge * np.trace(within) / len(within) * np.eye(len(within))
    inverse = np.linalg.inv(within)
    found = np.zeros(sure.shape)
    for i, one in enumerate(images):
        others = [
            [x.astype(float) for j, d, x in shown if d == c and j != i] for c in range(classes + 1)
        ]
        for k, label in enumerate(one.labels):
            scores = []
            for part in others:
                mean = np.mean(part, 0) if part else None
                score = 0.0
                if mean is not None:
                    nothing = np.mean(others[0], 0)
                    token = one.regions[k].astype(float)
                    score = token @ inverse @ mean - mean @ inverse @ mean / 2
                    score -= token @ inverse @ nothing - nothing @ inverse @ nothing / 2
                    score *= params.looks_scale * len(part) / (len(part) + params.few)
                scores.append(score)
            mine = scores.pop(label + 1)
            found[i, k] = params.looks_weight * (mine - np.log(np.exp(scores).sum()))
    return found


def test_looks_are_those_of_other_images():
    images, shown = many(12)
    shown[:, 2] = False
    shown[3, 2] = True  # known from one image, which itself cannot be told by it
    found = looks_odds(images, shown, 6, TagParams())
    np.testing.assert_allclose(found, literally(images, shown, 6, TagParams()), atol=1e-8)


def test_images_that_all_look_the_same_say_nothing_by_it():
    image = Candidates(np.arange(2), *np.zeros((2, 2), np.float32), np.ones((2, 3)), np.ones(3))
    found = looks_odds([image, image], np.ones((2, 2), bool), 2, TagParams())
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], found[1])


def test_each_class_parts_where_its_own_scores_do():
    rng = np.random.default_rng(0)
    shown = rng.random((300, 3)) < 0.25
    scores = np.where(shown, 2.0, -4.0) + np.array([3.0, 0.0, -3.0]) + rng.normal(0, 1, (300, 3))
    labels = np.tile(np.arange(3), (300, 1))
    found = mixture_odds(scores, labels, TagParams()) > 0
    assert (found == shown).mean() > 0.98
    best = max(((scores > level) == shown).mean() for level in np.linspace(-8, 8, 81))
    assert best < 0.93  # no threshold for all does


def test_odds_never_fall_as_scores_rise():
    rng = np.random.default_rng(1)
    scores = np.sort(np.where(rng.random((200, 1)) < 0.5, rng.normal(1, 3), -4) * np.ones((200, 2)))
    scores = np.sort(scores + rng.normal(0, 2, scores.shape), axis=0)
    labels = np.tile(np.arange(2), (200, 1))
    odds = mixture_odds(scores, labels, TagParams())
    far = np.concatenate([odds[:20], odds[-20:]]) > 0
    assert not far[:20].any()
    assert far[20:].all()


def test_of_a_few_images_what_is_expected_stands():
    odds = mixture_odds(np.array([[3.0, -6.0]]), np.array([[0, 1]]), TagParams())
    assert odds[0, 0] > 0 > odds[0, 1]


def test_a_run_knows_more_than_its_words():
    images, shown = many(200)
    words = np.stack([image.words for image in images])
    found = class_probabilities(images, 4, TagParams())
    assert found.shape == (200, 4)
    assert ((found >= 0) & (found <= 1)).all()
    best = max(((words > level) == shown).mean() for level in np.linspace(-8, 8, 81))
    assert ((found > 0.5) == shown).mean() > best + 0.04


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_of_a_few_images_is_decided(count):
    images, _ = many(count)
    found = class_probabilities(images, 4, TagParams())
    assert np.isfinite(found).all()


def test_tags_are_the_classes_that_reach_the_threshold():
    labels = np.array([4, 1, 7])
    assert choose_tags(labels, np.array([0.9, 0.4, 0.399]), 0.4) == {4: 0.9, 1: 0.4}
    assert choose_tags(labels, np.zeros(3), 0.4) == {}


# What is kept of an image


@pytest.fixture
def one(tmp_path: Path) -> tuple[Run, Dataset, Candidates]:
    root = tmp_path / "images"
    write_image(root / "one.png", (8, 9))
    data = open_dataset("folder", root=root, labelled=False, classes=("cat",))
    return Run(tmp_path / "run"), data, many(1)[0][0]


def test_what_an_image_said_is_kept(one):
    run, data, said = one
    (sample,) = data.samples
    assert kept(run, "one", 4) is None
    keep(run, "one", said, Picture.of(sample.image).sha256)
    found = kept(run, "one", 4)
    for name, value in vars(said).items():
        np.testing.assert_array_equal(getattr(found.candidates, name), value)
    assert is_kept(run, sample, 4)
    assert not is_kept(run, sample, 3)  # asked for more of them
    write_image(sample.image, (5, 5))
    assert not is_kept(run, sample, 4)


@pytest.mark.parametrize("damage", ["cut", "text", "missing", "shape", "kind"])
def test_a_damaged_file_counts_as_absent(one, damage):
    run, _, said = one
    wrong = {
        "shape": replace(said, regions=said.regions[1:]),
        "kind": replace(said, labels=said.labels.astype(np.float32)),
    }
    keep(run, "one", wrong.get(damage, said), "")
    path = run.candidates_path("one")
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "text":
        path.write_text("no archive")
    elif damage == "missing":
        np.savez(path, labels=said.labels)
    assert kept(run, "one", 4) is None


# The label file


CLASSES = ("cat", "dining table", "a;b")
SCORES = {"one": [0.9, 0.5, 0.0], "two": [0.0, 0.1, 0.0], "three": [0.1, 0.2, 0.8]}


@pytest.fixture
def images(tmp_path: Path) -> Dataset:
    root = tmp_path / "images"
    for index, name in enumerate(SCORES):
        write_image(root / f"{name}.png", (8 + index, 9))
    return open_dataset("folder", root=root, labelled=False, classes=CLASSES)


def tag_all(data: Dataset, path: Path) -> list[str]:
    """Tag with scores that are told by the height of the image."""
    seen: list[str] = []
    names, tagged = list(SCORES), []
    for sample in untagged(data.samples, path):
        seen.append(names[read_image(sample.image).shape[0] - 8])
        tags = choose_tags(np.arange(3), np.array(SCORES[seen[-1]]), 0.38)
        tagged.append(Tagged(sample, Picture.of(sample.image).sha256, tags))
    add_tags(path, tagged, CLASSES)
    return seen


def start_of_sha256(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def labels(data: Dataset) -> dict[str, list[str]]:
    return {sample.id: [CLASSES[k] for k in sample.labels] for sample in data.samples}


def reopened(data: Dataset, path: Path) -> Dataset:
    return open_dataset("folder", root=data.root, labels=path, classes=CLASSES)


def test_tags_come_back_as_labels(images, tmp_path):
    path = tmp_path / "run/labels.csv"
    assert sorted(tag_all(images, path)) == sorted(SCORES)
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
    assert tag_all(images, path) == ["three"]
    assert untagged(images.samples, path) == []
    assert labels(reopened(images, path).without_unlabelled()) == {
        "two": ["cat", "dining table"],
        "three": ["a;b"],
    }
    before = path.read_bytes()
    assert tag_all(images, path) == []
    assert path.read_bytes() == before


@pytest.mark.parametrize("stated", ["1.23457E+15", "sha256:{}", "{}", ""])
def test_a_row_whose_picture_a_spreadsheet_spoilt_stays(images, tmp_path, stated):
    path, digits = tmp_path / "labels.csv", start_of_sha256(images.root / "one.png")[7:]
    path.write_text(
        f'"image","labels","picture"\n"one.png","dining table",{stated.format(digits)}\n'
    )
    assert "one" not in tag_all(images, path)
    assert labels(reopened(images, path))["one"] == ["dining table"]
    other = digits[::-1]
    path.write_text(f"image,labels,picture\none.png,dining table,sha256:{other}\n")
    assert "one" in tag_all(images, path)


def test_digits_alone_that_a_spreadsheet_may_have_rounded_say_nothing(images, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(
        "image,labels,picture\none.png,cat,1234567890123460\ntwo.png,,123456789012346a\n"
    )
    assert tag_all(images, path) == ["three", "two"]


def test_columns_of_a_persons_own_stay(images, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text('"Image","checked by","","labels",""\none.png,ann,1,cat,2\ntwo,bea\n')
    assert tag_all(images, path) == ["three"]
    assert path.read_text().splitlines() == [
        "Image,checked by,,labels,,scores,picture",
        "one.png,ann,1,cat,2",
        "two,bea",
        f"three.png,,,2,,0.80,{start_of_sha256(images.root / 'three.png')}",
    ]
    assert tag_all(images, path) == []


def test_rows_of_images_in_folders_are_known_by_path_and_by_id(tmp_path):
    for name in ("one.png", "a/one.png", "b/one.png"):
        write_image(tmp_path / "images" / name)
    data = open_dataset("folder", root=tmp_path, labelled=False, classes=CLASSES)
    path = tmp_path / "tags.csv"
    path.write_text("image,labels\na/one.png,cat\nb_one.png,cat\n")
    assert [sample.id for sample in untagged(data.samples, path)] == ["one"]
    assert labels(reopened(data, path).without_unlabelled()) == {"a_one": ["cat"], "b_one": ["cat"]}


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
    assert tag_all(images, path) == []
    write_image(images.root / "two.png", (8 + 2, 9))  # it looks like the third now
    assert tag_all(images, path) == ["three"]
    found = labels(reopened(images, path).without_unlabelled())
    assert found == {"one": ["cat"], "two": ["a;b"], "three": ["a;b"]}
    assert tag_all(images, path) == []


def test_what_a_person_corrected_is_not_lost_where_another_picture_is(images, tmp_path):
    path = tmp_path / "labels.csv"
    tag_all(images, path)
    path.write_text(path.read_text().replace("cat;dining table", "cat"))
    write_image(images.root / "two.png", (8 + 2, 9))
    tag_all(images, path)
    assert labels(reopened(images, path).without_unlabelled())["one"] == ["cat"]
