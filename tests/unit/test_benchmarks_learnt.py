"""What corrections are worth to the other images, and rare classes, on towers of toy size."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from clipes.maps.maker import CamMaker
from clipes.masks.scores import ConfusionMatrix
from clipes.towers.side_by_side import Towers
from clipes.words.features import TextFeatures, unit_rows
from tests.photos_support import random_photo
from tests.torch_threads import torch_threads
from tests.unit.clip_support import PixelTower, small_backbone

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CLASSES = ("cat", "dog", "sofa", "tree")
LABELS = [(k % 4,) for k in range(10)] + [(0, 1), (2, 3)]


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[dict[str, ModuleType]]:
    with torch_threads(1), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: import_module(name) for name in ("ablation", "tapes", "loop", "rare")}


@pytest.fixture(scope="module")
def make():
    rows = unit_rows(np.random.default_rng(9).standard_normal((6, 32)))
    text = TextFeatures(CLASSES, ("grass", "wall"), rows[:4], rows[4:], "tiny")
    clip = small_backbone()
    return lambda row: CamMaker(Towers(clip, {"dino": PixelTower()}), text, row.cam)


@pytest.fixture(scope="module")
def tapes(modules, make, tmp_path_factory) -> list[object]:
    folder, photos = tmp_path_factory.mktemp("photos"), []
    for number, labels in enumerate(LABELS):
        sample = random_photo(folder, number, labels, (6, 5), (96, 80))
        photos.append(modules["tapes"].Photo("first", number % 2, sample))
    row = modules["ablation"].row_of("default", "voc")
    return list(modules["tapes"].tape_all(make(row), photos))


def test_other_images_are_scored_before_and_after_corrections_are_learnt(modules, make, tapes):
    row = modules["ablation"].row_of("default", "voc")
    loop, queue = modules["loop"], [str(k) for k in (3, 8, 1, 0, 2, 4, 5, 6, 7, 9, 10, 11)]
    points = loop.curve_again(queue, tapes, make(row), row, 4)
    assert [point.images for point in points] == [1, 1, 2]
    assert points[0].before == points[1].before
    for point, gone in zip(points[1:], ({3}, {3, 8}), strict=True):
        drawn = {k: loop._truth(tapes[k]) for k in gone}
        rest = [k for k in range(12) if k not in gone]
        for learnt_from, got in (({}, point.before), (drawn, point.after)):
            encoded = [tape.encoded for tape in tapes]
            maker = modules["tapes"].learnt(make(row), row.cam.patches, encoded, learnt_from)
            for part, score in zip(
                (rest, [k for k in rest if k % 2 == 0], [k for k in rest if k % 2]),
                got,
                strict=True,
            ):
                matrix = ConfusionMatrix(5)
                for k in part:
                    cams = maker.maps(tapes[k].encoded, in_statistics=True)
                    mask = modules["tapes"].tape_mask(tapes[k], cams, row)
                    matrix.update(loop._truth(tapes[k]), mask)
                assert score == pytest.approx(matrix.scores().miou)
    assert points[-1].before != points[-1].after
    assert loop.table_again(points).splitlines()[-1].startswith("| 20 % | 2 | ")


def test_runs_are_made_thin_where_it_is_said(modules):
    thinned = modules["rare"].thinned
    labels = [(0,), (1,), (0, 1), (2,), (0, 2), (0,), (3,), (0, 3)]
    assert thinned(labels, [0], 8, 0) == list(range(8))
    # Images that show two of the rare classes are none of either's.
    kept = thinned(labels, [0, 3], 1, 0)
    assert {1, 3} < set(kept)
    assert 7 not in kept
    assert len(kept) == 4
    assert len({tuple(thinned(labels, [0], 1, seed)) for seed in range(9)}) > 1


def test_a_rare_class_is_scored_over_the_images_left_of_it(modules, make, tapes):
    rare, row = modules["rare"], modules["ablation"].row_of("default", "voc")
    fast = modules["ablation"].row_of("fast", "voc")
    thin = rare.Thin(tapes, make(row), row, (make(fast), fast), 4)
    found = list(thin.measure(2, 0))
    assert [one.label for one in found] == [0, 1, 2, 3]
    assert all(0 <= value <= 1 for one in found for value in (one.fast, one.default))
    one = found[1]
    kept = rare.thinned(LABELS, [1], 2, 0)
    chosen = [k for k in kept if 1 in LABELS[k]]
    assert len(chosen) == 2
    encoded = [tapes[k].encoded for k in kept]
    learnt = modules["tapes"].learnt(make(row), row.cam.patches, encoded)
    for got, maker, how in ((one.fast, make(fast), fast), (one.default, learnt, row)):
        both = [0, 0]
        for k in chosen:
            cams = maker.maps(tapes[k].encoded, in_statistics=True)
            mask = modules["tapes"].tape_mask(tapes[k], cams, how) == 2
            truth = modules["loop"]._truth(tapes[k]) == 2
            both = [both[0] + (mask & truth).sum(), both[1] + (mask | truth).sum()]
        assert got == pytest.approx(both[0] / both[1])
    assert not list(thin.measure(9, 0))  # no class has so many
    lines = rare.table(found, CLASSES).splitlines()
    assert len(lines) == 3
    assert lines[-1].startswith("| 2 | 4 | ")
