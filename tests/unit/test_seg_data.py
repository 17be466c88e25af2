"""The endless sequence of views, and files that do not fit."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipes.config import SegmenterPreset
from clipes.disk.images import write_confidence, write_mask
from clipes.errors import ArtifactError, ClipesError, ImageError
from clipes.seg.data import (
    TrainingPair,
    TrainingSet,
    batches,
    check_pairs,
)
from clipes.seg.loss import Guidance
from clipes.seg.recipes import Batch, Examples

PRESET = SegmenterPreset("test", crop=32, colour=0.1)


def quiet(_done: int, _total: int) -> None:
    pass


@pytest.fixture
def pairs(tmp_path: Path) -> list[TrainingPair]:
    rng = np.random.default_rng(0)
    made = []
    for index in range(5):
        pair = TrainingPair(
            f"p{index}",
            tmp_path / f"p{index}.jpg",
            tmp_path / f"m{index}.png",
            tmp_path / f"c{index}.png",
        )
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(pair.image)
        write_mask(pair.mask, np.full((40, 50), index % 3, np.uint8))
        assert pair.confidence
        write_confidence(pair.confidence, rng.random((40, 50), np.float32))
        made.append(pair)
    return made


def test_a_position_always_gives_the_same_view(pairs: list[TrainingPair]) -> None:
    first, second = (TrainingSet(pairs, 3, PRESET, seed=4) for _ in range(2))
    for position in (7, 0, 12):
        for one, other in zip(first[position], second[position], strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(first[0][0], TrainingSet(pairs, 3, PRESET, seed=5)[0][0])


def test_every_pass_shows_every_example_in_another_order(pairs: list[TrainingPair]) -> None:
    flat = SegmenterPreset("test", crop=8, scale=(1.0, 1.0))
    for index, pair in enumerate(pairs):
        write_mask(pair.mask, np.full((40, 50), index, np.uint8))
    data = TrainingSet(pairs, 5, flat, seed=0)
    passes = [[int(data[5 * turn + place][1].max()) for place in range(5)] for turn in range(4)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in passes)
    assert len({tuple(order) for order in passes}) > 1
    assert not torch.equal(data[0][0], data[5 + passes[1].index(passes[0][0])][0])


def test_a_rare_class_comes_as_often_as_another_if_that_is_asked_for(
    pairs: list[TrainingPair],
) -> None:
    flat = SegmenterPreset("test", crop=8, scale=(1.0, 1.0), even_classes=True)
    for index, pair in enumerate(pairs):
        write_mask(pair.mask, np.full((40, 50), index, np.uint8))
    labelled = [replace(pair, labels=(index // 4,)) for index, pair in enumerate(pairs)]
    data = TrainingSet(labelled, 5, flat, seed=0)
    shown = [int(data[position][1].max()) for position in range(16)]
    assert shown.count(4) == 8
    assert set(shown) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_threads_that_load_change_nothing(pairs: list[TrainingPair], workers: int) -> None:
    data = TrainingSet(pairs, 3, PRESET, seed=1)
    positions = [range(start, start + 3) for start in range(0, 60, 3)]  # twelve passes
    alone = list(batches(data, positions, 0, pin=False))
    helped = list(batches(data, positions, workers, pin=False))
    assert len(alone) == 20
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_one_line_from_any_thread(pairs: list[TrainingPair], workers: int) -> None:
    pairs[2].image.write_bytes(b"junk")
    data = TrainingSet(pairs, 3, PRESET, seed=1)
    with pytest.raises(ImageError, match=r"p2\.jpg") as error:
        list(batches(data, [range(5)], workers, pin=False))
    assert "\n" not in str(error.value)


class _Counted(Examples):
    """Numbers, and how many were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitem__(self, position: int) -> Batch:
        self.asked.append(position)
        return (torch.tensor(position),)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_few_batches_are_loaded_ahead(workers: int) -> None:
    before = threading.active_count()
    data = _Counted()
    with closing(batches(data, [[number] for number in range(100)], workers, pin=False)) as stream:
        assert [int(next(stream)[0]) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert threading.active_count() == before
    assert set(range(5)) <= set(data.asked)
    assert len(data.asked) <= 5 + 2 * workers


def test_the_pixels_that_count_are_counted(pairs: list[TrainingPair]) -> None:
    confidence = np.tile(np.array([0.0, 0.25, 0.5, 1.0], np.float32), (40, 13))[:, :50]
    for pair in pairs:
        assert pair.confidence
        write_confidence(pair.confidence, confidence)
    mask = np.full((40, 50), 255, np.uint8)
    mask[:10] = 2
    write_mask(pairs[4].mask, mask)  # its other neighbours: 0, 1, 2, 0
    everything = check_pairs(pairs, 3, Guidance(None), quiet)
    assert (everything.pixels, everything.labelled) == (10000, 8500)
    assert everything.used.tolist() == [4000, 2000, 2500]
    # Columns of 0, 0.25, 0.5, 1: 13, 13, 12, 12.
    assert check_pairs(pairs, 3, Guidance(None, soft=True), quiet).used.tolist() == [
        2960,
        1480,
        1850,
    ]
    sure = check_pairs(pairs, 3, Guidance(0.5), quiet)
    assert (sure.pixels, sure.labelled) == (10000, 8500)
    assert sure.used.tolist() == [1920, 960, 1200]


def test_what_does_not_fit_is_known_before_training(pairs: list[TrainingPair]) -> None:
    check_pairs(pairs, 3, Guidance(None), quiet)
    with pytest.raises(ArtifactError, match=r"label 2, but there are 1 classes"):
        check_pairs(pairs, 2, Guidance(None), quiet)
    write_mask(pairs[3].mask, np.zeros((40, 49), np.uint8))
    with pytest.raises(ArtifactError, match=r"p3: the image is 40 x 50, its mask 40 x 49"):
        check_pairs(pairs, 3, Guidance(None), quiet)
    write_mask(pairs[3].mask, np.full((40, 50), 255, np.uint8))
    assert pairs[3].confidence
    write_confidence(pairs[3].confidence, np.zeros((20, 50), np.float32))
    with pytest.raises(ArtifactError, match=r"p3: the confidence map is 20 x 50"):
        check_pairs(pairs, 3, Guidance(None), quiet)
    pairs[3].confidence.unlink()
    with pytest.raises(ClipesError, match=r"c3\.png"):
        check_pairs(pairs, 3, Guidance(None), quiet)


def test_without_a_map_every_pixel_is_sure(pairs: list[TrainingPair]) -> None:
    pair = pairs[0]
    _, _, confidence = TrainingPair(pair.id, pair.image, pair.mask, None).read(3)
    assert (confidence == 1).all()
