"""Class vectors that a run fits itself: what they are, when they are fitted again, who is told."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image

from clipes.datasets import Dataset
from clipes.errors import ImageError, VocabularyError
from clipes.run import origin
from clipes.run.folder import Run
from clipes.stages import own_words as stage
from clipes.stages.own_words import ENOUGH, own_words
from clipes.stages.words_sources import words_are_current
from clipes.standin.beside import fit_beside
from clipes.standin.fit import EncodedImage, Fitted
from clipes.towers.clip import Backbone
from clipes.types import Sample
from clipes.weights import Weights
from clipes.weights.cache import Recipe
from clipes.words.features import TextFeatures, load_text_features, unit_rows
from tests.heard import Heard
from tests.unit.test_fit import KINDS, WIDTH, plant, silent

RECIPE = Recipe(quick_gelu=True, head_width=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
COLOURS = {"tapir": (200, 30, 30), "okapi": (30, 200, 30), "cat": (30, 30, 200)}


def known_vectors() -> TextFeatures:
    """Return vectors of a cat and a wall as a fit to images like the planted ones gives."""
    common = np.ones(WIDTH)
    own = {name: np.eye(WIDTH)[KINDS[name]] - 0.2 for name in ("cat", "wall")}
    rows = unit_rows(np.stack([common / np.sqrt(WIDTH) + 0.1 * part for part in own.values()]))
    return TextFeatures(("cat",), ("wall",), rows[:1], rows[1:], "m")


class TestBesideWhatIsKnown:
    images = (("cat",), ("dog",), ("dog", "cat"), ("train",), ("train", "cat"), ("dog",))

    def fitted(self, known: TextFeatures | None) -> Fitted:
        planted = [plant(names, seed)[0] for seed, names in enumerate(self.images * 2)]
        return fit_beside(planted, known, logit_scale=100.0, model="m", note="n", progress=silent)

    @pytest.mark.parametrize("known", [known_vectors(), None])
    def test_what_is_new_is_found_in_other_images(self, known: TextFeatures | None) -> None:
        fitted = self.fitted(known)
        text = fitted.text
        assert text.classes == ("cat", "dog", "train")
        new = {"dog": 6, "train": 4}
        assert fitted.images == ({"cat": 6, **new} if known is None else new)
        for name, other in (("dog", "cat"), ("train", "dog")):
            image, owners = plant((name, other), 1000)
            vector = text.class_vectors[text.classes.index(name)]
            scores = image.features.patches.astype(np.float32) @ (
                vector - text.background_vectors[-1]
            )
            mine = owners == KINDS[name]
            assert np.median(scores[mine]) > np.quantile(scores[~mine], 0.95)

    def test_what_is_known_keeps_its_own_part(self) -> None:
        known = known_vectors()
        text = self.fitted(known).text
        assert text.background_words == ("wall",)
        before = known.class_vectors[0] - known.background_vectors[0]
        after = text.class_vectors[0] - text.background_vectors[0]
        cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
        assert cosine > 0.9

    def test_what_stands_around_in_all_images_of_a_class_is_not_taken_for_it(self) -> None:
        """Dogs stand in grass that also surrounds a few trains; whole images are mostly grass."""
        named = (("dog", "grass"), ("dog", "grass"), ("train", "grass"), ("train",), ("cat",))
        images = []
        for seed in range(10):
            image, _ = plant(named[seed % 5], seed)
            shown = tuple(name for name in image.names if name != "grass")
            images.append(EncodedImage(shown, image.features))
        text = fit_beside(
            images, known_vectors(), logit_scale=100.0, model="", note="", progress=silent
        ).text
        image, owners = plant(("dog", "grass"), 1000)
        vector = text.class_vectors[text.classes.index("dog")] - text.background_vectors[-1]
        scores = image.features.patches.astype(np.float32) @ vector
        dog, grass = (scores[owners == KINDS[name]] for name in ("dog", "grass"))
        assert np.median(dog) > np.quantile(grass, 0.95)

    def test_images_that_are_all_labelled_alike_teach_nothing(self) -> None:
        planted = [plant(("dog",), seed)[0] for seed in range(3)]
        with pytest.raises(VocabularyError, match="all 3 images are labelled alike"):
            fit_beside(planted, None, logit_scale=1.0, model="", note="", progress=silent)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    visual = VisionTransformer(64, 16, 128, 2, 4, 4.0, output_dim=32, act_layer=QuickGELU)
    return Backbone(visual, 100.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return Weights("tiny", "ViT-B-16", tmp_path / "w", "a" * 64, False, RECIPE)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Two tapirs, two okapis, one image of both, and a class that nobody has seen."""
    labels = [(0,), (0,), (1,), (1,), (0, 1)]
    names = ("tapir", "okapi", "unicorn")
    rng = np.random.default_rng(0)
    samples = []
    for index, shown in enumerate(labels):
        pixels = rng.integers(0, 60, (64, 80, 3), dtype=np.uint8)
        for label in shown:
            pixels[16:48, 8 + 36 * label : 36 + 36 * label] = COLOURS[names[label]]
        path = tmp_path / f"p{index}.png"
        Image.fromarray(pixels).save(path)
        samples.append(Sample(f"p{index}", path, shown))
    return Dataset("folder", tmp_path, names, tuple(samples), ())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def fitted(data: Dataset, run: Run, backbone: Backbone, weights: Weights, **how: bool) -> Heard:
    heard = Heard()
    own_words(data, run, backbone, weights, 1600, heard.listener, **how)
    return heard


