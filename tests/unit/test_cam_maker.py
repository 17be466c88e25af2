"""Several images at once, on this processor and on a GPU that is only pretended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from clipes.config import CamParams, PatchParams
from clipes.disk.images import read_image
from clipes.errors import BackendError
from clipes.maps import maker as cam_maker
from clipes.maps.looks import Looks
from clipes.maps.maker import CamMaker
from clipes.run.folder import Run
from clipes.run.freshness import Freshness, looks_digest
from clipes.run.origin import Picture
from clipes.stages import make_cams as stage
from clipes.stages.learn_looks import learn_looks
from clipes.stages.make_cams import KeptSights, make_cams
from clipes.towers.clip import Backbone
from clipes.towers.load import load_visual
from clipes.types import Sample
from clipes.weights import read_state_dict
from clipes.words.features import TextFeatures, unit_rows
from tests.unit.clip_support import quiet

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = (0.5, 0.5, 0.5)
PATCHES = PatchParams(strong=0.5, weak=0.5)
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
    return CamParams(patches=None if name == "gradient" else PATCHES, affinity_blocks=3)


@pytest.fixture(params=["gradient", "patches", "looks"])
def maker(request, backbone, text, images) -> CamMaker:
    made = CamMaker(backbone, text, params(request.param))
    if request.param == "looks":
        total = made.no_statistics()
        for sight in made.look([made.prepare(*one) for one in zip(images, LABELS, strict=True)]):
            total.add(made.statistics(sight, PATCHES))
        made = made.with_looks(Looks.of(total, PATCHES))
    return made


def record_batches(monkeypatch, name: str = "_run_first") -> list[int]:
    sizes = []
    whole = getattr(Backbone, name)

    def run(self: Backbone, pixels: torch.Tensor, blocks: int) -> object:
        sizes.append(len(pixels))
        return whole(self, pixels, blocks)

    monkeypatch.setattr(Backbone, name, run)
    return sizes


@pytest.mark.parametrize("room", [1 << 23, 3 * 24**2])
def test_images_together_get_the_maps_they_get_alone(maker, images, room, monkeypatch):
    alone = [maker(image, labels) for image, labels in zip(images, LABELS, strict=True)]
    monkeypatch.setattr(cam_maker, "_PAIRS_AT_ONCE", room)
    sizes = record_batches(monkeypatch)
    sights = maker.look([maker.prepare(*one) for one in zip(images, LABELS, strict=True)])
    assert sizes == ([4, 2, 1] if room > 10_000 else [3, 1, 2, 1])
    for sight, expected in zip(sights, alone, strict=True):
        got = maker.maps(sight)
        assert got.size == expected.size
        np.testing.assert_array_equal(got.labels, expected.labels)
        np.testing.assert_allclose(got.maps, expected.maps, atol=2e-4)


def test_too_little_memory_halves_the_batch(maker, images, monkeypatch):
    prepared = [maker.prepare(*one) for one in zip(images, LABELS, strict=True)]
    whole = Backbone._run_first
    tried = []

    def run(self: Backbone, pixels: torch.Tensor, blocks: int) -> object:
        tried.append(len(pixels))
        if len(pixels) > 1:
            raise torch.cuda.OutOfMemoryError
        return whole(self, pixels, blocks)

    monkeypatch.setattr(Backbone, "_run_first", run)
    sights = maker.look(prepared)
    assert tried[:7] == [4, 2, 1, 1, 2, 1, 1]
    assert [sight.labels for sight in sights] == list(LABELS)


def test_an_image_too_large_for_the_gpu_is_told(maker, images, monkeypatch):
    def run(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(Backbone, "_run_first", run)
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


def run_both_passes(samples, run: Run, maker: CamMaker, *, keep: bool, batch: int) -> None:
    kept = KeptSights(sample.id for sample in samples if keep)
    settings = {"kept": kept, "batch": batch, "workers": 2, "progress": lambda *_: None}
    looks, seen = learn_looks(samples, maker, run, PATCHES, say=quiet, **settings)
    informed = maker.with_looks(looks)
    current = Freshness(run, (), cam={}, looks=looks_digest(run))
    settings |= {"learnt_from": seen, "report": lambda _: None}
    summary = make_cams(samples, informed, run, current, **settings)
    assert summary.done == len(samples)


def maps_of(run: Run, samples: list[Sample]) -> dict[str, bytes]:
    return {sample.id: run.cams_path(sample.id).read_bytes() for sample in samples}


@pytest.mark.parametrize("room", [0, 30_000, 1 << 30])
def test_what_is_kept_is_not_looked_at_again_and_changes_no_bit(
    backbone, text, samples, room, tmp_path, monkeypatch
):
    maker = CamMaker(backbone, text, params("patches"))
    whole, kept = Run(tmp_path / "whole"), Run(tmp_path / "kept")
    run_both_passes(samples, whole, maker, keep=False, batch=1)
    monkeypatch.setattr(stage, "_KEPT_BYTES", room)
    sizes = record_batches(monkeypatch)
    run_both_passes(samples, kept, maker, keep=True, batch=1)
    assert maps_of(kept, samples) == maps_of(whole, samples)
    looked = {0: [14], 30_000: range(10, 14), 1 << 30: [7]}[room]
    assert sum(sizes) in looked


def test_what_is_kept_does_not_keep_its_batch(backbone, text, images, monkeypatch):
    maker = CamMaker(backbone, text, params("patches"))
    first, *_ = maker.look([maker.prepare(images[k], LABELS[k]) for k in (0, 2, 4, 6)])
    kept = KeptSights(["wanted"])
    picture = Picture("", 0, 0)
    kept.keep("other", first, picture)
    assert kept.take("other") is None
    kept.keep("wanted", first, picture)
    found, same_picture = kept.take("wanted")
    assert same_picture is picture
    evidence, same = found.evidence, first.evidence
    for part, whole in (
        (evidence.activations, same.activations),
        (evidence.walk.attention, same.walk.attention),
    ):
        assert whole.untyped_storage().nbytes() >= 4 * whole.nbytes
        assert part.untyped_storage().nbytes() == part.nbytes
    np.testing.assert_array_equal(maker.maps(found).maps, maker.maps(first).maps)
    (alone,) = maker.look([maker.prepare(images[0], LABELS[0])])
    assert alone.alone().evidence.walk.attention is alone.evidence.walk.attention


def test_maps_too_large_for_the_gpu_are_told(backbone, text, images, monkeypatch):
    def run(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    maker = CamMaker(backbone, text, params("patches"))
    (sight,) = maker.look([maker.prepare(images[0], LABELS[0])])
    monkeypatch.setattr(cam_maker, "final_maps", run)
    monkeypatch.setattr(cam_maker, "image_statistics", run)
    for work in (lambda: maker.maps(sight), lambda: maker.statistics(sight, PATCHES)):
        with pytest.raises(BackendError, match="memory for an image of 64 x 96 pixels"):
            work()


def test_what_is_kept_is_bounded_in_number(backbone, text, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_KEPT_IMAGES", 3)
    sizes = record_batches(monkeypatch)
    maker = CamMaker(backbone, text, params("patches"))
    run_both_passes(samples, Run(tmp_path / "run"), maker, keep=True, batch=1)
    assert sum(sizes) == 7 + 4


def test_a_broken_image_does_not_hinder_its_batch(backbone, text, samples, tmp_path, monkeypatch):
    maker = CamMaker(backbone, text, params("gradient"))
    run, told = Run(tmp_path / "run"), []
    samples[2].image.write_bytes(b"no picture")
    sizes = record_batches(monkeypatch)
    done = []
    summary = make_cams(
        samples,
        maker,
        run,
        Freshness(run, (), cam={}, looks=None),
        batch=4,
        workers=1,
        progress=lambda *count: done.append(count),
        report=told.append,
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


@pytest.mark.parametrize(("name", "crossings"), [("gradient", (1, 1)), ("patches", (1, 2))])
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
        maker = CamMaker(Backbone(visual, 100.0, HALF, HALF), text, params(name))
        if name == "patches":
            maker = maker.with_looks(Looks(np.ones((4, 64)), np.ones(4), np.eye(64)))
        sights = maker.look([maker.prepare(*one) for one in zip(images, LABELS, strict=True)])
        looked, made = crossed[:], [maker.maps(sight, seen=True) for sight in sights]
    assert len(looked) == crossings[0] * len(images)
    assert len(crossed) - len(looked) == crossings[1] * len(images)
    assert {device for device, _ in crossed} == {"cuda"}
    assert max(shape.numel() for _, shape in crossed) == (2 if name == "patches" else 1) * 3 * 24
    assert [cams.maps.shape[0] for cams in made] == [len(labels) for labels in LABELS]
