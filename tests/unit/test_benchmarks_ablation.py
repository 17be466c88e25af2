"""The ablation's rows are what the product makes, and its tables what was counted."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from clipes.disk.images import read_image, read_mask
from clipes.listener import Listener
from clipes.maps.maker import CamMaker
from clipes.masks.pseudo import cam_mask
from clipes.masks.scores import ConfusionMatrix
from clipes.run.folder import Run
from clipes.stages.images import ImageSource
from clipes.stages.learn_looks import learn_looks
from clipes.towers.side_by_side import Towers
from clipes.types import CamMaps
from clipes.words.features import TextFeatures, unit_rows
from tests.photos_support import random_photo
from tests.torch_threads import torch_threads
from tests.unit.clip_support import PixelTower, small_backbone

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LABELS = [(0,), (0, 2), (1,), (1, 2), (0, 1), (2,)]


@pytest.fixture(scope="module", autouse=True)
def ablation() -> Iterator[ModuleType]:
    with torch_threads(1), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield import_module("ablation")


@pytest.fixture(scope="module")
def photos(ablation, tmp_path_factory) -> list[object]:
    """Four photos of one data set and two of another."""
    folder, made = tmp_path_factory.mktemp("photos"), []
    for number, labels in enumerate(LABELS):
        sample = random_photo(folder, number, labels, (7, 6), (112, 96))
        data = "first" if number < 4 else "second"
        made.append(ablation.Photo(data, number % 2, sample))
    return made


@pytest.fixture(scope="module")
def make():
    rows = unit_rows(np.random.default_rng(9).standard_normal((5, 32)))
    text = TextFeatures(("cat", "dog", "sofa"), ("grass", "wall"), rows[:3], rows[3:], "tiny")
    clip = small_backbone()
    return lambda row: CamMaker(Towers(clip, {"dino": PixelTower()}), text, row.cam)


def product(maker: CamMaker, row, photos, learnt_from, folder: Path) -> list[CamMaps]:
    """What ``clipes cam`` makes of photos of which some say what classes look like."""
    samples, ids, patches = [photo.sample for photo in photos], frozenset(), row.cam.patches
    if patches is not None and patches.learns:
        given = ([samples[k] for k in learnt_from], maker, Run(folder), patches)
        maker, ids = learn_looks(*given, ImageSource(None), Listener(), workers=1)
    encoded = maker.encode([maker.prepare(read_image(s.image), s.labels) for s in samples])
    return [maker.maps(image, in_statistics=str(k) in ids) for k, image in enumerate(encoded)]


@pytest.mark.parametrize(
    ("row", "learnt_from"),
    [
        ("published", ()),
        ("One image alone: fast", ()),
        ("to CLIP alone: clip", range(6)),
        ("both towers: default", range(6)),
        ("own background 0.25", range(6)),
        ("a sample of 10, and its own", (0, 5)),
        ("other images and its own", (0, 1, 2, 3, 4)),  # as the last of the photos has it
    ],
)
def test_a_row_makes_the_products_maps(ablation, photos, make, row, learnt_from, tmp_path):
    ((given, *_), *_) = ablation.chosen(ablation.sections("voc"), [row]).values()
    if "sample" in row:
        given = ablation._patches(given, row, statistics_images=2)
    tapes = import_module("tapes")
    encoded = [tape.encoded for tape in tapes.tape_all(make(given), photos)]
    got = list(tapes.row_maps(given, make(given), encoded))
    expected = product(make(given), given, photos, learnt_from, tmp_path)
    for mine, theirs in list(zip(got, expected, strict=True))[5 if "other images" in row else 0 :]:
        np.testing.assert_allclose(mine.maps, theirs.maps, atol=2e-3)  # of fp16, in batches or not


def test_every_row_runs_and_stands_in_the_tables(ablation, photos, make):
    given = ablation.sections("voc")
    names = [(title, row.name) for title, rows in given.items() for row in rows]
    assert len(set(names)) == len(names) > 50
    found = ablation.run(given, [*photos[:2], photos[4]], make, 4, crf="main")
    rows = [(title, row) for title, rows in given.items() for row in rows for _ in range(2)]
    for one, (title, row) in zip(found, rows, strict=True):
        assert (one.section, one.row, one.crf is not None) == (title, row.name, row.main)
        assert all(0 < value <= 100 for value in (one.cam.half_a, one.cam.half_b, one.cam.full))
    first = [one for one in found if one.data == "first"]
    assert len({round(one.cam.full, 6) for one in first}) > len(first) / 2, "rows do nothing"
    lines = ablation.table(first).splitlines()
    assert len(lines) == 2 + len(given) + len(first)
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith(f"| published | {first[0].cam.half_a:.2f} |")


def test_scores_are_those_of_the_halves_of_each_data_set(ablation, photos, make):
    ((row,),) = ablation.chosen(ablation.sections("voc"), ["Published: published"]).values()
    found = ablation.run({"Published": [row]}, photos, make, 4, crf="none")
    for one, first, last in zip(found, (0, 4), (4, 6), strict=True):
        halves = range(first, last, 2), range(first + 1, last, 2), range(first, last)
        for got, chosen in zip((one.cam.half_a, one.cam.half_b, one.cam.full), halves, strict=True):
            matrix = ConfusionMatrix(4)
            for sample in (photos[k].sample for k in chosen):
                cams = make(row)(read_image(sample.image), sample.labels)
                matrix.update(read_mask(sample.mask), cam_mask(cams, row.exponent))
            assert got == pytest.approx(100 * matrix.scores().miou)
