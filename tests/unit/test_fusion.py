"""Synonym fusion against a literal one with autograd, and what must not change a map."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from open_clip.transformer import VisionTransformer

from clipes.bench import literal
from clipes.choices import Descriptions, Fusion
from clipes.config import CamParams, PatchParams
from clipes.errors import VocabularyError
from clipes.listener import Listener
from clipes.maps.fusion import MakeMaps, fused_maps
from clipes.maps.gradcam import softmax_gradcam
from clipes.maps.maker import CamMaker
from clipes.stages.setup import OpenedWeights, open_weights
from clipes.towers.clip import Backbone
from clipes.towers.side_by_side import Towers
from clipes.towers.taps import Taps
from clipes.words.encode import from_given, text_features
from clipes.words.features import TextFeatures, fuse_vectors, unit_rows
from clipes.words.vocabulary import Vocabulary
from tests.unit.clip_support import quiet

OUT, SCALE = 32, 30.0
MEAN = STD = (0.5, 0.5, 0.5)


def make_units(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, OUT, generator=generator), dim=1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    visual = VisionTransformer(64, 16, 64, 5, 4, 4.0, output_dim=OUT)
    return Backbone(visual, SCALE, MEAN, STD)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (70, 100, 3), np.uint8)


@pytest.fixture(scope="module")
def make(backbone: Backbone, image: np.ndarray) -> MakeMaps:
    encoded = backbone.encode(backbone.prepare(image, 1600)[None], Taps(last="gradient"))
    return partial(softmax_gradcam, backbone, encoded.gradients[0], encoded.grid)


def literal_map(
    backbone: Backbone, image: np.ndarray, target: torch.Tensor, rivals: torch.Tensor
) -> np.ndarray:
    """One class's map by autograd, scaled to [0, 1]."""
    visual = backbone.visual
    prepared = backbone.prepare(image, 1600)
    tokens, _ = literal.run_blocks(visual, literal.embed(visual, prepared))
    weights, activations = literal.channel_weights(visual, tokens, target[None], rivals, SCALE)
    raw = (weights @ activations.T).clamp(min=0).reshape(5, 7)
    return ((raw - raw.min()) / (raw.max() - raw.min())).numpy()


@pytest.mark.parametrize("largest", [False, True])
def test_maps_are_fused_as_described(
    backbone: Backbone, image: np.ndarray, make: MakeMaps, largest: bool
) -> None:
    text, background = make_units(1, 3), make_units(2, 4)
    synonyms = [text[:1], make_units(3, 3), make_units(4, 2)]
    plain = make(text, background)
    maps = fused_maps(plain, make, text, background, synonyms, largest=largest)

    np.testing.assert_array_equal(maps[0], plain[0])
    for row in (1, 2):
        others = torch.stack([text[k] for k in range(3) if k != row])
        rivals = torch.cat([others, background])
        each = [literal_map(backbone, image, vector, rivals) for vector in synonyms[row]]
        fused = np.max(each, 0) if largest else np.mean(each, 0)
        expected = (fused - fused.min()) / (fused.max() - fused.min())
        np.testing.assert_allclose(maps[row], expected, atol=1e-4)
    assert maps.min() >= 0
    assert maps.max() <= 1


@pytest.mark.parametrize("largest", [False, True])
def test_synonyms_that_say_the_same_change_nothing(make: MakeMaps, largest: bool) -> None:
    text, background = make_units(5, 2), make_units(6, 3)
    same = [text[:1].repeat(4, 1), text[1:].repeat(2, 1)]
    maps = fused_maps(make(text, background), make, text, background, same, largest=largest)
    plain = fused_maps(make(text, background), make, text, background, [])
    np.testing.assert_allclose(maps, plain, atol=5e-4)  # scaling magnifies rounding


def test_the_order_of_synonyms_changes_nothing(make: MakeMaps) -> None:
    text, background = make_units(7, 1), make_units(8, 3)
    synonyms = make_units(9, 4)
    maps = fused_maps(make(text, background), make, text, background, [synonyms])
    back = fused_maps(make(text, background), make, text, background, [synonyms.flip(0)])
    np.testing.assert_allclose(back, maps, atol=1e-6)


