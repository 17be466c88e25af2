"""Planted objects are found from image-level labels; what must not change the vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image

from clipes.datasets import Dataset
from clipes.errors import VocabularyError
from clipes.maps.gradcam import channel_weights
from clipes.standin.fit import (
    BACKGROUND,
    EncodedImage,
    FitParams,
    Fitted,
    LabelledImage,
    encode,
    fit,
    gather,
)
from clipes.standin.patches import PatchFeatures, patch_features, value_path
from clipes.towers.clip import Backbone
from clipes.towers.taps import Taps
from clipes.types import Sample
from clipes.words.features import load_text_features, save_text_features
from tests.heard import Heard

WIDTH = 24
CLASSES = ("cat", "dog", "train")
KINDS = {"cat": 0, "dog": 1, "train": 2, "grass": 3, "wall": 4}
PATCHES = 60


def silent(_done: int, _total: int) -> None:
    """Take progress and say nothing."""


def plant(names: Sequence[str], seed: int) -> tuple[EncodedImage, np.ndarray]:
    """Return an image in which each name has a fifth of the patches, and each patch's owner.

    A wall that is never labelled fills the rest.
    """
    rng = np.random.default_rng(seed)
    owners = np.full(PATCHES, KINDS["wall"])
    for place, name in enumerate(names):
        owners[place * 12 : (place + 1) * 12] = KINDS[name]
    rng.shuffle(owners)
    centres = np.eye(len(KINDS), WIDTH) * 2
    patches = centres[owners] + 0.3 * rng.standard_normal((PATCHES, WIDTH)) + 1
    feature = patches.mean(0)
    features = PatchFeatures(
        (feature / np.linalg.norm(feature)).astype(np.float32), patches.astype(np.float16)
    )
    return EncodedImage(tuple(names), features), owners


def planted() -> list[tuple[EncodedImage, np.ndarray]]:
    labels = [("cat",), ("dog",), ("cat", "grass"), ("dog", "cat"), ("train", "grass"), ("train",)]
    return [plant(labels[index % len(labels)], index) for index in range(36)]


def run(images: Sequence[EncodedImage], classes: Sequence[str] = CLASSES) -> Fitted:
    return fit(images, classes, logit_scale=100.0, model="m", note="n", progress=silent)


def vector(fitted: Fitted, name: str) -> np.ndarray:
    text = fitted.text
    names = (*text.classes, *text.background_words)
    return np.concatenate([text.class_vectors, text.background_vectors])[names.index(name)]


def test_planted_objects_are_found_in_new_images() -> None:
    fitted = run([image for image, _ in planted()])
    for name in (*CLASSES, "grass"):
        image, owners = plant((name, "cat" if name != "cat" else "dog"), 1000)
        direction = vector(fitted, name) - vector(fitted, BACKGROUND)
        scores = image.features.patches.astype(np.float32) @ direction
        mine = owners == KINDS[name]
        assert scores[mine].min() > scores[~mine].max(), name


def test_result_has_classes_first_then_other_names_and_the_background() -> None:
    fitted = run([image for image, _ in planted()])
    assert fitted.text.classes == CLASSES
    assert fitted.text.background_words == ("grass", BACKGROUND)
    assert fitted.images == {"cat": 18, "dog": 12, "train": 12, "grass": 12}
    assert (fitted.text.model, fitted.text.note) == ("m", "n")
    rows = np.concatenate([fitted.text.class_vectors, fitted.text.background_vectors])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_vectors_lie_as_close_together_as_the_spread_says() -> None:
    images = [image for image, _ in planted()]
    cosines = {}
    for spread in (0.05, 0.2):
        fitted = fit(
            images,
            CLASSES,
            logit_scale=100.0,
            model="",
            note="",
            params=FitParams(spread=spread),
            progress=silent,
        )
        rows = fitted.text.class_vectors
        cosines[spread] = (rows @ rows.T)[np.triu_indices(len(rows), 1)].mean()
    assert 0.8 < cosines[0.2] < cosines[0.05] < 1


def test_order_of_images_does_not_matter() -> None:
    images = [image for image, _ in planted()]
    turned = [images[index] for index in np.random.default_rng(0).permutation(len(images))]
    a, b = run(images).text, run(turned).text
    np.testing.assert_allclose(a.class_vectors, b.class_vectors, atol=1e-5)
    np.testing.assert_allclose(a.background_vectors, b.background_vectors, atol=1e-5)


def test_order_of_classes_only_orders_the_rows() -> None:
    images = [image for image, _ in planted()]
    a, b = run(images).text, run(images, CLASSES[::-1]).text
    np.testing.assert_allclose(a.class_vectors, b.class_vectors[::-1], atol=1e-5)


def test_twice_the_same_is_the_same() -> None:
    images = [image for image, _ in planted()]
    np.testing.assert_array_equal(run(images).text.class_vectors, run(images).text.class_vectors)


def test_result_can_be_saved_and_used(tmp_path: Path) -> None:
    fitted = run([image for image, _ in planted()])
    save_text_features(tmp_path / "vectors.npz", fitted.text)
    loaded = load_text_features(tmp_path / "vectors.npz")
    assert loaded.classes == CLASSES
    np.testing.assert_allclose(loaded.class_vectors, fitted.text.class_vectors, atol=1e-6)


def test_a_class_without_an_image_is_an_error() -> None:
    images = [image for image, _ in planted()]
    with pytest.raises(VocabularyError, match="no image is labelled 'zebra', nor 1 more"):
        run(images, (*CLASSES, "zebra", "gnu"))


def test_images_that_are_all_labelled_alike_are_an_error() -> None:
    images = [plant(("cat",), seed)[0] for seed in range(3)]
    with pytest.raises(VocabularyError, match="all 3 images are labelled alike"):
        run(images, ("cat",))


def dataset(classes: tuple[str, ...], *labels: tuple[int, ...]) -> Dataset:
    samples = [Sample(f"i{n}", Path(f"i{n}.jpg"), label) for n, label in enumerate(labels)]
    return Dataset("folder", Path(), classes, tuple(samples), ())


class TestGather:
    def test_names_of_other_data_sets_become_those_of_the_classes(self) -> None:
        voc = dataset(("person", "tvmonitor"), (0, 1))
        coco = dataset(("tv", "zebra"), (1, 0))
        msrc = dataset(("face", "body", "tv"), (1, 0, 2))
        images = gather([voc, coco, msrc], ("person", "tvmonitor"))
        assert [image.names for image in images] == [
            ("person", "tvmonitor"),
            ("zebra", "tvmonitor"),
            ("person", "tvmonitor"),
        ]

    def test_other_spellings_become_those_of_the_classes(self) -> None:
        (image,) = gather([dataset(("CAT", "Dining_Table"), (0, 1))], ("cat", "diningtable"))
        assert image.names == ("cat", "diningtable")

    def test_a_name_that_is_a_class_itself_stays(self) -> None:
        (image,) = gather([dataset(("face", "person"), (0, 1))], ("person", "face"))
        assert image.names == ("face", "person")

    def test_a_class_without_an_image_is_an_error_before_anything_is_encoded(self) -> None:
        with pytest.raises(VocabularyError, match="no image is labelled 'dog'; add images"):
            gather([dataset(("cat", "dog"), (0,))], ("cat", "dog"))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    visual = VisionTransformer(64, 16, 128, 3, 4, 4.0, output_dim=32, act_layer=QuickGELU)
    return Backbone(visual, 100.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def image() -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((160, 112)))


def test_maps_along_the_value_path_resemble_the_exact_ones(
    backbone: Backbone, image: np.ndarray
) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(6, 32, generator=generator), dim=1)
    (last,) = backbone.encode(backbone.prepare(image, 1600)[None], Taps(last="gradient")).gradients
    exact = channel_weights(backbone, last, text[:3], text[3:]) @ last.activations.T
    probs = (backbone.logit_scale * text @ last.feature / last.feature.norm()).softmax(0)
    linear = (text[:3] - probs @ text) @ (last.activations @ value_path(backbone)).T
    for a, b in zip(exact.numpy(), linear.numpy(), strict=True):
        # Random weights: no MLP has learnt to be small, so the resemblance is weaker than in CLIP.
        assert np.corrcoef(a, b)[0, 1] > 0.8


def test_patches_are_thinned_evenly(backbone: Backbone, image: np.ndarray) -> None:
    every = patch_features(backbone, value_path(backbone), image, max_patches=1600, limit=1600)
    some = patch_features(backbone, value_path(backbone), image, max_patches=1600, limit=24)
    assert every.patches.shape == (70, 32)
    np.testing.assert_array_equal(some.patches, every.patches[np.arange(24) * 3])
    np.testing.assert_array_equal(some.feature, every.feature)
    assert np.linalg.norm(every.feature) == pytest.approx(1, abs=1e-5)


def test_encoding_leaves_unreadable_images_out(
    backbone: Backbone, image: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(image).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    images = [
        LabelledImage("bad", tmp_path / "bad.png", ("cat",)),
        LabelledImage("good", tmp_path / "good.png", ("dog",)),
    ]
    heard = Heard()
    params = replace(FitParams(), max_patches=20)
    (kept,) = encode(backbone, images, heard.listener, max_patches=1600, params=params)
    assert kept.names == ("dog",)
    assert len(kept.features.patches) == 10  # 20 patches for two images
    assert [failure.id for failure in heard.failures] == ["bad"]
    assert heard.steps["encode"] == [(0, 2), (1, 2), (2, 2)]
