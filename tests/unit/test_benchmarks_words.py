"""The curve of images a class: what is left out, which runs are made, what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from clipes.datasets import Dataset, open_dataset
from clipes.words.features import TextFeatures, load_text_features
from tests.cli.small_data import CLASSES, write_clip, write_photos
from tests.torch_threads import torch_threads

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def words() -> Iterator[ModuleType]:
    with torch_threads(1), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield import_module("words")


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    write_photos(tmp_path / "photos", 6)
    return open_dataset("folder", root=tmp_path / "photos")


@pytest.fixture
def vectors(tmp_path: Path) -> TextFeatures:
    write_clip(tmp_path / "clip.safetensors", tmp_path / "text.npz")
    return load_text_features(tmp_path / "text.npz")


def test_a_class_is_left_out_wherever_it_stands(words: ModuleType, vectors: TextFeatures) -> None:
    left = words.without(vectors, "dog")
    assert left.classes == ("cat", "sofa")
    assert left.background_words == ("grass", "sky")
    assert left.lacks(CLASSES) == ["dog"]
    assert words.without(vectors, "Sky").background_words == ("grass",)
    assert words.without(vectors, "zebra").classes == CLASSES


def test_runs_have_as_many_images_with_the_class_as_without(
    words: ModuleType, data: Dataset
) -> None:
    runs = list(words.parts(data, 0, 1, 5))
    assert [[sample.id for sample in run[:1]] for run in runs] == [["p000"], ["p003"]]
    for run in runs:
        assert len(run) == 2
        assert 0 not in run[1].labels
    assert list(words.parts(data, 0, 3, 5)) == []


def test_each_point_is_the_iou_of_the_class_alone(
    words: ModuleType,
    data: Dataset,
    vectors: TextFeatures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(words, "stand_in", lambda: vectors)
    (asked,) = words.parts(data, 0, 2, 3)
    setting = words.prepare(data, (*asked, *asked), "fast", str(tmp_path / "clip.safetensors"))
    assert setting.encoded.keys() == {sample.id for sample in asked}
    point = words.measure(setting, 0, 2, 3, tmp_path / "runs")
    assert (point.name, point.count, point.runs) == ("cat", 2, 1)
    assert 0 <= point.cam <= 1
    assert 0 <= point.crf <= 1
    fitted = load_text_features(tmp_path / "runs" / "0-2-0" / "text.npz")
    assert fitted.classes == CLASSES
    assert words.measure(setting, 0, 50, 3, tmp_path / "runs") is None
    better = words.Point("dog", 2, 1, 1.0, 0.5)
    *_, row = words.table([point, better]).splitlines()
    assert row.startswith(f"| 2 | 2 | {50 * (point.cam + 1):.2f} |")