def test_they_are_fitted_once_and_kept_in_the_format_of_text_features(
    data: Dataset, run: Run, backbone: Backbone, weights: Weights
) -> None:
    heard = Heard()
    made = own_words(data, run, backbone, weights, 1600, heard.listener)
    assert made.images == {"tapir": 3, "okapi": 3, "unicorn": 0}
    kept = load_text_features(run.words_path)
    assert kept.classes == made.text.classes == data.classes
    np.testing.assert_array_equal(kept.class_vectors, made.text.class_vectors)
    assert "fitted to the labels of 5 of the run's own images" in kept.note
    assert "not text features" in kept.note
    assert heard.steps["encode"][-1] == (5, 5)
    assert "--no-fit" in heard.said[0]
    assert "few images of 'tapir', 'okapi'" in heard.said[-1]
    assert f"{ENOUGH} of a class are enough" in heard.said[-1]
    assert words_are_current(run, data)

    again = Heard()
    read = own_words(data, run, backbone, weights, 1600, again.listener)
    assert "encode" not in again.steps
    np.testing.assert_array_equal(read.text.class_vectors, made.text.class_vectors)
    assert read.images == made.images


def test_other_labels_make_them_stale_unless_they_are_to_be_kept(
    data: Dataset, run: Run, backbone: Backbone, weights: Weights
) -> None:
    fitted(data, run, backbone, weights)
    changed = replace(data, samples=(replace(data.samples[0], labels=(1,)), *data.samples[1:]))
    assert not words_are_current(run, changed)
    assert words_are_current(run, changed, keep=True)
    assert "encode" not in fitted(changed, run, backbone, weights, keep=True).steps
    heard = fitted(changed, run, backbone, weights)
    assert "fitted anew" in heard.said[0]
    assert heard.steps["encode"][-1] == (5, 5)


def test_another_picture_makes_them_stale_and_a_new_image_does_not(
    data: Dataset, run: Run, backbone: Backbone, weights: Weights
) -> None:
    fitted(replace(data, samples=data.samples[:4]), run, backbone, weights)
    assert words_are_current(run, data)
    Image.new("RGB", (40, 40), (9, 9, 9)).save(data.samples[1].image)
    assert not words_are_current(run, data)


def test_the_first_image_of_a_class_makes_them_stale_whatever_is_to_be_kept(
    data: Dataset, run: Run, backbone: Backbone, weights: Weights
) -> None:
    fitted(data, run, backbone, weights)
    changed = replace(data, samples=(*data.samples, replace(data.samples[0], id="q", labels=(2,))))
    assert not words_are_current(run, changed, keep=True)


