"""Vectors of words: their file format, where they come from, and that order changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer

from clipes.choices import Fusion
from clipes.errors import VocabularyError
from clipes.towers.clip_text import CONTEXT_LENGTH, encode_prompts, tokenize
from clipes.towers.load import load_text
from clipes.weights import Weights, read_state_dict, resolve
from clipes.words.encode import PromptEncoder, fingerprint, from_given, text_features
from clipes.words.features import (
    TextFeatures,
    load_text_features,
    save_text_features,
    stand_in,
    unit_rows,
)
from clipes.words.vocabulary import Vocabulary, load_vocabulary
from tests.unit.clip_support import quiet

VOCABULARY = Vocabulary(
    ("cat", "person", "wine glass"), ("sky", "grass"), {"person": ("people", "human")}
)


def unexpected(message: str) -> None:
    raise AssertionError(message)


def arrays() -> dict[str, np.ndarray]:
    """A file as a user may write it: background rows anywhere, any length, half precision."""
    rng = np.random.default_rng(0)
    return {
        "names": np.array(["sky", "cat", "grass", "dog"]),
        "features": (3 * rng.standard_normal((4, 8))).astype(np.float16),
        "background": np.array([True, False, True, False]),
        "model": np.array("ViT-B-16"),
    }


def test_the_format_takes_rows_in_any_order_and_of_any_length(tmp_path: Path) -> None:
    given = arrays()
    path = tmp_path / "f.npz"
    np.savez(path, **given)
    features = load_text_features(path)
    assert (features.classes, features.background_words) == (("cat", "dog"), ("sky", "grass"))
    rows = given["features"].astype(np.float64)
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(features.class_vectors, expected[[1, 3]], rtol=1e-6)
    np.testing.assert_allclose(features.background_vectors, expected[[0, 2]], rtol=1e-6)
    save_text_features(tmp_path / "g.npz", features)
    again = load_text_features(tmp_path / "g.npz")
    assert again.classes == features.classes
    np.testing.assert_allclose(again.class_vectors, features.class_vectors, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"names": None}, "names"),
        ({"names": np.array([1, 2, 3, 4])}, "wrong type"),
        ({"names": np.array(["a", "b"])}, "2 names, 4 features"),
        ({"names": np.array(["sky", "cat", "grass", "cat"])}, "a class appears twice"),
        ({"background": np.array([1, 0, 1, 0])}, "wrong type"),
        ({"background": np.ones(4, np.bool_)}, "no class row"),
        ({"features": np.zeros((4, 8))}, "zero or not finite"),
        ({"features": np.full((4, 8), np.nan)}, "zero or not finite"),
        ({"features": np.full((4, 8), 1e-200)}, "or nearly so"),
        ({"features": np.full((4, 8), 1e200)}, "or nearly so"),
        ({"features": np.ones((4, 8), np.int64)}, "not (rows, E) float"),
        ({"features": np.ones(4)}, "not (rows, E) float"),
        ({"names": np.array(["a", None, "b", "c"], object)}, "cannot read"),
    ],
)
def test_malformed_files_are_named(
    change: dict[str, np.ndarray | None], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "f.npz"
    mixed = arrays() | change
    np.savez(path, **{key: value for key, value in mixed.items() if value is not None})
    with pytest.raises(VocabularyError, match=r"f\.npz") as caught:
        load_text_features(path)
    assert told in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"junk", b"PK\x03\x04 cut"])
def test_files_that_are_no_archive(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    path.write_bytes(data)
    with pytest.raises(VocabularyError, match="cannot read"):
        load_text_features(path)
    with pytest.raises(VocabularyError, match="cannot read"):
        load_text_features(tmp_path / "absent.npz")


def test_classes_are_taken_by_name() -> None:
    vectors = unit_rows(np.random.default_rng(0).standard_normal((3, 4)))
    rows = tuple(np.stack([vector, -vector]) for vector in vectors)
    features = TextFeatures(("a", "b", "c"), (), vectors, vectors[:0], "m", phrase_vectors=rows)
    chosen = features.for_classes(("c", "a"))
    np.testing.assert_array_equal(chosen.class_vectors, vectors[[2, 0]])
    np.testing.assert_array_equal(chosen.phrase_vectors[0], rows[2])
    with pytest.raises(VocabularyError, match="classes 'x', 'y' among"):
        features.for_classes(("a", "x", "y"))


def test_a_background_word_that_is_asked_for_as_a_class_stops_competing() -> None:
    vectors = unit_rows(np.random.default_rng(0).standard_normal((4, 4)))
    features = TextFeatures(("a", "b"), ("grass", "sky"), vectors[:2], vectors[2:], "m")
    chosen = features.for_classes(("grass", "b"))
    np.testing.assert_array_equal(chosen.class_vectors, vectors[[2, 1]])
    assert chosen.background_words == ("sky",)
    np.testing.assert_array_equal(chosen.background_vectors, vectors[[3]])


def test_names_of_vectors_are_found_in_any_spelling_but_their_own_wins() -> None:
    vectors = unit_rows(np.random.default_rng(0).standard_normal((5, 4)))
    words = ("dining table", "cat", "Cat")
    features = TextFeatures(words, ("Blue_sky", "grass"), vectors[:3], vectors[3:], "m")
    chosen = features.for_classes(("Cat", "CAT", "Dining_Table", "blue  sky"))
    np.testing.assert_array_equal(chosen.class_vectors, vectors[[2, 1, 0, 3]])
    assert chosen.classes == ("Cat", "CAT", "Dining_Table", "blue  sky")
    assert chosen.background_words == ("grass",)


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        (("cats",), "did you mean 'cat' for 'cats'? Else use weights"),
        (("tv", "cat", "Buses"), "did you mean 'tvmonitor' for 'tv', 'bus' for 'Buses'? Else use"),
        (("airplanes", "couch"), "did you mean 'aeroplane' for 'airplanes', 'sofa' for 'couch'?"),
        (("people", "wineglass"), "did you mean 'person' for 'people', 'wine glass' for"),
        (("truk",), "did you mean 'truck' for 'truk'? Else use"),
        (("goat", "xylophone"), "use weights with a text tower"),
    ],
)
def test_a_name_without_a_vector_is_met_with_the_one_that_is_meant(
    asked: tuple[str, ...], remedy: str
) -> None:
    with pytest.raises(VocabularyError, match="no text feature for the class") as caught:
        from_given(stand_in(), Vocabulary(asked, ()), Fusion.sentence)
    missing = [name for name in asked if name != "cat"]
    assert ", ".join(map(repr, missing)) in caught.value.what
    assert caught.value.remedy.startswith(remedy)
    assert "--text-features FILE.npz" in caught.value.remedy


def test_of_many_names_without_a_vector_some_are_told() -> None:
    names = tuple(f"xx{k}" for k in range(7))
    with pytest.raises(VocabularyError, match=r"classes 'xx0', 'xx1', .*'xx4' and 2 more among"):
        stand_in().for_classes(("cat", *names))


@pytest.fixture(scope="module")
def state(tiny_weights: Path) -> dict[str, torch.Tensor]:
    return dict(read_state_dict(tiny_weights))


@pytest.fixture
def features_of(state: dict[str, torch.Tensor], weights: Weights, tmp_path: Path):
    def make(vocabulary: Vocabulary, **options: object) -> TextFeatures:
        settings = {"file": None, "cache": tmp_path / "cache", "say": quiet} | options
        return text_features(vocabulary, state, weights, **settings)

    return make


@pytest.fixture(scope="module")
def tower(state: dict[str, torch.Tensor]) -> TextTransformer:
    return load_text(state)


@pytest.fixture(scope="module")
def weights(tiny_weights: Path) -> Weights:
    return resolve(str(tiny_weights))


def plain_encode(tower: TextTransformer, prompts: list[str]) -> np.ndarray:
    """Through the tower's own forward, with all 77 positions."""
    with torch.inference_mode():
        return F.normalize(tower(SimpleTokenizer()(prompts))).numpy()


