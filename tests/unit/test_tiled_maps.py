"""Maps of pictures that towers see in tiles."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from clipes.config import PRESETS, CamParams, LooksRound, PatchParams
from clipes.errors import ImageError, UsageError
from clipes.maps.evidence import PatchEvidence
from clipes.maps.looks import Looks
from clipes.maps.maker import CamMaker
from clipes.maps.tiled import MOST_PATCHES, Layout, usual_side
from clipes.stages.cam import CamRequest, ClipRequest, DataRequest
from clipes.towers.clip import Backbone
from clipes.towers.load import load_visual
from clipes.towers.side_by_side import Towers
from clipes.types import CamMaps
from clipes.weights import read_state_dict
from clipes.words.features import TextFeatures, unit_rows
from tests.unit.clip_support import HALF, PixelTower

pytestmark = pytest.mark.usefixtures("one_thread")

PATCHES = PatchParams(
    strong=0.5,
    weak=0.5,
    rounds=(LooksRound(), LooksRound(("clip", "dino"), own_background=0.3, likeness_weight=0.4)),
)
PARAMS = CamParams(patches=PATCHES, affinity_blocks=3, max_patches=36)
IMAGE = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
LABELS = (2, 0)


@pytest.fixture(scope="module")
def maker(tiny_weights: Path) -> CamMaker:
    backbone = Backbone(load_visual(read_state_dict(tiny_weights)), 100.0, HALF, HALF)
    width = backbone.visual.proj.shape[1]
    rows = unit_rows(np.random.default_rng(0).standard_normal((5, width)))
    text = TextFeatures(("a", "b", "c"), ("x", "y"), rows[:3], rows[3:], "tiny")
    return CamMaker(Towers(backbone, {"dino": PixelTower()}), text, PARAMS)


def in_tiles(maker: CamMaker, image: np.ndarray, side: int, maps: bool = True) -> CamMaps:
    (encoded,) = maker.encode(
        [maker.prepare_tiles(lambda *window: image[window], image.shape[:2], side, LABELS)]
    )
    return maker.maps(encoded)


def taught(maker: CamMaker) -> CamMaker:
    """Let it learn two rounds from one image."""
    for number in range(2):
        (image,) = maker.encode([maker.prepare(IMAGE, LABELS)])
        statistics = maker.no_statistics(number)
        statistics.add(maker.lesson(image).statistics)
        maker = maker.with_looks(Looks.of(statistics, PATCHES))
    return maker


@pytest.mark.parametrize("rounds", [0, 2])
def test_one_tile_is_no_tile(maker: CamMaker, rounds: int) -> None:
    maker = taught(maker) if rounds else maker
    whole, tile = maker(IMAGE, LABELS), in_tiles(maker, IMAGE, 96)
    np.testing.assert_allclose(tile.maps, whole.maps, atol=2e-3)  # float16 after other roundings
    assert tile.size == whole.size
    np.testing.assert_array_equal(tile.labels, whole.labels)


@pytest.mark.parametrize("rounds", [0, 2])
def test_tiles_that_show_the_same_get_the_same(maker: CamMaker, rounds: int) -> None:
    """Two equal halves far from each other: no tile sees both, and both count the same."""
    maker = taught(maker) if rounds else maker
    grey = np.full((96, 24 * 16, 3), 127, np.uint8)
    image = np.concatenate([IMAGE, grey, IMAGE], 1)
    found = in_tiles(maker, image, 96)
    assert found.maps.shape == (2, 6, 36)
    # But for the first column, which is at the border in one of them and beside grey in the other.
    np.testing.assert_allclose(found.maps[..., 1:5], found.maps[..., 31:35], atol=0.2)
    assert found.maps.min() == 0
    np.testing.assert_allclose(found.maps.max((1, 2)), 1, atol=1e-3)


def test_maps_are_scaled_by_the_picture_not_by_the_tile(maker: CamMaker) -> None:
    grey = np.full((96, 96 * 6, 3), 127, np.uint8)
    found = in_tiles(maker, np.concatenate([IMAGE, grey], 1), 96).maps
    highest = [found[..., first : first + 6].max() for first in (0, 18, 30)]
    assert highest[0] == pytest.approx(1, abs=1e-3)  # a tile of its own would have one as well
    assert max(highest[1:]) < 1


def test_what_was_kept_is_what_was_seen(maker: CamMaker) -> None:
    image = np.random.default_rng(1).integers(0, 256, (150, 200, 3), np.uint8)
    read = lambda *window: image[window]  # noqa: E731
    (encoded,) = maker.encode([maker.prepare_tiles(read, (150, 200), 96, LABELS)])
    evidence = encoded.evidence
    assert isinstance(evidence, PatchEvidence)
    assert evidence.tiles is not None
    assert evidence.attention.shape == (len(evidence.tiles), 36, 36)
    again = PatchEvidence.from_arrays(evidence.to_arrays(), torch.device("cpu"))
    assert again.tiles == evidence.tiles
    torch.testing.assert_close(again.attention, evidence.attention)
    torch.testing.assert_close(again.of(("clip", "dino")), evidence.of(("clip", "dino")))


def test_tiles_cover_the_picture_pixel_by_pixel() -> None:
    layout = Layout.of((10_000, 20_000), 2048, 16, 1600)
    assert layout.grid == (195, 391)
    seen = np.zeros((10_000, 20_000), bool)
    for tile in layout.tiles:
        rows, columns = layout.pixels(tile)
        assert abs(rows.stop - rows.start - 2048) < 8
        seen[rows, columns] = True
    assert seen.all()


def test_a_picture_has_so_many_patches_at_most() -> None:
    for size in ((10_000, 20_000), (1_000, 1_000_000), (31_000, 32_000)):
        side = usual_side(size, 2048, 1600)
        layout = Layout.of(size, side, 16, 1600)
        assert layout.grid[0] * layout.grid[1] <= MOST_PATCHES
    with pytest.raises(ImageError, match=r"more than 100000; give --tile 1792 or more") as error:
        Layout.of((10_000, 20_000), 1024, 16, 1600)
    Layout.of((10_000, 20_000), 1792, 16, 1600)
    assert "has" in str(error.value)


@pytest.mark.parametrize(
    ("size", "side"),
    [
        ((10, 20_000_000), 2048),  # one row of patches, and no less
        ((1, 1_000_000_000), 2048),
        ((77, 3_900_000), 1024),  # two rows of patches up to 2053 pixels, then one
        ((10_000, 20_000), 256),  # fewer patches a tile, as many of the picture
    ],
)
def test_the_side_that_is_advised_is_the_least_that_will_do(
    size: tuple[int, int], side: int
) -> None:
    with pytest.raises(ImageError, match="or more") as error:
        Layout.of(size, side, 16, 1600)
    (advised,) = map(int, re.findall(r"--tile (\d+)", error.value.remedy))
    assert advised > side
    Layout.of(size, advised, 16, 1600)
    with pytest.raises(ImageError, match="or more"):
        Layout.of(size, advised - 64, 16, 1600)
    Layout.of(size, usual_side(size, side, 1600), 16, 1600)


def test_gradients_are_not_compared_across_tiles() -> None:
    with pytest.raises(UsageError, match=r"preset reference cannot see in tiles.*another preset"):
        CamRequest(DataRequest("voc"), ClipRequest(), PRESETS["reference"], tile=1024)


@pytest.mark.parametrize("side", [0, -1, 255])
def test_tiles_that_are_too_small_are_refused(side: int) -> None:
    with pytest.raises(UsageError, match=rf"tiles of {side} pixels are too small; take 256 or"):
        CamRequest(DataRequest("voc"), ClipRequest(), PRESETS["default"], tile=side)
