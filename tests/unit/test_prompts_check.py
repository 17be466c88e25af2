"""What the check remarks on, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipes.choices import Fusion
from clipes.towers.clip_text import CONTEXT_LENGTH, tokenize
from clipes.words.check import NEAR, collisions, entries, near, spelling
from clipes.words.features import TextFeatures, unit_rows
from clipes.words.vocabulary import Vocabulary, load_vocabulary

TEMPLATES = ("a photo of a {}.",)


def words(*classes: str, background: tuple[str, ...] = (), **synonyms: tuple[str, ...]):
    return Vocabulary(classes, background, synonyms)


def spelled(vocabulary: Vocabulary, fusion: Fusion = Fusion.sentence) -> list[str]:
    return [
        ("fatal: " if remark.fatal else "") + remark.text
        for remark in spelling(vocabulary, TEMPLATES, fusion, tokenize, CONTEXT_LENGTH)
    ]


@pytest.mark.parametrize(
    ("vocabulary", "told"),
    [
        (words("keyboard", background=("Keyboard",)), "'Keyboard' is also the class 'keyboard'"),
        (words("stop sign", background=("sign",)), "'sign' is part of the class 'stop sign'"),
        (words("tree", background=("trees",)), "'trees' is also the class 'tree'"),
        (words("bus", background=("bus stop",)), "'bus stop' contains the class 'bus'"),
        (words("person", background=("people",), person=("people",)), "(synonym 'people')"),
        (words("fire-hydrant", background=("fire hydrant",)), "is also the class"),
        (words("Cat", "cat"), "classes 'Cat' and 'cat' say the same"),
        (
            words("person", "rider", person=("human",), rider=("human",)),
            "'person' (synonym 'human') and 'rider' (synonym 'human') say the same",
        ),
        (words("cat", background=("cloud", "clouds")), "'cloud' and 'clouds' say the same"),
    ],
)
def test_words_that_collide(vocabulary: Vocabulary, told: str) -> None:
    (remark,) = collisions(vocabulary)
    assert told in remark.text
    assert not remark.fatal


@pytest.mark.parametrize(
    "vocabulary",
    [
        words("car", background=("carpet",)),
        words("pottedplant", background=("plant",)),
        words("hot dog", "dog"),
        words("bus", "buss"),
    ],
)
def test_words_that_do_not(vocabulary: Vocabulary) -> None:
    assert list(collisions(vocabulary)) == []


@pytest.mark.parametrize("name", ["voc", "coco"])
def test_shipped_background_words_collide_with_no_class(name: str) -> None:
    assert list(collisions(load_vocabulary(name).widened())) == []


def test_why_coco_has_no_keyboard_and_no_sign() -> None:
    coco = load_vocabulary("coco")
    as_voc = replace(coco, background=load_vocabulary("voc").background)
    told = [remark.text for remark in collisions(as_voc)]
    assert len(told) == 2
    assert "'keyboard' is also the class 'keyboard'" in told[0]
    assert "'sign' is part of the class 'stop sign'" in told[1]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("pottedplant", "it reads 'pot ted plant'"),
        ("Kühlschrank", "beyond ASCII"),
        ("traffic_light", "written with '_'"),
        ("&nbsp;", "nothing is left"),
        ("🐈", "beyond ASCII"),
    ],
)
def test_words_that_clip_reads_badly(word: str, told: str) -> None:
    (remark,) = spelled(words(word))
    assert told in remark
    assert "fatal" not in remark
    (remark,) = spelled(words("thing", thing=(word, "item")))
    assert told in remark
    assert "(of 'thing')" in remark
    (remark,) = spelled(words("thing", background=(word,)))
    assert told in remark


def test_plain_words_are_fine() -> None:
    assert spelled(words("cat", "wine glass", "refrigerator", "aeroplane")) == []
    assert spelled(words("2024", "mp3 player")) == []


def test_what_is_too_long_for_the_tower_stops_a_run() -> None:
    many = tuple(f"cat number {k}" for k in range(30))
    long = words("cat", "dog", cat=many)
    (remark,) = spelled(long)
    assert remark.startswith("fatal: the prompt of 'cat' has ")
    assert "CLIP reads 77" in remark
    assert spelled(long, Fusion.feature) == []


def test_descriptions_are_read_as_words_are() -> None:
    said = replace(words("cat", "dog"), descriptions={"cat": ("a cat's Pfötchen", "fur " * 90)})
    first, second = spelled(said)
    assert "'a cat's Pfötchen' (of 'cat') has characters beyond ASCII" in first
    assert second.startswith("fatal: the prompt of 'cat' has 92 tokens")
    assert [entry.tokens for entry in entries(said, TEMPLATES, Fusion.cam, tokenize, None)] == [
        92,
        8,
    ]


def ring(count: int, nearness: float) -> np.ndarray:
    """Unit vectors: ``count`` equally far from each other, then one near the first."""
    basis = np.eye(count + 1)
    common = np.full(count + 1, 0.5)
    vectors = basis[:count] + common
    near_first = vectors[0] + nearness * (basis[count] - basis[0])
    return unit_rows(np.vstack([vectors, near_first]))


def test_near_is_relative_to_what_is_usual_among_the_classes() -> None:
    vectors = ring(6, 0.3)
    names = tuple("abcdef")
    usual = float(1 - vectors[0] @ vectors[1])
    distance = float(1 - vectors[0] @ vectors[6])
    assert distance < NEAR * usual
    features = TextFeatures(names, ("z",), vectors[:6], vectors[6:], "m")
    (remark,) = near(features)
    assert "'z' is near the class 'a'" in remark.text
    among_classes = TextFeatures((*names, "z"), (), vectors, vectors[:0], "m")
    (remark,) = near(among_classes)
    assert "classes 'a' and 'z'" in remark.text
    far = ring(6, 0.9)
    assert list(near(TextFeatures(names, ("z",), far[:6], far[6:], "m"))) == []


def test_background_words_may_be_near_but_not_the_same() -> None:
    vectors = ring(6, 0.5)
    other = ring(6, 0.0)
    names = tuple("abcde")
    assert list(near(TextFeatures(names, ("x",), vectors[1:6], vectors[6:], "m"))) == []
    both = np.stack([vectors[0], vectors[6]])
    assert list(near(TextFeatures(names, ("x", "y"), vectors[1:6], both, "m"))) == []
    same = np.stack([other[0], other[6]])
    (remark,) = near(TextFeatures(names, ("x", "y"), other[1:6], same, "m"))
    assert "'x' and 'y' have one vector" in remark.text


@pytest.mark.parametrize("count", [1, 2])
def test_few_classes_are_measured_against_all_words(count: int) -> None:
    vectors = ring(6, 0.3)
    names, others = tuple("abcdef"[:count]), (*"abcdef"[count:], "z")
    features = TextFeatures(names, others, vectors[:count], vectors[count:], "m")
    (remark,) = near(features)
    assert "'z' is near the class 'a'" in remark.text
    alone = TextFeatures(("a",), (), vectors[:1], vectors[:0], "m")
    assert list(near(alone)) == []


def coco_features(shared: Path) -> TextFeatures:
    coco = load_vocabulary("coco")
    classes = np.load(shared / "features" / "coco_single.npy", allow_pickle=False)[:80]
    with np.load(shared / "features" / "photo_of_a.npz", allow_pickle=False) as file:
        names = file["words"].tolist()
        known = [word for word in (*coco.background, "keyboard") if word in names]
        background = unit_rows(file["features"][[names.index(word) for word in known]])
    return TextFeatures(coco.classes, tuple(known), unit_rows(classes), background, "ViT-B-16")


def test_real_vectors_give_few_and_sensible_remarks(shared: Path) -> None:
    told = " | ".join(remark.text for remark in near(coco_features(shared)))
    assert "'bicycle' and 'motorcycle'" in told
    assert "'keyboard' is near the class 'keyboard'" in told
    assert "'railroad' is near the class 'train'" in told
    for innocent in ("'cat'", "'grass'", "'water'", "'house'", "'banana'"):
        assert innocent not in told


def test_the_table_has_a_line_for_every_word(shared: Path) -> None:
    features = coco_features(shared)
    coco = load_vocabulary("coco").as_asked(None)
    vocabulary = replace(coco, background=features.background_words)
    table = entries(vocabulary, TEMPLATES, Fusion.sentence, tokenize, features)
    assert [entry.name for entry in table] == [*vocabulary.classes, *vocabulary.background]
    by_name = {(entry.name, entry.background): entry for entry in table}
    assert by_name["cat", False].nearest == "dog"
    assert by_name["cat", False].cosine == pytest.approx(0.915, abs=2e-3)
    assert by_name["keyboard", True].nearest == "keyboard"
    assert by_name["cat", False].tokens == 8
    without = entries(vocabulary, TEMPLATES, Fusion.sentence, tokenize, None)
    assert {(entry.nearest, entry.cosine) for entry in without} == {("", 0.0)}