def test_prompts_cut_to_their_length_give_the_towers_own_features(
    tower: TextTransformer,
) -> None:
    prompts = ["a cat.", "a clean origami person with clothes,people,human.", "x", "a cat.", "é ☃"]
    vectors = encode_prompts(tower, prompts)
    np.testing.assert_allclose(vectors, plain_encode(tower, prompts), atol=2e-6)
    back = encode_prompts(tower, prompts[::-1])
    np.testing.assert_array_equal(back, vectors[::-1])


def test_the_context_ends_at_77_tokens(tower: TextTransformer) -> None:
    fits = " ".join(["cat"] * (CONTEXT_LENGTH - 2))
    assert len(tokenize(fits)) == CONTEXT_LENGTH - 2
    np.testing.assert_allclose(
        encode_prompts(tower, [fits]), plain_encode(tower, [fits]), atol=2e-6
    )
    with pytest.raises(VocabularyError, match="78 tokens, CLIP reads 77"):
        encode_prompts(tower, [f"{fits} cat"])


def test_golden_features_through_the_whole_text_side(
    golden_tiny_weights: Path, shared: Path, tmp_path: Path
) -> None:
    expected = np.load(shared / "golden" / "tiny" / "text.npz", allow_pickle=False)
    state, weights = read_state_dict(golden_tiny_weights), resolve(str(golden_tiny_weights))
    words = load_vocabulary("voc")
    features = text_features(words, state, weights, file=None, cache=tmp_path, say=quiet)
    np.testing.assert_allclose(features.class_vectors, expected["fg"], atol=2e-6)
    np.testing.assert_allclose(features.background_vectors, expected["bg"], atol=2e-6)
    assert features.templates == ("a clean origami {}.",)


