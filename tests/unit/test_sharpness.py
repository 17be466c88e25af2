"""Sharpness against a slow, literal computation, and the memory of image features."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from open_clip.transformer import VisionTransformer
from PIL import Image

from clipes.bench import literal
from clipes.datasets import Dataset
from clipes.disk.images import read_image
from clipes.errors import ClipesError, DatasetError, VocabularyError
from clipes.listener import Listener
from clipes.stages.rank import ImageFeatures, RankRequest, rank, rank_files, rank_templates
from clipes.stages.setup import OpenedWeights, open_weights
from clipes.towers.classify import classifier_input, image_features
from clipes.towers.clip_text import encode_prompts
from clipes.towers.load import load_text
from clipes.types import Sample
from clipes.words.features import TextFeatures, save_text_features, unit_rows
from clipes.words.sharpness import class_scores, sharpness
from clipes.words.templates import choose_templates, load_ranking
from clipes.words.vocabulary import Vocabulary, fill
from tests.heard import Heard
from tests.unit.clip_support import quiet

MEAN = STD = (0.5, 0.5, 0.5)


def make_case(seed: int, images: int = 9, classes: int = 5) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    present = rng.random((images, classes)) < 0.4
    present[np.arange(images), rng.integers(classes, size=images)] = True
    features = unit_rows(rng.standard_normal((images, 16)))
    return features, unit_rows(rng.standard_normal((classes, 16))), present


def literal_sharpness(
    images: np.ndarray, classes: np.ndarray, present: np.ndarray, scale: float
) -> float:
    """The formula, one number at a time."""
    upper = lower = 0.0
    for i in range(len(images)):
        powers = []
        for j in range(len(classes)):
            cosine = sum(float(a) * float(b) for a, b in zip(images[i], classes[j], strict=True))
            powers.append(math.exp(scale * cosine))
        scores = [powers[j] / sum(powers) for j in range(len(classes)) if present[i][j]]
        mean = sum(scores) / len(scores)
        upper += sum((score - mean) ** 2 for score in scores) / len(scores)
        lower += mean
    return upper / lower


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1.0, 25.0, 100.0])
def test_the_literal_formula(seed: int, scale: float) -> None:
    images, classes, present = make_case(seed)
    value = sharpness(class_scores(images, classes, scale), present)
    assert value == pytest.approx(literal_sharpness(images, classes, present, scale), rel=1e-4)
    assert 0 < value < 1


def test_a_number_worked_out_by_hand() -> None:
    scores = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    present = np.array([[True, True, False], [False, False, True]])
    # (0.01 + 0) / (0.4 + 0.7): the image with one class adds to the denominator only.
    assert sharpness(scores, present) == pytest.approx(0.01 / 1.1)


def test_order_does_not_matter_and_absent_classes_only_through_the_softmax() -> None:
    images, classes, present = make_case(7)
    scores = class_scores(images, classes, 30.0)
    value = sharpness(scores, present)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(len(scores)), rng.permutation(scores.shape[1])
    shuffled = sharpness(scores[rows][:, columns], present[rows][:, columns])
    assert shuffled == pytest.approx(value, rel=1e-12)
    assert sharpness(np.where(present, scores, 0.99), present) == pytest.approx(value, rel=1e-12)


def test_classes_that_always_score_alike_are_not_sharp_at_all() -> None:
    present = np.ones((4, 3), np.bool_)
    assert sharpness(np.full((4, 3), 1 / 3), present) == pytest.approx(0, abs=1e-30)
    one_hot = np.eye(3)[[0, 1, 2, 0]]
    assert sharpness(one_hot, present) == pytest.approx(2 / 3)


def test_scores_are_a_softmax_that_does_not_overflow() -> None:
    images, classes, _ = make_case(3)
    wide = torch.from_numpy(images).double() @ torch.from_numpy(classes).double().T
    expected = (100 * wide).softmax(1).numpy()
    np.testing.assert_allclose(class_scores(images, classes, 100.0), expected, rtol=2e-4)
    assert np.isfinite(class_scores(images, classes, 1e5)).all()


@pytest.mark.parametrize("turned", [False, True])
def test_a_line_of_pixels_is_seen_in_its_middle_and_takes_no_memory(
    monkeypatch: pytest.MonkeyPatch, *, turned: bool
) -> None:
    visual = VisionTransformer(64, 16, 64, 3, 4, 4.0, output_dim=32).eval()
    picture = np.zeros((2, 1_000_000, 3), np.uint8)
    picture[:, 499_990:500_010] = 255
    picture = picture.swapaxes(0, 1).copy() if turned else picture
    sizes = []
    resize = Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *more: object) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *more)

    monkeypatch.setattr(Image.Image, "resize", watched)
    prepared = classifier_input(visual, MEAN, STD)(picture)
    assert prepared.shape == (3, 64, 64)
    assert prepared.min() > 0.9  # white
    assert max(sizes[0]) <= 100 * 64


def test_image_features_are_those_of_the_cls_token() -> None:
    torch.manual_seed(0)
    visual = VisionTransformer(64, 16, 64, 3, 4, 4.0, output_dim=32).eval()
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    prepared = classifier_input(visual, MEAN, STD)(picture)
    middle = torch.from_numpy(picture[:, 16:80]).permute(2, 0, 1) / 255
    torch.testing.assert_close(prepared, (middle - 0.5) / 0.5)  # nothing to resize: cut out

    with torch.inference_mode():
        tokens = literal.embed(visual, prepared)
        last_input, _ = literal.run_blocks(visual, tokens)
        output = visual.transformer.resblocks[-1](last_input[None])[0]
        expected = F.normalize(visual.ln_post(output[0]) @ visual.proj, dim=0)
    torch.testing.assert_close(
        torch.from_numpy(image_features(visual, prepared[None])[0]), expected, atol=1e-5, rtol=1e-4
    )


@pytest.fixture(scope="module")
def opened(tiny_weights: Path) -> OpenedWeights:
    return open_weights(str(tiny_weights), "ViT-B-16", "cpu", Listener())


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    rng = np.random.default_rng(1)
    made = []
    for index, labels in enumerate([(0,), (1, 2), (0, 2), (2, 1, 0)]):
        path = tmp_path / f"p{index}.png"
        coarse = rng.integers(0, 256, (6, 5 + index, 3), np.uint8)
        Image.fromarray(coarse).resize((90, 70)).save(path)
        made.append(Sample(f"p{index}", path, labels))
    return made


def encode(opened: OpenedWeights, samples: list[Sample], cache: Path) -> np.ndarray:
    features = ImageFeatures(opened, Path("root"), cache, quiet)
    return features(samples, Listener())[1]


def test_an_image_is_encoded_once(
    opened: OpenedWeights, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(opened, samples, tmp_path)
    read = []
    monkeypatch.setattr(
        "clipes.stages.rank.read_image", lambda path: read.append(path.stem) or read_image(path)
    )
    np.testing.assert_array_equal(encode(opened, samples[::-1], tmp_path), first[::-1])
    assert read == []
    Image.new("RGB", (33, 44)).save(samples[1].image)
    encode(opened, samples, tmp_path)
    assert read == ["p1"]


def test_a_damaged_memory_is_made_again(
    opened: OpenedWeights, samples: list[Sample], tmp_path: Path
) -> None:
    first = encode(opened, samples, tmp_path)
    (path,) = (tmp_path / "images").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(encode(opened, samples, tmp_path), first)


def test_a_memory_that_cannot_be_written_is_said(
    opened: OpenedWeights, samples: list[Sample], tmp_path: Path
) -> None:
    said: list[str] = []
    features = ImageFeatures(opened, Path("root"), samples[0].image, said.append)
    found = features(samples, Listener())[1]
    np.testing.assert_array_equal(found, encode(opened, samples, tmp_path))
    assert len(said) == 1
    assert "images: the features of images are not kept: cannot write" in said[0]
    assert "CLIPES_CACHE" in said[0]


def test_images_that_cannot_be_read_are_named_and_left_out(
    opened: OpenedWeights, samples: list[Sample], tmp_path: Path
) -> None:
    samples[0].image.write_bytes(b"no picture")
    samples[3].image.unlink()
    heard = Heard()
    images = ImageFeatures(opened, Path("root"), tmp_path, quiet)
    usable, features = images(samples, heard.listener)
    assert [sample.id for sample in usable] == ["p1", "p2"]
    assert features.shape == (2, 64)
    assert [failure.id for failure in heard.failures] == ["p0", "p3"]
    with pytest.raises(DatasetError, match="none of the images"):
        images([samples[0]], Listener())


VOCABULARY = Vocabulary(("cat", "dog", "sofa"), ("sky",), {"dog": ("dog", "puppy")})
TEMPLATES = ("a {}.", "a photo of a {}.", "the plastic {}.", "itap of my {}.")


def rank_here(samples: list[Sample], opened: OpenedWeights, folder: Path, **more: object) -> object:
    request = RankRequest(TEMPLATES, cache=folder / "cache", **more)
    data = Dataset("folder", folder, VOCABULARY.classes, tuple(samples), ())
    ranking, failures = rank(request, data, VOCABULARY, opened, Listener())
    assert not failures
    return ranking


def test_a_ranking_is_the_formula_on_every_template(
    opened: OpenedWeights, samples: list[Sample], tmp_path: Path
) -> None:
    ranking = rank_here(samples, opened, tmp_path)
    images = encode(opened, samples, tmp_path)
    present = np.zeros((4, 3), np.bool_)
    for row, sample in enumerate(samples):
        present[row, list(sample.labels)] = True
    tower = load_text(opened.state)
    expected = {}
    for template in TEMPLATES:
        words = ("cat", "dog,puppy", "sofa")
        vectors = encode_prompts(tower, [fill(template, word) for word in words])
        expected[template] = literal_sharpness(images, vectors, present, opened.logit_scale)
    assert [name for name, _ in ranking.ranking] == sorted(expected, key=expected.__getitem__)
    for name, score in ranking.ranking:
        assert score == pytest.approx(expected[name], rel=1e-3)
    assert (ranking.images, ranking.several) == (4, 3)

    path = ranking.save(tmp_path / "run")
    assert load_ranking(path) == ranking
    best = choose_templates("best", VOCABULARY, opened.weights.sha256, [tmp_path / "run"], quiet)
    assert best == (min(expected, key=expected.__getitem__),)


def test_the_best_template_is_only_that_of_the_same_words_and_weights(
    opened: OpenedWeights, samples: list[Sample], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    digest = opened.weights.sha256
    with pytest.raises(ClipesError, match="no ranking"):
        choose_templates("best", VOCABULARY, digest, [folder], quiet)
    path = rank_here(samples, opened, tmp_path).save(folder)
    other = VOCABULARY.with_classes(("cat", "dog"))
    with pytest.raises(VocabularyError, match="other classes"):
        choose_templates("best", other, digest, [folder], quiet)
    with pytest.raises(VocabularyError, match=r"made with the weights tiny\.pt"):
        choose_templates("best", VOCABULARY, "0" * 64, [folder], quiet)
    for damage in ("", "[]", '{"kind": "templates"}', '{"ranking": [["a", "b"]]}'):
        path.write_text(damage)
        with pytest.raises(ClipesError, match="cannot read the ranking"):
            choose_templates("best", VOCABULARY, digest, [folder], quiet)


def test_files_of_features_are_ranked_by_the_same_formula(
    opened: OpenedWeights, samples: list[Sample], tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    files = []
    for index in range(3):
        vectors = unit_rows(rng.standard_normal((4, 64)) * 0.05 + index)
        classes = ("sofa", "cat", "dog", "extra")
        path = tmp_path / f"f{index}.npz"
        save_text_features(path, TextFeatures(classes, (), vectors, vectors[:0], "x"))
        files.append(path)
    ranking = rank_here(samples, opened, tmp_path, files=tuple(files))
    assert ranking.kind == "features"
    images = encode(opened, samples, tmp_path)
    present = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]], np.bool_)
    for name, score in ranking.ranking:
        stored = np.load(name)["features"][[1, 2, 0]]
        value = literal_sharpness(images, stored, present, opened.logit_scale)
        assert score == pytest.approx(value, rel=1e-3)
    ranking.save(tmp_path)
    with pytest.raises(VocabularyError, match="ranks no templates"):
        choose_templates("best", VOCABULARY, opened.weights.sha256, [tmp_path], quiet)

    narrow = tmp_path / "narrow.npz"
    small = unit_rows(rng.standard_normal((3, 8)))
    save_text_features(narrow, TextFeatures(VOCABULARY.classes, (), small, small[:0], "x"))
    with pytest.raises(VocabularyError, match="8 channels, the weights 64"):
        rank_files([narrow], VOCABULARY, images, present, 1.0)


def test_ranking_that_cannot_say_anything_is_refused(
    opened: OpenedWeights, samples: list[Sample], tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="no image has two labels"):
        rank_here(samples[:1], opened, tmp_path)
    state = {key: value for key, value in opened.state.items() if key.startswith(("vis", "logit"))}
    without = OpenedWeights(opened.weights, state, opened.device)
    with pytest.raises(VocabularyError, match="needs a text tower"):
        rank_here(samples, without, tmp_path)


def test_a_limit_spreads_over_all_images(
    opened: OpenedWeights, samples: list[Sample], tmp_path: Path
) -> None:
    first_and_last = rank_here(samples, opened, tmp_path, limit=2)
    assert (first_and_last.images, first_and_last.several) == (2, 1)
    assert rank_here(samples, opened, tmp_path, limit=99).images == 4


def test_hundreds_of_templates_are_scored_from_features_alone() -> None:
    rng = np.random.default_rng(0)
    images = unit_rows(rng.standard_normal((1000, 512)))
    present = rng.random((1000, 20)) < 0.1
    present[:, 3] = True
    words = Vocabulary(tuple(f"c{k}" for k in range(20)), ())
    known = {f"t{t} {{}}": unit_rows(rng.standard_normal((20, 512))) for t in range(20)}

    class Encoder:
        def learn(self, groups: object) -> None:
            pass

        def __call__(self, prompts: list[str]) -> np.ndarray:
            return known[prompts[0].split()[0] + " {}"]

    ranked = rank_templates(list(known), words, images, present, Encoder(), 100.0, lambda *_: None)
    scores = [score for _, score in ranked]
    assert scores == sorted(scores)
    name, score = ranked[7]
    expected = sharpness(class_scores(images, known[name], 100.0), present)
    assert score == expected
