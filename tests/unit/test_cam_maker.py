"""Several images at once, on this processor and on a GPU that is only pretended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from clipes.config import CamParams, LooksRound, NeighbourParams, PatchParams
from clipes.disk.images import read_image
from clipes.errors import BackendError
from clipes.listener import Listener
from clipes.maps import maker as cam_maker
from clipes.maps.affinity import blend, likeness, propagate, sinkhorn
from clipes.maps.evidence import first_maps, walk_of
from clipes.maps.finer import finer_maps
from clipes.maps.gradcam import min_max
from clipes.maps.looks import Looks, shown_by, statistics_of, sums_of
from clipes.maps.maker import CamMaker, EncodedImage
from clipes.maps.neighbours import Neighbours, Regions
from clipes.run.folder import Run
from clipes.run.freshness import Freshness, looks_digest
from clipes.stages import images as images_module
from clipes.stages.images import ImageSource
from clipes.stages.learn_looks import learn_looks
from clipes.stages.make_cams import make_cams
from clipes.towers.clip import Backbone
from clipes.towers.load import load_visual
from clipes.towers.side_by_side import Towers
from clipes.towers.taps import finer_grid
from clipes.types import Progress, Sample
from clipes.weights import read_state_dict
from clipes.words.features import TextFeatures, unit_rows
from tests.unit.clip_support import HALF, PixelTower

pytestmark = pytest.mark.usefixtures("one_thread")

PATCHES = PatchParams(strong=0.5, weak=0.5)
BOTH = PatchParams(
    strong=0.5,
    weak=0.5,
    rounds=(LooksRound(), LooksRound(("clip", "dino"), own_background=0.3, likeness_weight=0.4)),
)
CLOSER = replace(BOTH, finer=1.5)
BY_NAME = {"looks": PATCHES, "both": BOTH, "closer": CLOSER}
SIZES = ((64, 96), (48, 80), (64, 96), (96, 64), (60, 90), (48, 80), (64, 96))
LABELS = ((0,), (1, 2), (2, 0), (1,), (0, 1, 2), (2,), (1, 0))


@pytest.fixture(scope="module")
def backbone(tiny_weights: Path) -> Backbone:
    return Backbone(load_visual(read_state_dict(tiny_weights)), 100.0, HALF, HALF)


@pytest.fixture(scope="module")
def text(backbone: Backbone) -> TextFeatures:
    width = backbone.visual.proj.shape[1]
    rows = unit_rows(np.random.default_rng(0).standard_normal((5, width)))
    return TextFeatures(("a", "b", "c"), ("x", "y"), rows[:3], rows[3:], "tiny")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def params(name: str) -> CamParams:
    patches = None if name == "gradient" else BY_NAME.get(name, PATCHES)
    return CamParams(patches=patches, affinity_blocks=3)


def make(name: str, backbone: Backbone, text: TextFeatures) -> CamMaker:
    others = {"dino": PixelTower()} if name in ("both", "closer") else {}
    return CamMaker(Towers(backbone, others), text, params(name))


def encode(maker: CamMaker, images: list[np.ndarray]) -> list[EncodedImage]:
    return maker.encode([maker.prepare(*one) for one in zip(images, LABELS, strict=True)])


def learnt(maker: CamMaker, encoded: list[EncodedImage], patches: PatchParams) -> CamMaker:
    for number in range(len(patches.rounds)):
        total = maker.no_statistics(number)
        for image in encoded:
            total.add(maker.lesson(image).statistics)
        looks = Looks.of(total, patches)
        assert looks is not None
        maker = maker.with_looks(looks)
    return maker


@pytest.fixture(params=["gradient", "patches", "looks", "both", "closer"])
def maker(request, backbone, text, images) -> CamMaker:
    made = make(request.param, backbone, text)
    patches = BY_NAME.get(request.param)
    return learnt(made, encode(made, images), patches) if patches else made


def record_batches(monkeypatch) -> list[int]:
    sizes, whole = [], Backbone._embed

    def run(self: Backbone, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        sizes.append(len(pixels))
        return whole(self, pixels, grid)

    monkeypatch.setattr(Backbone, "_embed", run)
    return sizes


@pytest.mark.parametrize("room", [1 << 23, 3 * 24**2])
def test_images_together_get_the_maps_they_get_alone(maker, images, room, monkeypatch):
    alone = [maker(image, labels) for image, labels in zip(images, LABELS, strict=True)]
    monkeypatch.setattr(cam_maker, "_PAIRS_AT_ONCE", room)
    sizes = record_batches(monkeypatch)
    together = encode(maker, images)
    assert sizes == ([4, 2, 1] if room > 10_000 else [3, 1, 2, 1])
    for image, expected in zip(together, alone, strict=True):
        got = maker.maps(image)
        assert got.size == expected.size
        np.testing.assert_array_equal(got.labels, expected.labels)
        np.testing.assert_allclose(got.maps, expected.maps, atol=2e-4)


def test_too_little_memory_halves_the_batch(maker, images, monkeypatch):
    whole = Backbone._embed
    tried = []

    def run(self: Backbone, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        tried.append(len(pixels))
        if len(pixels) > 1:
            raise torch.cuda.OutOfMemoryError
        return whole(self, pixels, grid)

    monkeypatch.setattr(Backbone, "_embed", run)
    encoded = encode(maker, images)
    assert tried[:7] == [4, 2, 1, 1, 2, 1, 1]
    assert [image.labels for image in encoded] == list(LABELS)


def test_an_image_too_large_for_the_gpu_is_told(maker, images, monkeypatch):
    def run(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(Backbone, "_embed", run)
    with pytest.raises(BackendError, match=r"memory for .* 64 x 96 pixels; use --device cpu"):
        maker(images[0], LABELS[0])


@pytest.fixture
def samples(images, tmp_path) -> list[Sample]:
    found = []
    for number, (image, labels) in enumerate(zip(images, LABELS, strict=True)):
        path = tmp_path / f"{number}.png"
        Image.fromarray(image).save(path)
        found.append(Sample(str(number), path, labels))
    return found


def run_both_passes(
    samples, run: Run, maker: CamMaker, patches: PatchParams, kept: Path | None, *, batch: int = 1
) -> None:
    how = {"batch": batch, "workers": 2}
    with ImageSource(kept) as source:
        informed, ids = learn_looks(samples, maker, run, patches, source, Listener(), **how)
        current = Freshness(run, (), cam={}, looks=looks_digest(run))
        summary = make_cams(
            samples, informed, run, current, source, Listener(), learnt_from=ids, **how
        )
    assert summary.done == len(samples)


def maps_of(run: Run, samples: list[Sample]) -> dict[str, bytes]:
    return {sample.id: run.cams_path(sample.id).read_bytes() for sample in samples}


@pytest.mark.parametrize("room", [0, 30_000, 1 << 30])
@pytest.mark.parametrize("name", ["looks", "both", "closer"])
def test_what_is_kept_is_not_encoded_again_and_changes_no_bit(
    name, backbone, text, samples, room, tmp_path, monkeypatch
):
    maker, patches = make(name, backbone, text), BY_NAME[name]
    whole, kept = Run(tmp_path / "whole"), Run(tmp_path / "kept")
    sizes = record_batches(monkeypatch)
    run_both_passes(samples, whole, maker, patches, None)
    passes = 1 + len(patches.rounds)
    assert sum(sizes) == passes * len(samples)
    sizes.clear()
    monkeypatch.setattr(images_module, "_MOST_BYTES", room)
    run_both_passes(samples, kept, maker, patches, tmp_path)
    assert maps_of(kept, samples) == maps_of(whole, samples)
    assert kept.looks_path.read_bytes() == whole.looks_path.read_bytes()
    few = range(len(samples) + 1, passes * len(samples))
    assert sum(sizes) in {0: [passes * len(samples)], 30_000: few, 1 << 30: [len(samples)]}[room]


def test_the_second_round_looks_with_both_towers_at_the_maps_of_the_first(backbone, text, images):
    maker = make("both", backbone, text)
    encoded = encode(maker, images)
    first = learnt(maker, encoded, PATCHES)  # one round
    assert maker.no_statistics(0).moment.shape == (128, 128)
    assert maker.no_statistics(1).moment.shape == (140, 140)
    for image in encoded:
        evidence, labels = image.evidence, sorted(image.labels)  # a, b, c: in order of the names
        ordered = first.maps(EncodedImage(tuple(labels), image.size, evidence), in_statistics=True)
        tokens = torch.cat([evidence.tokens["clip"], evidence.tokens["dino"]], 1).float()
        expected = statistics_of(tokens, shown_by(ordered.maps, labels, BOTH), 3)
        got = first.lesson(image).statistics
        for name in ("sums", "mass", "moment"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_closer_look_brings_the_finished_maps_to_its_grid(backbone, text, images, rounds):
    maker, closer = make("both", backbone, text), make("closer", backbone, text)
    coarse, fine = encode(maker, images), encode(closer, images)
    if rounds:
        maker, closer = learnt(maker, coarse, BOTH), learnt(closer, fine, CLOSER)
    for one, other, image in zip(coarse, fine, images, strict=True):
        before, after = maker.maps(one), closer.maps(other)
        height, width = finer_grid(one.evidence.grid, 1.5)
        tower = PixelTower()
        wide, narrow = (
            tower.after(tower.prepare(image, grid)[None], (3,))[0][0].half().float()
            for grid in (one.evidence.grid, (height, width))
        )
        near = finer_maps(before.maps, wide, narrow.unflatten(0, (height, width)), 0.05)
        assert after.maps.shape[1:] == (height, width)
        np.testing.assert_allclose(after.maps, near, atol=1e-5)
        if rounds:
            np.testing.assert_array_equal(after.drift, before.drift)


def test_alike_patches_of_the_second_tower_lead_the_maps_of_a_round_that_asks(
    backbone, text, images
):
    maker = make("both", backbone, text)
    (image, *_) = encode(maker, images)
    attention, tokens = image.evidence.attention.float(), image.evidence.tokens["dino"].float()
    alike = likeness(tokens, BOTH.likeness_temperature)
    both = sinkhorn(blend([(attention, 0.6), (alike, 0.4)]), 3)
    walk = walk_of(image.evidence, params("both"), 0.4)
    for name in ("attention", "rows", "columns"):
        torch.testing.assert_close(getattr(walk, name), getattr(both, name))
    alone = walk_of(image.evidence, params("patches"), 0.0)
    torch.testing.assert_close(alone.attention, attention, rtol=0, atol=0)
    first = first_maps(image.evidence, params("patches"))
    np.testing.assert_array_equal(maker.maps(image).maps, first)


def test_neighbours_take_the_place_of_maps_that_they_contradict(
    backbone, text, images, monkeypatch
):
    asking = replace(
        BOTH, rounds=(replace(BOTH.rounds[0], neighbours=NeighbourParams()), BOTH.rounds[1])
    )
    towers = Towers(backbone, {"dino": PixelTower()})
    maker = CamMaker(towers, text, replace(params("both"), patches=asking))
    encoded = encode(maker, images)
    parts = [maker.lesson(one, str(k)).regions for k, one in enumerate(encoded)]
    neighbours = Neighbours(Regions.joined(parts), maker.device, NeighbourParams())
    once, image = learnt(maker, encoded, PATCHES), encoded[1]
    alone = once.lesson(image, "1").statistics
    monkeypatch.setattr(Neighbours, "contradict", lambda *_: [])
    agreed = once.lesson(image, "1", neighbours).statistics
    np.testing.assert_array_equal(agreed.sums, alone.sums)
    monkeypatch.setattr(Neighbours, "contradict", lambda *_: [1])
    mended = once.lesson(image, "1", neighbours).statistics
    # What it says is what it would say of maps in which the second class is the neighbours'.
    found = once._looked(image, 1, True)
    votes = neighbours.votes("1", image.evidence.of(("clip",)), (1, 2))
    sources = min_max(torch.stack([found[0], votes[2]]).unflatten(1, image.evidence.grid).numpy())
    walk = walk_of(image.evidence, params("both"), 0.0)
    maps = propagate(walk, sources, params("both"), asking.walk_power)
    tokens = image.evidence.of(("clip", "dino"))
    expected = sums_of(tokens, shown_by(maps, (1, 2), asking), 3)
    np.testing.assert_array_equal(mended.sums, expected.sums)
    assert np.abs(mended.sums - alone.sums).max() > 0.1


@pytest.mark.parametrize("number", [0, 1])
def test_a_mask_that_a_person_drew_is_believed_instead_of_maps(backbone, text, images, number):
    asking = tuple(replace(part, neighbours=NeighbourParams(regions=5)) for part in BOTH.rounds)
    towers = Towers(backbone, {"dino": PixelTower()})
    maker = CamMaker(towers, text, replace(params("both"), patches=replace(BOTH, rounds=asking)))
    encoded = encode(maker, images)
    image = encoded[0]  # labelled 0 alone, 4 x 6 patches
    patches = np.array([[0, 0, 2, 2, 2, 255], [0, 0, 2, 2, 2, 255]] * 2, np.uint8)
    drawn = np.repeat(np.repeat(patches, 16, 0), 16, 1)
    informed = learnt(maker, encoded, PATCHES) if number else maker
    lesson = informed.lesson(image, "one", drawn=drawn)
    tokens = image.evidence.of(asking[number].towers)
    shown = {value: (patches == value).ravel() for value in (0, 2)}
    expected = statistics_of(tokens, shown, 3)
    for name in ("sums", "mass", "moment"):
        np.testing.assert_array_equal(
            getattr(lesson.statistics, name), getattr(expected, name), name
        )
    assert not lesson.statistics.mass[[1, 3]].any()
    regions = lesson.regions
    assert regions is not None
    assert set(regions.owners) == {"one"}
    assert not regions.shares[:, [1, 3]].any()
    whole = regions.shares.float().sum(1)  # the rest is not labelled
    assert 0 <= whole.min() < 0.9 < whole.max() <= 1
    nothing = informed.lesson(image, "one", drawn=np.full_like(drawn, 255))
    assert nothing.regions is None
    assert not nothing.statistics.mass.any()


def test_a_round_that_found_nothing_leaves_the_first_maps(backbone, text, images):
    maker = make("both", backbone, text)
    encoded = encode(maker, images)
    first = learnt(maker, encoded, PATCHES)
    for image in encoded[:2]:
        got = first.with_looks(None).maps(image, in_statistics=True).maps
        np.testing.assert_array_equal(got, maker.maps(image).maps)
        assert np.abs(first.maps(image, in_statistics=True).maps - got).max() > 0.01


def test_maps_too_large_for_the_gpu_are_told(backbone, text, images, monkeypatch):
    def run(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    maker = make("patches", backbone, text)
    (image,) = maker.encode([maker.prepare(images[0], LABELS[0])])
    monkeypatch.setattr(cam_maker, "first_maps", run)
    for work in (lambda: maker.maps(image), lambda: maker.lesson(image).statistics):
        with pytest.raises(BackendError, match="memory for an image of 64 x 96 pixels"):
            work()


def test_a_broken_image_does_not_hinder_its_batch(backbone, text, samples, tmp_path, monkeypatch):
    maker = make("gradient", backbone, text)
    run, told = Run(tmp_path / "run"), []
    samples[2].image.write_bytes(b"no picture")
    sizes = record_batches(monkeypatch)
    done = []

    @contextmanager
    def progress(*_: object) -> Iterator[Progress]:
        yield lambda *count: done.append(count)

    summary = make_cams(
        samples,
        maker,
        run,
        Freshness(run, (), cam={}, looks=None),
        ImageSource(None),
        Listener(report=told.append, progress=progress),
        batch=4,
        workers=1,
    )
    assert (summary.done, [failure.id for failure in told]) == (6, ["2"])
    assert sorted(sizes) == [1, 1, 1, 1, 2]
    assert done == [(count, 7) for count in range(8)]
    for number in (0, 1, 3, 4, 5, 6):
        got = run.load_cams(str(number))
        alone = maker(read_image(samples[number].image), LABELS[number])
        np.testing.assert_allclose(got.maps, alone.maps, atol=1e-3)


class Arrived:
    """What ``cpu()`` returns of a tensor whose values do not exist."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def numpy(self) -> np.ndarray:
        return np.zeros(self.shape, np.float32)