def test_templates_are_averaged_as_unit_vectors(features_of, tower: TextTransformer) -> None:
    templates = ("a {}.", "the plastic {}.", "itap of my {}.")
    features = features_of(VOCABULARY, templates=templates)
    words = ("cat", "people,human", "wine glass", "sky", "grass")
    prompts = [template.replace("{}", word) for word in words for template in templates]
    means = plain_encode(tower, prompts).reshape(5, 3, -1).mean(1)
    rows = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(features.class_vectors, rows[:3], atol=2e-6)
    np.testing.assert_allclose(features.background_vectors, rows[3:], atol=2e-6)
    assert features.templates == templates
    only = features_of(VOCABULARY, templates=("a {}.",))
    assert fingerprint(only) != fingerprint(features)


@pytest.mark.parametrize("fusion", list(Fusion))
def test_the_order_in_the_file_changes_no_vector(features_of, fusion: Fusion) -> None:
    shuffled = replace(
        VOCABULARY, classes=("wine glass", "cat", "person"), background=("grass", "sky")
    )
    first = features_of(VOCABULARY, fusion=fusion)
    other = features_of(shuffled, fusion=fusion)
    np.testing.assert_array_equal(other.class_vectors, first.class_vectors[[2, 0, 1]])
    np.testing.assert_array_equal(other.background_vectors, first.background_vectors[[1, 0]])
    for row, origin in enumerate([2, 0, 1] if first.phrase_vectors else []):
        np.testing.assert_array_equal(other.phrase_vectors[row], first.phrase_vectors[origin])


def test_what_was_encoded_is_remembered(
    state, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = PromptEncoder(state, weights, tmp_path, say=unexpected)
    assert not encoder.knows(["a b", "a c"])
    encoder.learn([["a b", "a c"], ["a d"]])
    first = encoder(["a b", "a c"])
    monkeypatch.setattr("clipes.words.encode.encode_prompts", None)
    assert encoder.knows(["a c", "a b"])
    np.testing.assert_array_equal(encoder(["a c", "a b"]), first[::-1])
    np.testing.assert_array_equal(encoder(["a c", "a b", "a c"]), first[[1, 0, 1]])
    assert encoder(["a d"]).shape == (1, 64)


def test_where_nothing_can_be_kept_it_is_said_once(state, weights: Weights, tmp_path: Path) -> None:
    kept = PromptEncoder(state, weights, tmp_path / "cache", say=unexpected)
    (tmp_path / "file").touch()
    said: list[str] = []
    encoder = PromptEncoder(state, weights, tmp_path / "file" / "cache", say=said.append)
    encoder.learn([["a b", "a c"], ["a d"]])
    kept.learn([["a b", "a c"], ["a d"]])
    assert encoder.knows(["a d"])
    assert not encoder.knows(["a e"])
    np.testing.assert_array_equal(encoder(["a c", "a b"]), kept(["a c", "a b"]))
    np.testing.assert_array_equal(encoder(["a e"]), kept(["a e"]))
    assert len(said) == 1
    assert f"text: the vectors of prompts are not kept: cannot write {tmp_path}/file" in said[0]
    assert "Not a directory; CLIPES_CACHE names another folder" in said[0]


def test_vectors_that_cannot_be_read_are_made_again(
    state, weights: Weights, tmp_path: Path
) -> None:
    encoder = PromptEncoder(state, weights, tmp_path, say=unexpected)
    first = encoder(["a b"])
    (path,) = (tmp_path / "text").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(encoder(["a b"]), first)


def test_without_a_text_tower_a_template_makes_no_sense(
    state, weights: Weights, tmp_path: Path
) -> None:
    visual = {key: value for key, value in state.items() if key.startswith(("visual.", "logit"))}
    options = {"file": None, "cache": tmp_path, "say": quiet}
    with pytest.raises(VocabularyError, match="has no text tower"):
        text_features(VOCABULARY, visual, weights, templates=("a {}",), **options)
    path = tmp_path / "f.npz"
    np.savez(path, **arrays())
    small = Vocabulary(("dog",), ())
    with pytest.raises(VocabularyError, match="come from a file"):
        text_features(VOCABULARY, state, weights, templates=("a {}",), **(options | {"file": path}))
    with pytest.raises(VocabularyError, match=r"8 channels, the weights tiny\.pt 64"):
        text_features(small, state, weights, **(options | {"file": path}))
    with pytest.raises(VocabularyError, match="512 channels"):
        text_features(load_vocabulary("voc"), visual, weights, **options)


def test_the_stand_in_knows_vocs_classes_and_no_synonyms() -> None:
    given = stand_in()
    voc = load_vocabulary("voc")
    assert set(voc.classes) <= set(given.classes)
    np.testing.assert_allclose(np.linalg.norm(given.class_vectors, axis=1), 1, rtol=1e-6)


def test_pieces_of_words() -> None:
    assert tokenize("Wine Glass") == ["wine</w>", "glass</w>"]
    assert tokenize("pottedplant") == ["pot", "ted", "plant</w>"]
    assert tokenize("   ") == []
