"""The pass over a run's images: stopped, continued, damaged, shared."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from clipes.config import PatchParams
from clipes.errors import ArtifactError, BackendError, ImageError
from clipes.maps.looks import Statistics
from clipes.run.folder import Run
from clipes.run.origin import Picture
from clipes.stages import learn_looks as stage
from clipes.stages.learn_looks import learn_looks, load_looks
from clipes.stages.make_cams import KeptSights
from clipes.types import Sample, evenly_spaced
from tests.unit.clip_support import quiet

PATCHES = PatchParams(statistics_images=40)
WIDTH = 6


class Maker:
    """Makes sums that only depend on the image's number; images 7 and 17 cannot be read."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls: list[int] = []
        self.stop_after = stop_after
        self.lock = threading.Lock()

    def no_statistics(self) -> Statistics:
        return Statistics.empty(2, WIDTH)

    def prepare(self, image: int, labels: tuple[int, ...]) -> int:
        return image

    def look(self, images: list[int]) -> list[int]:
        return images

    def statistics(self, image: int, patches: PatchParams) -> Statistics:
        with self.lock:
            if len(self.calls) == self.stop_after:
                raise KeyboardInterrupt
            self.calls.append(image)
        rng = np.random.default_rng(image)
        moment = rng.standard_normal((30, WIDTH))
        return Statistics(rng.standard_normal((3, WIDTH)), rng.random(3) + 1, moment.T @ moment)


@pytest.fixture(autouse=True)
def _pictures(monkeypatch):
    def read(path: Path) -> tuple[int, Picture]:
        if path.stem in ("007", "017"):
            raise ImageError(f"{path} is empty")
        return int(path.stem), Picture(path.stem, 1, 0)

    monkeypatch.setattr(stage, "read_picture", read)


def samples(count: int) -> list[Sample]:
    return [Sample(f"{k:03}", Path(f"{k:03}.jpg"), (0, 1), None) for k in range(count)]


def learn(run: Run, maker: Maker, count: int = 30, workers: int = 2, batch: int = 1):
    return learn_looks(
        samples(count),
        maker,
        run,
        PATCHES,
        kept=KeptSights(),
        batch=batch,
        workers=workers,
        say=quiet,
        progress=lambda *_: None,
    )


def test_images_that_cannot_be_read_say_nothing(tmp_path):
    looks, ids = learn(Run(tmp_path), Maker())
    assert ids == {sample.id for sample in samples(30)} - {"007", "017"}
    expected = Statistics.empty(2, WIDTH)
    for id_ in sorted(ids):
        expected.add(Maker().statistics(int(id_), PATCHES))
    np.testing.assert_array_equal(looks.sums, expected.sums)


@pytest.mark.parametrize("stop_after", [0, 1, 11, 27])
def test_a_pass_that_was_stopped_ends_with_the_same_bits(stop_after, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_SECONDS_BETWEEN_WRITES", 0.0)
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    learn(whole, Maker())
    with pytest.raises(KeyboardInterrupt):
        learn(broken, Maker(stop_after), workers=1)
    rest = Maker()
    learn(broken, rest, workers=3)
    assert len(rest.calls) <= 28 - stop_after + 1
    assert broken.looks_path.read_bytes() == whole.looks_path.read_bytes()


@pytest.mark.parametrize("batch", [4, 7, 100])
def test_batches_change_nothing(batch, tmp_path):
    alone, together = Run(tmp_path / "alone"), Run(tmp_path / "together")
    learn(alone, Maker())
    learn(together, Maker(), batch=batch)
    with np.load(alone.looks_path) as expected, np.load(together.looks_path) as got:
        for name in ("sums", "mass", "moment"):  # the sums of batches are added, not of images
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-12)
        assert got["ids"].tolist() == expected["ids"].tolist()


@pytest.mark.parametrize("stop_after", [3, 10])
def test_a_stopped_pass_goes_on_with_whole_batches(stop_after, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_SECONDS_BETWEEN_WRITES", 0.0)
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    learn(whole, Maker(), batch=4)
    with pytest.raises(KeyboardInterrupt):
        learn(broken, Maker(stop_after), workers=1, batch=4)
    learn(broken, Maker(), batch=4)
    assert broken.looks_path.read_bytes() == whole.looks_path.read_bytes()


def test_images_too_large_for_a_gpu_say_nothing_and_end_nothing(tmp_path):
    class Small(Maker):
        def look(self, images: list[int]) -> list[int]:
            if 5 in images:
                raise BackendError("the GPU has too little memory")
            return images

    _, ids = learn(Run(tmp_path), Small(), batch=4)
    assert ids == {sample.id for sample in samples(30)} - {"005", "007", "017"}


def test_a_finished_pass_is_not_done_again(tmp_path):
    run, again = Run(tmp_path), Maker()
    looks, ids = learn(run, Maker())
    same, same_ids = learn(run, again, count=200)  # the list of images has grown since
    assert again.calls == []
    assert same_ids == ids
    np.testing.assert_array_equal(same.precision, looks.precision)
    np.testing.assert_array_equal(load_looks(run, Maker(), PATCHES).precision, looks.precision)


def test_an_unfinished_pass_over_other_images_begins_again(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_SECONDS_BETWEEN_WRITES", 0.0)
    run = Run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        learn(run, Maker(5), workers=1)
    _, ids = learn(run, Maker(), count=100)
    assert len(ids) == PATCHES.statistics_images - sum(
        index in (7, 17) for index in evenly_spaced(100, 40)
    )


def test_several_at_once_learn_once(tmp_path):
    makers, results = [Maker() for _ in range(4)], []
    threads = [
        threading.Thread(target=lambda m=m: results.append(learn(Run(tmp_path), m))) for m in makers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(maker.calls) for maker in makers) == [0, 0, 0, 28]
    assert len({looks.sums.tobytes() for looks, _ in results}) == 1


@pytest.mark.parametrize("damage", ["cut", "noise", "shape", "nan", "count", "pickle"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    run = Run(tmp_path)
    learn(run, Maker())
    path = run.looks_path
    arrays = dict(np.load(path))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "noise":
        path.write_bytes(b"no archive")
    else:
        change = {
            "shape": {"sums": np.zeros((9, WIDTH))},
            "nan": {"moment": np.full((WIDTH, WIDTH), np.nan)},
            "count": {"tried": np.array([1, 2, 3])},
            "pickle": {"ids": np.array([{}], object)},
        }[damage]
        np.savez(path, **{**arrays, **change})
    with pytest.raises(ArtifactError, match=r"statistics\.npz.*remove .* and run 'clipes cam'"):
        learn(run, Maker())


@pytest.mark.parametrize(("count", "most"), [(5, 40), (40, 40), (1000, 40), (41, 40)])
def test_the_images_chosen_are_spread_evenly(count, most):
    chosen = evenly_spaced(count, most)
    assert len(chosen) == len(set(chosen)) == min(count, most)
    assert chosen[0] == 0
    assert chosen[-1] == count - 1
    steps = np.diff(chosen)
    assert steps.max() - steps.min() <= 1