def test_the_mean_of_vectors_is_a_unit_vector_between_them() -> None:
    vectors = make_units(1, 3).numpy()
    fused = fuse_vectors(vectors)
    mean = [sum(float(v[e]) for v in vectors) / 3 for e in range(OUT)]
    length = sum(x * x for x in mean) ** 0.5
    np.testing.assert_allclose(fused, [x / length for x in mean], rtol=1e-5)
    np.testing.assert_array_equal(fuse_vectors(vectors[:1]), vectors[0])


def real_features(shared: Path) -> TextFeatures:
    """Real vectors of single words as one file of class rows."""
    with np.load(shared / "features" / "photo_of_a.npz", allow_pickle=False) as file:
        names, vectors = file["words"], unit_rows(file["features"])
    keep = [k for k, name in enumerate(names) if name == name.strip()]
    sky = names.tolist().index("sky")
    return TextFeatures(
        tuple(names[keep].tolist()), ("sky",), vectors[keep], vectors[[sky]], "ViT-B-16"
    )


def test_real_synonyms_fuse_to_what_they_share(shared: Path) -> None:
    given = real_features(shared)
    words = Vocabulary(
        ("person", "tvmonitor", "dog"),
        (),
        {"person": ("person", "people", "baby"), "tvmonitor": ("tv", "monitor", "screen")},
    )
    fused = from_given(given, words, Fusion.feature)
    assert fused.classes == words.classes
    assert fused.phrase_vectors == ()
    of_maps = from_given(given, words, Fusion.cam)
    np.testing.assert_array_equal(of_maps.class_vectors, fused.class_vectors)
    for row, names in enumerate((("person", "people", "baby"), ("tv", "monitor", "screen"))):
        singles = given.for_classes(names).class_vectors
        np.testing.assert_array_equal(of_maps.phrase_vectors[row], singles)
        to_fused, among = singles @ fused.class_vectors[row], singles @ singles.T
        # The mean is nearer to each word than the words are to each other, on average.
        assert to_fused.min() > (among.sum() - 3) / 6
    np.testing.assert_array_equal(
        fused.class_vectors[2], given.for_classes(("dog",)).class_vectors[0]
    )
    plain = from_given(given, words, Fusion.sentence)
    np.testing.assert_array_equal(
        plain.class_vectors, given.for_classes(words.classes).class_vectors
    )
    missing = replace(words, synonyms={"dog": ("dog", "no such word")})
    with pytest.raises(VocabularyError, match="'no such word'"):
        from_given(given, missing, Fusion.cam)


@pytest.fixture(scope="module")
def opened(tiny_weights: Path) -> OpenedWeights:
    return open_weights(str(tiny_weights), "ViT-B-16", "cpu", Listener())


@pytest.mark.parametrize("params", [CamParams(), CamParams(patches=PatchParams())])
@pytest.mark.parametrize(
    ("fusion", "descriptions"),
    [*((fusion, None) for fusion in Fusion), *((Fusion.sentence, how) for how in Descriptions)],
)
def test_the_order_in_the_vocabulary_never_changes_a_map(
    fusion: Fusion,
    descriptions: Descriptions | None,
    params: CamParams,
    opened: OpenedWeights,
    tmp_path: Path,
    image: np.ndarray,
) -> None:
    backbone = Backbone(opened.visual(), opened.logit_scale, MEAN, STD)
    words = Vocabulary(
        ("cat", "dog", "person", "sofa"),
        ("sky", "grass", "road"),
        {"person": ("people", "human"), "sofa": ("sofa", "couch", "settee")},
        descriptions={"cat": ("whiskers", "paws"), "sofa": ("soft cushions",)},
    )
    shuffled = replace(
        words, classes=("sofa", "person", "cat", "dog"), background=("road", "sky", "grass")
    )
    maps = []
    for vocabulary in (words, shuffled):
        features = text_features(
            vocabulary,
            opened.state,
            opened.weights,
            file=None,
            cache=tmp_path,
            say=quiet,
            fusion=fusion,
            descriptions=descriptions,
        )
        labels = [vocabulary.classes.index(name) for name in ("person", "cat", "sofa")]
        maker = CamMaker(Towers(backbone), features, params)
        maps.append(maker(image, labels).maps)
        other_way_round = maker(image, labels[::-1])
        np.testing.assert_array_equal(other_way_round.maps[::-1], maps[-1])
        assert other_way_round.labels.tolist() == labels[::-1]
    np.testing.assert_array_equal(maps[0], maps[1])
    assert maps[0].std() > 0.05