@pytest.mark.parametrize(("name", "crossings"), [("gradient", (1, 1)), ("patches", (1, 3))])
def test_only_maps_leave_a_gpu(name, crossings, text, images, monkeypatch):
    """A GPU's tensors, pretended: they have a shape and a device, and mixing devices raises."""
    crossed: list[tuple[str, torch.Size]] = []

    def arrive(tensor: torch.Tensor) -> Arrived:
        crossed.append((tensor.device.type, tensor.shape))
        return Arrived(tensor.shape)

    monkeypatch.setattr(torch.Tensor, "cpu", arrive)
    width = text.class_vectors.shape[1]
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            visual = VisionTransformer(32, 16, 64, 5, 2, 2.0, output_dim=width, act_layer=QuickGELU)
        maker = make(name, Backbone(visual, 100.0, HALF, HALF), text)
        if name == "patches":
            maker = maker.with_looks(Looks(np.ones((4, 64)), np.ones(4), np.eye(64)))
        encoded = encode(maker, images)
        looked, made = crossed[:], [maker.maps(image, in_statistics=True) for image in encoded]
    assert len(looked) == crossings[0] * len(images)
    assert len(crossed) - len(looked) == crossings[1] * len(images)
    assert {device for device, _ in crossed} == {"cuda"}
    assert max(shape.numel() for _, shape in crossed) == (2 if name == "patches" else 1) * 3 * 24
    assert [cams.maps.shape[0] for cams in made] == [len(labels) for labels in LABELS]
