"""Descriptions of classes: as mean of vectors and as maximum of scores, against literal ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from open_clip.transformer import VisionTransformer

from clipes.bench import literal
from clipes.choices import Descriptions, Fusion
from clipes.errors import UsageError, VocabularyError
from clipes.listener import Listener
from clipes.maps.gradcam import softmax_gradcam
from clipes.maps.patches import compare
from clipes.maps.vectors import WordVectors
from clipes.names import SAME_THING
from clipes.stages.setup import OpenedWeights, open_weights
from clipes.towers.clip import Backbone
from clipes.towers.clip_text import encode_prompts
from clipes.towers.load import load_text
from clipes.towers.taps import Taps
from clipes.words.encode import fingerprint, from_given, text_features
from clipes.words.features import TextFeatures, unit_rows
from clipes.words.vocabulary import MAX_DESCRIPTIONS, Vocabulary, check_levels, load_vocabulary
from tests.unit.clip_support import HALF, quiet

OUT, SCALE = 32, 30.0
WORDS = Vocabulary(
    ("cat", "dog", "person", "sofa"),
    ("sky", "grass", "road"),
    {"person": ("people", "human")},
    "a photo of a {}.",
    {
        "sofa": ("soft cushions", "thick arm rests of a sofa"),
        "cat": ("whiskers", "a long thin tail", "striped fur"),
        "person": ("a face with two eyes",),
    },
)

Encode = Callable[..., TextFeatures]


@pytest.fixture(scope="module")
def opened(tiny_weights: Path) -> OpenedWeights:
    return open_weights(str(tiny_weights), "ViT-B-16", "cpu", Listener())


@pytest.fixture
def encode(opened: OpenedWeights, tmp_path: Path) -> Encode:
    def made(words: Vocabulary = WORDS, **options: object) -> TextFeatures:
        given = {"file": None, "cache": tmp_path, "say": quiet, **options}
        return text_features(words, opened.state, opened.weights, **given)

    return made


def units(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, OUT, generator=generator), dim=-1)


def literal_mean(rows: list[np.ndarray]) -> list[float]:
    mean = [sum(float(row[e]) for row in rows) / len(rows) for e in range(len(rows[0]))]
    length = sum(x * x for x in mean) ** 0.5
    return [x / length for x in mean]


def test_an_average_is_the_mean_of_the_unit_vectors_of_name_and_sentences(
    opened: OpenedWeights, encode: Encode
) -> None:
    named, described = encode(), encode(descriptions=Descriptions.average)
    tower = load_text(opened.state, quick_gelu=opened.weights.recipe.quick_gelu)
    for k, name in enumerate(WORDS.classes):
        phrase = "people,human" if name == "person" else name
        texts = [f"a photo of a {phrase}.", *WORDS.descriptions.get(name, ())]
        vectors = [encode_prompts(tower, [text])[0] for text in texts]
        np.testing.assert_allclose(described.class_vectors[k], literal_mean(vectors), atol=2e-6)
    # Exact to the vectors as they are known to the run.
    alone = Vocabulary(WORDS.descriptions["cat"], (), template="{}")
    cat = encode(alone).class_vectors
    expected = np.array(literal_mean([named.class_vectors[0], *cat]), np.float32)
    np.testing.assert_allclose(described.class_vectors[0], expected, rtol=0, atol=6e-8)
    np.testing.assert_array_equal(described.class_vectors[1], named.class_vectors[1])
    np.testing.assert_array_equal(described.background_vectors, named.background_vectors)
    assert described.phrase_vectors == ()
    assert np.abs(described.class_vectors[0] - named.class_vectors[0]).max() > 0.01


def test_for_a_maximum_all_vectors_are_kept_beside_their_mean(encode: Encode) -> None:
    named = encode()
    average, largest = (encode(descriptions=how) for how in Descriptions)
    np.testing.assert_array_equal(largest.class_vectors, average.class_vectors)
    assert [len(rows) for rows in largest.phrase_vectors] == [4, 1, 2, 3]
    for rows, name in zip(largest.phrase_vectors, named.class_vectors, strict=True):
        np.testing.assert_array_equal(rows[0], name)
    fewer = largest.for_classes(("sofa", "dog"))
    assert [len(rows) for rows in fewer.phrase_vectors] == [3, 1]
    assert len({fingerprint(text) for text in (named, average, largest)}) == 3
    other = replace(WORDS, descriptions={"cat": ("paws",)})
    assert fingerprint(encode(other)) == fingerprint(named)  # nobody asked
    assert fingerprint(encode(other, descriptions=Descriptions.max)) != fingerprint(largest)


def test_a_vector_fused_from_synonyms_counts_as_one(encode: Encode) -> None:
    named = encode(fusion=Fusion.feature)
    both = encode(fusion=Fusion.feature, descriptions=Descriptions.max)
    np.testing.assert_array_equal(both.phrase_vectors[2][0], named.class_vectors[2])
    assert len(both.phrase_vectors[2]) == 2


def described_words(vectors: list[torch.Tensor], background: torch.Tensor) -> WordVectors:
    """Words of classes with these vectors, for the maximum."""
    rows = [part.numpy() for part in vectors]
    text = TextFeatures(
        tuple(f"c{k}" for k in range(len(rows))),
        tuple(f"w{k}" for k in range(len(background))),
        np.stack([unit_rows(part.mean(0, keepdims=True))[0] for part in rows]),
        background.numpy(),
        "none",
        phrase_vectors=tuple(rows),
        descriptions=Descriptions.max,
    )
    return WordVectors(text, torch.device("cpu"), torch.float32)


def test_words_without_any_for_the_background_are_refused() -> None:
    vectors = units(0, 1).numpy()
    alone = TextFeatures(("cat",), (), vectors, vectors[:0], "none")
    with pytest.raises(VocabularyError, match="no words for the background; give 'clipes cam'"):
        WordVectors(alone, torch.device("cpu"), torch.float32)


def test_the_score_of_a_patch_is_that_of_its_best_description() -> None:
    vectors = [units(1, 3), units(2, 1), units(3, 5), units(4, 2)]
    background, features = units(5, 2), (units(6, 12), units(7, 12))
    words = described_words(vectors, background)
    labels = [2, 1, 0]
    maps, log_words = compare(features, words.of(labels), words.background, (3, 4), SCALE)

    each = np.zeros((2, 5, 12))
    chosen = set()
    for way, part in enumerate(features):
        for n, patch in enumerate(part.double().numpy()):
            cosines = [[patch @ row for row in vectors[k].double().numpy()] for k in labels]
            chosen |= {(k, int(np.argmax(of))) for k, of in enumerate(cosines)}
            scores = [max(of) for of in cosines] + [patch @ b for b in background.double().numpy()]
            powers = [np.exp(SCALE * score) for score in scores]
            each[way, :, n] = [power / sum(powers) for power in powers]
    mean = each.mean(0)
    expected = np.log(np.concatenate([mean[3:].sum(0, keepdims=True), mean[:3]]) + 1e-6)
    np.testing.assert_allclose(log_words, expected, atol=2e-3)
    scaled = [(m - m.min(1, keepdims=True)) for m in each[:, :3]]
    both = sum(m / m.max(1, keepdims=True) for m in scaled)
    both = both - both.min(1, keepdims=True)
    np.testing.assert_allclose(
        maps.reshape(3, 12), both / both.max(1, keepdims=True), rtol=1e-3, atol=1e-4
    )
    assert len(chosen) > 6  # it is not always the same one


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(VisionTransformer(64, 16, 64, 5, 4, 4.0, output_dim=OUT), SCALE, HALF, HALF)


def literal_gradient_map(
    visual: VisionTransformer, prepared: torch.Tensor, k: int, vectors: list, background: list
) -> np.ndarray:
    """One class's map by autograd through the maximum over the descriptions of every class."""
    tokens, _ = literal.run_blocks(visual, literal.embed(visual, prepared))
    block = visual.transformer.resblocks[-1]
    with torch.enable_grad():
        normed = block.ln_1(tokens).detach().requires_grad_(True)
        query = normed[None]
        hidden = tokens + block.attn(query, query, query, need_weights=False)[0][0]
        hidden = hidden + block.mlp(block.ln_2(hidden))
        unit = F.normalize(visual.ln_post(hidden)[1:].mean(0) @ visual.proj, dim=0)
        classes = [torch.stack([unit @ row for row in rows]).max() for rows in vectors]
        logits = SCALE * torch.stack([*classes, *(unit @ row for row in background)])
        (gradient,) = torch.autograd.grad(logits.softmax(0)[k], normed)
    raw = (block.ln_1(tokens)[1:] @ gradient[1:].mean(0)).clamp(min=0).detach().numpy()
    return (raw - raw.min()) / (raw.max() - raw.min())