def test_what_is_known_and_not_shown_gets_its_vector_with_its_first_image(
    data: Dataset, run: Run, backbone: Backbone, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = unit_rows(np.random.default_rng(1).standard_normal((3, 32)) + 2)
    shipped = TextFeatures(("unicorn", "okapi"), ("wall",), rows[:2], rows[2:], "m")
    monkeypatch.setattr(stage, "stand_in", lambda: shipped)
    made = own_words(data, run, backbone, weights, 1600, Heard().listener)
    assert made.images == {"tapir": 3, "unicorn": 0}
    shows = replace(data, samples=(*data.samples, replace(data.samples[0], id="q", labels=(2,))))
    assert not words_are_current(run, shows)
    again = own_words(shows, run, backbone, weights, 1600, Heard().listener)
    assert again.images == {"tapir": 3}
    assert not np.allclose(again.text.class_vectors[2], made.text.class_vectors[2])


def test_a_class_whose_images_cannot_be_read_is_fitted_when_they_can(
    data: Dataset, run: Run, backbone: Backbone, weights: Weights
) -> None:
    photo = data.samples[0].image.with_name("q.png")
    photo.write_bytes(b"no picture")
    shows = replace(data, samples=(*data.samples, Sample("q", photo, (2,))))
    fitted(shows, run, backbone, weights)
    assert words_are_current(run, shows)
    assert "encode" not in fitted(shows, run, backbone, weights).steps
    photo.unlink()
    assert words_are_current(run, shows)
    photo.write_bytes(data.samples[0].image.read_bytes())
    assert not words_are_current(run, shows, keep=True)
    heard = Heard()
    made = own_words(shows, run, backbone, weights, 1600, heard.listener)
    assert made.images["unicorn"] == 1
    assert "a class has its first image: they are fitted anew" in heard.said[0]


def test_vectors_of_an_older_clipes_do_not_say_which_images_could_not_be_read(
    data: Dataset, run: Run, backbone: Backbone, weights: Weights
) -> None:
    photo = data.samples[0].image.with_name("q.png")
    photo.write_bytes(b"no picture")
    fitted(data, run, backbone, weights)
    arrays = dict(np.load(run.words_path))
    np.savez(run.words_path, **{k: v for k, v in arrays.items() if k != "unfitted"})
    assert words_are_current(run, data)
    shows = replace(data, samples=(*data.samples, Sample("q", photo, (2,))))
    assert "encode" in fitted(shows, run, backbone, weights).steps
    assert words_are_current(run, shows)


def test_a_picture_replaced_while_vectors_are_fitted_is_noticed(
    data: Dataset, run: Run, backbone: Backbone, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "_COARSE", 0)
    photo, fit = data.samples[0].image, stage.fit_beside

    def slow_fit(*args: object, **how: object) -> Fitted:
        time.sleep(0.02)
        photo.write_bytes(photo.read_bytes()[:-1] + b"?")
        time.sleep(0.02)
        return fit(*args, **how)

    time.sleep(0.02)
    monkeypatch.setattr(stage, "fit_beside", slow_fit)
    fitted(data, run, backbone, weights)
    assert not words_are_current(run, data)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive"])
def test_damaged_vectors_are_fitted_again(
    data: Dataset, run: Run, backbone: Backbone, weights: Weights, damage: bytes
) -> None:
    fitted(data, run, backbone, weights)
    before = run.words_path.read_bytes()
    run.words_path.write_bytes(damage)
    assert not words_are_current(run, data)
    assert "encode" in fitted(data, run, backbone, weights).steps
    assert run.words_path.read_bytes() == before


def test_other_weights_get_other_vectors(
    data: Dataset, run: Run, backbone: Backbone, weights: Weights
) -> None:
    fitted(data, run, backbone, weights)
    assert "encode" in fitted(data, run, backbone, replace(weights, sha256="b" * 64)).steps


def test_images_of_which_none_can_be_read_are_an_error(
    data: Dataset, run: Run, backbone: Backbone, weights: Weights
) -> None:
    for sample in data.samples:
        sample.image.write_bytes(b"no picture")
    with pytest.raises(ImageError, match="none of 5 images can be read"):
        fitted(data, run, backbone, weights)
    assert not run.words_path.exists()


def test_of_many_images_some_of_each_class_are_looked_at(
    data: Dataset,
    run: Run,
    backbone: Backbone,
    weights: Weights,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stage, "MOST", 1)
    heard = fitted(data, run, backbone, weights)
    assert heard.steps["encode"][-1] == (2, 2)
