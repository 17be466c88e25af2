"""The pass over a run's images: stopped, continued, damaged, shared."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clipes.config import LooksRound, NeighbourParams, PatchParams
from clipes.errors import ArtifactError, BackendError, ImageError
from clipes.listener import Listener
from clipes.maps.looks import Looks, Statistics
from clipes.maps.maker import EncodedImage, Lesson, Prepared
from clipes.maps.neighbours import Neighbours, Regions
from clipes.run import origin
from clipes.run.folder import Run
from clipes.run.origin import Picture
from clipes.run.record import CamSettings, TextUsed
from clipes.stages import images as images_module
from clipes.stages import learn_looks as stage
from clipes.stages.images import ImageSource
from clipes.stages.learn_looks import learn_looks, load_looks
from clipes.stages.looks_sources import count_drawn, looks_are_current
from clipes.types import Progress, Sample, evenly_spaced
from tests.heard import Heard

PATCHES = PatchParams(statistics_images=40)
TWICE = replace(PATCHES, rounds=(LooksRound(), LooksRound(("clip", "dino"))))
ASKING = replace(
    PATCHES,
    rounds=(LooksRound(neighbours=NeighbourParams(images=9)), LooksRound(("clip", "dino"))),
)
WIDTH = 6


class Maker:
    """Makes sums that only depend on the image's number and on what was learnt before.

    Images 7 and 17 cannot be read.
    """

    device = torch.device("cpu")

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls: list[int] = []
        self.stop_after = stop_after
        self.lock = threading.Lock()
        self.looks: tuple[Looks, ...] = ()

    def with_looks(self, *looks: Looks) -> Maker:
        informed = copy(self)
        informed.looks = (*self.looks, *looks)
        return informed

    def no_statistics(self, number: int) -> Statistics:
        return Statistics.empty(2, WIDTH + number)

    def prepare(self, image: int, labels: tuple[int, ...]) -> Prepared:
        return Prepared({"clip": image}, labels, (1, 1))

    def encode(self, images: list[Prepared]) -> list[EncodedImage]:
        return [EncodedImage(one.labels, one.size, one.pixels["clip"]) for one in images]

    def lesson(
        self,
        image: EncodedImage,
        name: str,
        neighbours: Neighbours | None,
        drawn: np.ndarray | None = None,
    ) -> Lesson:
        with self.lock:
            if len(self.calls) == self.stop_after:
                raise KeyboardInterrupt
            self.calls.append(image.evidence)
        assert name == f"{image.evidence:03}"
        sums = sums_of(image.evidence, self.looks)
        if neighbours is not None:  # what they say depends on all of their regions, in order
            rows = torch.ones(1, WIDTH)
            sums.mass[:] += neighbours.votes(name, rows, (0, 1)).numpy()[:, 0]
        if drawn is not None:
            sums.mass[:] += drawn.sum()
        return Lesson(sums, regions_of(name))


def regions_of(name: str) -> Regions:
    rng = np.random.default_rng(int(name))
    parts = (torch.from_numpy(rng.random((2, width))).half() for width in (WIDTH, 3))
    return Regions(*parts, (name,) * 2)


def sums_of(number: int, looks: tuple[Looks, ...] = ()) -> Statistics:
    rng, width = np.random.default_rng(number), WIDTH + len(looks)
    before = sum(float(known.precision.sum()) for known in looks)
    moment = rng.standard_normal((30, width)) + before
    return Statistics(rng.standard_normal((3, width)), rng.random(3) + 1, moment.T @ moment)


@pytest.fixture(autouse=True)
def _pictures(monkeypatch):
    def read(path: Path) -> tuple[int, Picture]:
        if path.stem in ("007", "017"):
            raise ImageError(f"{path} is empty")
        return int(path.stem), Picture(path.stem, 1, 0)

    monkeypatch.setattr(images_module, "read_picture", read)


class Drawn:
    """Masks of some images, by number; that of image 9 cannot be used."""

    def __init__(self, **masks: int) -> None:
        self.masks = {name[1:]: value for name, value in masks.items()}

    def file(self, sample: Sample) -> Picture | None:
        value = self.masks.get(sample.id)
        return None if value is None else Picture(str(value), 1, 0)

    def read(self, sample: Sample, say: Callable[[str], None]) -> np.ndarray | None:
        if sample.id == "009" and sample.id in self.masks:
            say("009 cannot be used")
            return None
        value = self.masks.get(sample.id)
        return None if value is None else np.full((2, 2), value)

    def is_still(self, sample: Sample, mask: Picture | None, since: int) -> tuple[bool, bool]:
        now = self.file(sample)
        return (now and now.sha256) == (mask and mask.sha256), False


def samples(count: int) -> list[Sample]:
    return [Sample(f"{k:03}", Path(f"{k:03}.jpg"), (0, 1), None) for k in range(count)]


def learn(
    run: Run,
    maker: Maker,
    count: int | Sequence[Sample] = 30,
    *,
    workers: int = 2,
    batch: int = 1,
    patches: PatchParams = PATCHES,
    listener: Listener = Listener(),  # noqa: B008  (frozen)
    drawn: Drawn | None = None,
    keep: bool = False,
) -> tuple[tuple[Looks, ...], frozenset[str]]:
    informed, ids = learn_looks(
        samples(count) if isinstance(count, int) else count,
        maker,
        run,
        patches,
        ImageSource(None),
        listener,
        drawn=drawn,
        keep=keep,
        batch=batch,
        workers=workers,
    )
    return informed.looks, ids


def test_images_that_cannot_be_read_say_nothing(tmp_path):
    (looks,), ids = learn(Run(tmp_path), Maker())
    assert ids == {sample.id for sample in samples(30)} - {"007", "017"}
    expected = Statistics.empty(2, WIDTH)
    for id_ in sorted(ids):
        expected.add(sums_of(int(id_)))
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
        def encode(self, images: list[Prepared]) -> list[EncodedImage]:
            if any(one.pixels["clip"] == 5 for one in images):
                raise BackendError("the GPU has too little memory")
            return super().encode(images)

    _, ids = learn(Run(tmp_path), Small(), batch=4)
    assert ids == {sample.id for sample in samples(30)} - {"005", "007", "017"}


def test_a_finished_pass_is_not_done_again(tmp_path):
    run, again = Run(tmp_path), Maker()
    (looks,), ids = learn(run, Maker())
    (same,), same_ids = learn(run, again, count=200)  # the list of images has grown since
    assert again.calls == []
    assert same_ids == ids
    np.testing.assert_array_equal(same.precision, looks.precision)
    (loaded,) = load_looks(run, Maker(), PATCHES).looks
    np.testing.assert_array_equal(loaded.precision, looks.precision)


def test_what_a_person_drew_is_learnt_in_every_round_and_anew_when_it_changes(tmp_path):
    run, said = Run(tmp_path), []
    listener, masks = Listener(said.append), Drawn(i001=5, i004=2, i009=1)
    own, _ = learn(Run(tmp_path / "own"), Maker(), 12, patches=TWICE)
    looks, _ = learn(run, Maker(), 12, patches=TWICE, drawn=masks, listener=listener)
    assert looks[0].mass.sum() - own[0].mass.sum() == pytest.approx(3 * 4 * (5 + 2))
    assert looks[1].mass.sum() - own[1].mass.sum() == pytest.approx(3 * 4 * (5 + 2))
    assert said[0] == "009 cannot be used"
    assert said.count("009 cannot be used") == 1
    assert count_drawn(run) == 3
    again = Maker()
    learn(run, again, 12, patches=TWICE, drawn=masks)
    assert again.calls == []
    learn(run, again, 12, patches=TWICE, drawn=Drawn(i001=5), listener=listener, keep=True)
    assert again.calls == []
    learn(run, again, 12, patches=TWICE, drawn=Drawn(i001=5), listener=listener)
    assert len(again.calls) == 22
    changed = "2 of the 11 images that say what the classes look like have other"
    assert sum(line.startswith(changed) for line in said) == 1
    assert count_drawn(run) == 1


def test_a_pass_that_was_stopped_begins_again_if_a_mask_was_corrected(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_SECONDS_BETWEEN_WRITES", 0.0)
    whole, broken, masks = Run(tmp_path / "whole"), Run(tmp_path / "broken"), Drawn(i002=3)
    learn(whole, Maker(), 12, patches=ASKING, drawn=masks)
    with pytest.raises(KeyboardInterrupt):
        learn(broken, Maker(15), 12, workers=1, patches=ASKING)
    rest = Maker()
    learn(broken, rest, 12, patches=ASKING, drawn=masks)
    assert len(rest.calls) == 22
    assert broken.looks_path.read_bytes() == whole.looks_path.read_bytes()


def test_each_round_learns_with_what_the_ones_before_found(tmp_path):
    run, again, seen = Run(tmp_path), Maker(), []

    @contextmanager
    def progress(*_: object) -> Iterator[Progress]:
        yield lambda *count: seen.append(count)

    found, ids = learn(run, Maker(), patches=TWICE, listener=Listener(progress=progress))
    first, second = Statistics.empty(2, WIDTH), Statistics.empty(2, WIDTH + 1)
    for id_ in sorted(ids):
        first.add(sums_of(int(id_)))
    for id_ in sorted(ids):
        second.add(sums_of(int(id_), (Looks.of(first, TWICE),)))
    for looks, statistics in zip(found, (first, second), strict=True):
        np.testing.assert_array_equal(looks.sums, statistics.sums)
        np.testing.assert_array_equal(looks.precision, Looks.of(statistics, TWICE).precision)
    assert sorted(set(seen)) == [(done, 60) for done in range(61)]
    same, same_ids = learn(run, again, patches=TWICE)
    assert (again.calls, same_ids) == ([], ids)
    loaded = load_looks(run, Maker(), TWICE).looks
    for one, two, three in zip(found, same, loaded, strict=True):
        assert one.precision.tobytes() == two.precision.tobytes() == three.precision.tobytes()


@pytest.mark.parametrize("patches", [TWICE, ASKING], ids=["twice", "asking"])
@pytest.mark.parametrize("stop_after", [4, 10, 11, 12, 20])
def test_a_round_that_was_stopped_ends_with_the_same_bits(
    patches, stop_after, tmp_path, monkeypatch
):
    monkeypatch.setattr(stage, "_SECONDS_BETWEEN_WRITES", 0.0)
    whole, broken = Run(tmp_path / "whole"), Run(tmp_path / "broken")
    learn(whole, Maker(), 12, patches=patches)
    with pytest.raises(KeyboardInterrupt):
        learn(broken, Maker(stop_after), 12, workers=1, patches=patches)
    rest = Maker()
    learn(broken, rest, 12, workers=3, patches=patches)
    assert len(rest.calls) <= 22 - stop_after + 1
    assert broken.looks_path.read_bytes() == whole.looks_path.read_bytes()
    assert [path.name for path in broken.looks_path.parent.iterdir()] == ["statistics.npz"]


def test_the_second_round_asks_the_regions_of_the_first(tmp_path):
    (looks, _), _ = learn(Run(tmp_path), Maker(), 12, patches=ASKING)
    # Of twelve images nine are asked, spread evenly; the eighth cannot be read.
    regions = Regions.joined([regions_of(f"{k:03}") for k in evenly_spaced(12, 9) if k != 7])
    neighbours = Neighbours(regions, Maker.device, ASKING.rounds[0].neighbours)
    expected = 0.0
    for k in (k for k in range(12) if k != 7):
        votes = neighbours.votes(f"{k:03}", torch.ones(1, WIDTH), (0, 1))
        expected += sums_of(k, (looks,)).mass + votes.numpy()[:, 0]
    with np.load(Run(tmp_path).looks_path) as arrays:
        np.testing.assert_allclose(arrays["mass_2"], expected, rtol=1e-6)
        assert not {"centres", "shares", "owners"} & set(arrays)  # no one asks after that


@pytest.mark.parametrize("older", [False, True])
def test_a_stopped_pass_over_a_list_that_shifted_begins_again(older, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_SECONDS_BETWEEN_WRITES", 0.0)
    whole, broken, heard = Run(tmp_path / "whole"), Run(tmp_path / "broken"), Heard()
    before = samples(41)[1:]
    with pytest.raises(KeyboardInterrupt):
        learn(broken, Maker(20), before, workers=1)
    after = before if older else [one for one in samples(41) if one.id != "035"]
    if older:
        path = broken.looks_path.with_name("unfinished.npz")
        arrays = {name: array for name, array in np.load(path).items() if name != "chosen"}
        np.savez(path, **arrays)
    learn(broken, Maker(), after, listener=heard.listener)
    learn(whole, Maker(), after)
    assert broken.looks_path.read_bytes() == whole.looks_path.read_bytes()
    assert heard.said[0].startswith("what was begun of learning what the classes look like is of")


def begin(run: Run, vectors: str) -> None:
    """Record that a run has class vectors of a digest."""
    settings = CamSettings("folder", ("a", "b"), text=TextUsed(vectors))
    run.begin("cam", settings.to_dict(), "clipes cam", anew=True)


def test_other_class_vectors_are_learnt_with_anew_unless_it_is_to_be_kept(tmp_path):
    run, heard, again = Run(tmp_path), Heard(), Maker()
    begin(run, "first")
    learn(run, Maker())
    assert looks_are_current(run, samples(30), Drawn())
    begin(run, "second")
    assert not looks_are_current(run, samples(30), Drawn())
    learn(run, again, keep=True)
    assert again.calls == []
    learn(run, again, listener=heard.listener)
    assert len(again.calls) == 28
    assert heard.said[0].startswith("what the classes look like was learnt with other class vec")
    assert looks_are_current(run, samples(30), Drawn())


def test_a_file_of_an_older_clipes_fits_all_class_vectors(tmp_path):
    run, again = Run(tmp_path), Maker()
    begin(run, "first")
    learn(run, Maker())
    arrays = dict(np.load(run.looks_path))
    np.savez(run.looks_path, **{k: v for k, v in arrays.items() if k not in ("vectors", "chosen")})
    assert looks_are_current(run, samples(30), Drawn())
    learn(run, again)
    assert again.calls == []


def test_a_stopped_pass_with_other_class_vectors_begins_again(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_SECONDS_BETWEEN_WRITES", 0.0)
    run, rest = Run(tmp_path), Maker()
    begin(run, "first")
    with pytest.raises(KeyboardInterrupt):
        learn(run, Maker(20), workers=1)
    begin(run, "second")
    learn(run, rest, keep=True)
    assert len(rest.calls) == 28


def test_images_that_all_failed_are_tried_again_and_of_some_it_is_told(tmp_path, monkeypatch):
    run, gone, there = Run(tmp_path), Heard(), Heard()

    def read(path: Path) -> tuple[int, Picture]:
        raise ImageError(f"{path}: the share is gone")

    with monkeypatch.context() as patch:
        patch.setattr(images_module, "read_picture", read)
        looks, ids = learn(run, Maker(), listener=gone.listener)
    assert (looks, ids) == ((None,), frozenset())
    (said,) = gone.said
    assert said.startswith("none of 30 images can be used to learn")
    assert not looks_are_current(run, samples(30), Drawn())
    _, ids = learn(run, Maker(), listener=there.listener)
    assert len(ids) == 28
    assert looks_are_current(run, samples(30), Drawn())
    (said,) = there.said
    assert said.startswith("what the classes look like was learnt from 28 of 30 images")
    learn(run, Maker(), 35, listener=there.listener)
    assert "learnt from 28 of 35 images" in there.said[1]


def test_an_image_that_fails_in_the_first_round_only_is_in_no_sums(tmp_path, monkeypatch):
    once, always = Run(tmp_path / "once"), Run(tmp_path / "always")
    read, tried = images_module.read_picture, []

    def failing(times: int) -> Callable[[Path], tuple[int, Picture]]:
        def read_some(path: Path) -> tuple[int, Picture]:
            if path.stem == "003":
                tried.append(path)
                if len(tried) <= times:
                    raise ImageError(f"{path}: the share is gone")
            return read(path)

        return read_some

    for run, times in ((once, 1), (always, 9)):
        tried.clear()
        monkeypatch.setattr(images_module, "read_picture", failing(times))
        _, ids = learn(run, Maker(), 12, patches=TWICE)
        assert "003" not in ids
    assert once.looks_path.read_bytes() == always.looks_path.read_bytes()


@pytest.mark.parametrize("stop_after", [None, 8])
def test_a_picture_replaced_during_the_pass_is_noticed(stop_after, tmp_path, monkeypatch):
    """It is as long as before, and older than the file that was written at the end."""
    monkeypatch.setattr(stage, "_SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(origin, "_COARSE", 0)
    photos = [Sample(f"{k:03}", tmp_path / f"{k:03}.jpg", (0, 1)) for k in range(10)]
    for photo in photos:
        photo.image.write_bytes(b"before")

    def read(path: Path) -> tuple[int, Picture]:
        if path.stem == "005":
            replace_slowly(photos[1].image)
        return int(path.stem), Picture.of(path)

    run, rest = Run(tmp_path / "run"), Maker()
    time.sleep(0.02)
    monkeypatch.setattr(images_module, "read_picture", read)
    if stop_after is None:
        learn(run, Maker(), photos, workers=1)
        assert not looks_are_current(run, photos, Drawn())
    else:
        with pytest.raises(KeyboardInterrupt):
            learn(run, Maker(stop_after), photos, workers=1)
    learn(run, rest, photos)
    assert len(rest.calls) == 10


def replace_slowly(path: Path) -> None:
    """Replace the bytes of a file at a time that is no other file's."""
    time.sleep(0.02)
    path.write_bytes(b"behind")
    time.sleep(0.02)


@pytest.mark.parametrize("damage", ["gone", "shape", "nan"])
def test_a_second_round_without_the_regions_of_the_first_is_not_gone_on_with(
    damage, tmp_path, monkeypatch
):
    monkeypatch.setattr(stage, "_SECONDS_BETWEEN_WRITES", 0.0)
    run = Run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        learn(run, Maker(15), 12, workers=1, patches=ASKING)
    path = run.looks_path.with_name("unfinished.npz")
    arrays = dict(np.load(path))
    kept = {key: value for key, value in arrays.items() if key not in ("centres", "owners")}
    if damage == "gone":
        np.savez(path, **kept)
        rest = Maker()
        learn(run, rest, 12, patches=ASKING)
        assert len(rest.calls) == 22
        return
    change = {"shape": arrays["centres"][:, 1:], "nan": np.full_like(arrays["centres"], np.nan)}
    np.savez(path, **{**arrays, "centres": change[damage]})
    with pytest.raises(ArtifactError, match="of other classes or another model"):
        learn(run, Maker(), 12, patches=ASKING)


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
    assert len({looks.sums.tobytes() for (looks,), _ in results}) == 1


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