def test_gradient_maps_follow_the_maximum(backbone: Backbone) -> None:
    vectors, background = [units(11, 4), units(12, 2), units(13, 3)], units(14, 3)
    words, won = described_words(vectors, background), set()
    for seed in range(3):
        image = np.random.default_rng(seed).integers(0, 256, (70, 100, 3), np.uint8)
        prepared = backbone.prepare(image, 1600)
        encoded = backbone.encode(prepared[None], Taps(last="gradient"))
        (last,) = encoded.gradients
        maps = softmax_gradcam(backbone, last, encoded.grid, words.of([0, 1, 2]), words.background)
        for k, rows in enumerate(vectors):
            won.add(int((rows @ last.feature).argmax()))
            expected = literal_gradient_map(backbone.visual, prepared, k, vectors, list(background))
            np.testing.assert_allclose(maps[k].ravel(), expected, atol=1e-4)
    assert won != {0}  # else the names alone would do


def test_descriptions_that_say_what_the_name_says_change_nothing() -> None:
    names, background, features = units(21, 3), units(22, 2), (units(23, 6), units(24, 6))
    plain = compare(features, names, background, (2, 3), SCALE)
    words = described_words(
        [names[:1], names[1:2].repeat(3, 1), names[2:].repeat(2, 1)], background
    )
    described = compare(features, words.of([0, 1, 2]), words.background, (2, 3), SCALE)
    for got, expected in zip(described, plain, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_file_of_vectors_needs_a_row_for_every_sentence(shared: Path, encode: Encode) -> None:
    """Published vectors of parts and kinds stand for sentences."""
    with np.load(shared / "features" / "photo_of_a.npz", allow_pickle=False) as file:
        rows = dict(zip(file["words"].tolist(), unit_rows(file["features"]), strict=True))
    known = ("person", "face", "standing person", "tv", "crt screen", "dog")
    given = TextFeatures(
        known, ("sky",), np.stack([rows[name] for name in known]), rows["sky"][None], "ViT-B-16"
    )
    words = Vocabulary(
        ("dog", "tv", "person"),
        (),
        descriptions={"tv": ("crt screen",), "person": ("face", "standing person")},
    )
    average = from_given(given, words, Fusion.sentence, Descriptions.average)
    for vector, names in zip(
        average.class_vectors,
        (["dog"], ["tv", "crt screen"], ["person", "face", "standing person"]),
        strict=True,
    ):
        expected = literal_mean([rows[name] for name in names])
        np.testing.assert_allclose(vector, expected, rtol=0, atol=6e-8)
    assert average.background_words == ("sky",)
    missing = replace(words, descriptions={"dog": ("a wet nose",)})
    with pytest.raises(VocabularyError, match=r"every sentence.*'a wet nose'.*text tower") as told:
        from_given(given, missing, Fusion.sentence, Descriptions.max)
    assert type(told.value) is VocabularyError  # an unknown class would be fitted


def test_without_a_text_tower_it_is_said_in_one_line(
    opened: OpenedWeights, encode: Encode, tmp_path: Path
) -> None:
    image_only = {k: v for k, v in opened.state.items() if k.startswith(("visual", "logit"))}
    with pytest.raises(VocabularyError, match=r"no text tower; use weights with.*row for each"):
        text_features(
            load_vocabulary("voc"),
            image_only,
            opened.weights,
            file=None,
            cache=tmp_path,
            say=quiet,
            descriptions=Descriptions.average,
        )
    with pytest.raises(VocabularyError, match=r"has none of these classes; .*\[descriptions\]"):
        encode(replace(WORDS, descriptions={}), descriptions=Descriptions.max)
    for fusion in (Fusion.cam, Fusion.cam_max):
        check_levels(fusion, None)
        with pytest.raises(UsageError, match=f"--fusion {fusion} "):
            check_levels(fusion, Descriptions.max)


@pytest.mark.parametrize(
    ("sentences", "told"),
    [
        ({"emu": ("feathers",)}, "descriptions for 'emu', which is not a class"),
        ({"cat": ()}, "no description for 'cat'"),
        ({"cat": ("fur", "fur")}, "'fur' appears twice"),
        ({"cat": ("fur", " ")}, "an empty description of 'cat'"),
        ({"cat": ("a\x1b[2J",)}, "cannot be printed"),
        ({"cat": tuple(f"fur {k}" for k in range(MAX_DESCRIPTIONS + 1))}, "17 descriptions of"),
        ({"cat": ("long " * 100,)}, "has 500 letters, more than 400: 'long long"),
    ],
)
def test_descriptions_that_are_refused(sentences: dict[str, tuple[str, ...]], told: str) -> None:
    with pytest.raises(VocabularyError) as caught:
        Vocabulary(("cat",), (), descriptions=sentences)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_ships_describes_every_class_and_one_thing_once() -> None:
    voc, coco = load_vocabulary("voc"), load_vocabulary("coco")
    for words in (voc, coco):
        assert all(4 <= len(of) <= 6 for of in words.sentences())
    same = {name: other for name, other, *_ in SAME_THING}
    same |= {other: name for name, other in same.items()}
    for name, sentences in voc.descriptions.items():
        (there,) = {name, same.get(name)} & set(coco.classes)
        assert coco.descriptions[there] == sentences
    every = [sentence for of in coco.sentences() for sentence in of]
    assert len(set(every)) == len(every)


def test_other_classes_keep_their_descriptions_in_any_spelling() -> None:
    kept = WORDS.with_classes(("Sofa", "emu"))
    assert kept.descriptions == {"Sofa": WORDS.descriptions["sofa"]}
    assert kept.sentences() == (WORDS.descriptions["sofa"], ())
