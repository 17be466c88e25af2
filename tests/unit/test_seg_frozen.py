"""The decoder on frozen tokens: what it computes, how it is fed, trained, kept and asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from clipes.config import FrozenPreset, get_segmenter_preset
from clipes.disk.images import read_image, read_mask, write_confidence, write_mask
from clipes.errors import ArtifactError, UsageError
from clipes.maps.finer import finer
from clipes.run.tokens import CachedTokens
from clipes.seg.checkpoint import FINAL, fill_model, load_checkpoint, saved_iterations
from clipes.seg.data import TrainingPair
from clipes.seg.draws import EvenClasses, Passes
from clipes.seg.frozen import Block, FrozenDecoder, FrozenSpec, TokenInput, flat_tokens
from clipes.seg.frozen_recipe import FrozenRecipe, balanced
from clipes.seg.kinds import predictor_for, recipe_for
from clipes.seg.loss import Guidance
from clipes.seg.parallel import Processes
from clipes.seg.recipes import TestSettings
from clipes.seg.resize import resize
from clipes.seg.train import Step, Trainer, TrainOptions
from clipes.towers.tokens import ATTENTION
from clipes.types import IGNORE, UInt8Array

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Processes(0, 1, torch.device("cpu"))
PRESET = FrozenPreset(
    "test",
    tokens=("clip.4", "dino.12"),
    linear=(),
    width=16,
    blocks=2,
    heads=2,
    batch=4,
    iterations=6,
    warmup=2,
    lr=1e-2,
)
GIGABYTE = 1 << 30


class Colours:
    """Towers whose tokens are the mean colours of patches, widened by fixed random matrices."""

    def __init__(self, seed: int = 0, only: str = "") -> None:
        rng = np.random.default_rng(seed)
        self._wide = {
            "clip.4": torch.from_numpy(rng.normal(size=(3, 12)).astype(np.float32)),
            "dino.12": torch.from_numpy(rng.normal(size=(3, 8)).astype(np.float32)),
        }
        self._wide = {name: one for name, one in self._wide.items() if only in name}
        self._name = f"colours {seed}"
        self.seen = 0

    @property
    def widths(self) -> Mapping[str, int]:
        return {name: matrix.shape[1] for name, matrix in self._wide.items()}

    @property
    def digests(self) -> Mapping[str, str]:
        return {"clip": f"{self._name} a", "dino": f"{self._name} b"}

    @property
    def fingerprints(self) -> Mapping[str, str]:
        return {name: f"{self._name} {name}" for name in self._wide}

    def tokens(
        self,
        image: UInt8Array,
        scale: float = 1.0,
        *,
        attention: bool = False,
        closer: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        self.seen += 1
        h, w = (-(-round(side * scale) // 16) for side in image.shape[:2])
        small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
        colours = torch.from_numpy(small.astype(np.float32) / 64 - 2)
        found = {name: colours @ matrix for name, matrix in self._wide.items()}
        if closer > 1:
            side = (round(closer * w), round(closer * h))
            fine = cv2.resize(image, side, interpolation=cv2.INTER_AREA).astype(np.float32)
            found["dino.near"] = colours
            found["dino.closer"] = torch.from_numpy(fine / 64 - 2)
        if attention:
            flat = colours.flatten(0, 1)
            found[ATTENTION] = (flat @ flat.T).softmax(1).unflatten(0, (h, w))
        return found


@pytest.fixture
def pairs(tmp_path: Path) -> list[TrainingPair]:
    """Images of grids that differ, left part red (class 0) or blue (class 1)."""
    made = []
    for index in range(6):
        height, width = 48 + 16 * (index % 3), 80 - 10 * (index % 2)
        image = np.full((height, width, 3), 110, np.uint8)
        mask = np.zeros((height, width), np.uint8)
        image[:, :32] = (220, 30, 30) if index % 2 else (30, 30, 220)
        mask[:, :32] = 1 if index % 2 else 2
        name = f"p{index}"
        pair = TrainingPair(
            name,
            tmp_path / f"{name}.png",
            tmp_path / f"{name}-mask.png",
            tmp_path / f"{name}-sure.png",
            (0,) if index % 2 else (1,),
        )
        Image.fromarray(image).save(pair.image)
        write_mask(pair.mask, mask)
        assert pair.confidence
        write_confidence(pair.confidence, np.full(mask.shape, 0.97, np.float32))
        made.append(pair)
    return made


def recipe(tmp_path: Path, preset: FrozenPreset = PRESET, limit: int = GIGABYTE) -> FrozenRecipe:
    tokens = CachedTokens(Colours, tmp_path / "tokens", limit)
    made = recipe_for(preset, ("red", "blue"), Guidance(), tokens)
    assert isinstance(made, FrozenRecipe)
    return made


def trainer(made: FrozenRecipe, **options: object) -> tuple[FrozenDecoder, Trainer]:
    torch.manual_seed(0)
    model = made.spec.build()
    return model, Trainer(model, made, replace(TrainOptions(save_every=2), **options), ALONE)


LINEAR = replace(PRESET, linear=("dino.12",))


@pytest.fixture
def noisy(pairs: list[TrainingPair]) -> list[TrainingPair]:
    """The pairs, their colours not as pure."""
    for number, pair in enumerate(pairs):
        image = read_image(pair.image).astype(np.int64)
        image += np.random.default_rng(number).integers(-29, 30, image.shape)
        Image.fromarray(image.astype(np.uint8)).save(pair.image)
    return pairs


def cells(pair: TrainingPair, made: FrozenRecipe) -> tuple[np.ndarray, np.ndarray]:
    """Return DINOv2's tokens (N, 8) and the 16 labels (N, 16) of each patch, (4h, 4w) in all."""
    tokens = made.tokens.read(pair.id, pair.image)["dino.12"].float().numpy()
    mask, (h, w) = read_mask(pair.mask), tokens.shape[:2]
    rows = ((np.arange(4 * h) + 0.5) * mask.shape[0] / (4 * h)).astype(int)
    columns = ((np.arange(4 * w) + 0.5) * mask.shape[1] / (4 * w)).astype(int)
    small = mask[np.ix_(rows, columns)].reshape(h, 4, w, 4).swapaxes(1, 2)
    return tokens.reshape(h * w, -1), small.reshape(h * w, 16)


def test_a_decoder_starts_from_what_sums_know(tmp_path: Path, noisy: list[TrainingPair]) -> None:
    made, seen = recipe(tmp_path, LINEAR), []
    model = made.spec.build().eval()
    made.start(model, noisy, lambda *count: seen.append(count))
    assert seen[-1] == (len(noisy), len(noisy))
    right = []
    for pair in noisy:
        grid, flat = flat_tokens(made.tokens.read(pair.id, pair.image), made.spec)
        (logits,) = model(torch.tensor([grid]), *flat)
        labels = cells(pair, made)[1]
        pure = (labels == labels[:, :1]).all(1)
        right.append((logits[0].argmax(0).numpy().ravel() == labels[:, 0])[pure])
    assert np.concatenate(right).mean() > 0.98


def test_the_discriminant_is_that_of_means_and_one_covariance(
    tmp_path: Path, noisy: list[TrainingPair]
) -> None:
    made = recipe(tmp_path, LINEAR)
    model = made.spec.build()
    made.start(model, noisy[1::2], lambda *_: None)  # the second class is in no mask
    sums, outer, mass = np.zeros((2, 8)), np.zeros((8, 8)), np.zeros(2)
    for pair in noisy[1::2]:
        rows, labels = cells(pair, made)
        for label in (0, 1):
            part = rows[(labels == label).mean(1) >= 0.75]
            weight = len(part) ** -0.5
            sums[label] += weight * part.sum(0)
            mass[label] += weight * len(part)
            outer += weight * part.T @ part
    means = sums / mass[:, None]
    within = (outer - (mass[:, None] * means).T @ means) / mass.sum()
    inverse = np.linalg.inv(within + 0.02 * np.trace(within) / 8 * np.eye(8))
    assert model.discriminant is not None
    got = model.discriminant.directions.numpy()
    np.testing.assert_allclose(got[:2], 0.1 * means @ inverse, rtol=1e-3, atol=5e-3)
    bias = -0.05 * ((means @ inverse) * means).sum(1)
    offsets = model.discriminant.offsets.numpy()
    np.testing.assert_allclose(offsets[:2], bias, rtol=1e-3, atol=5e-3)
    assert offsets[2] == -5
    assert not got[2].any()


def test_how_images_differ_is_a_covariance_in_the_basis_where_labels_are_round(
    tmp_path: Path, noisy: list[TrainingPair]
) -> None:
    made = recipe(tmp_path, LINEAR)
    model = made.spec.build()
    made.start(model, noisy, lambda *_: None)
    found: dict[int, list[tuple[float, np.ndarray]]] = {0: [], 1: [], 2: []}
    outer, mass = np.zeros((8, 8)), 0.0
    for pair in noisy:
        rows, labels = cells(pair, made)
        for label, images in found.items():
            part = rows[(labels == label).mean(1) >= 0.75].astype(np.float64)
            if len(part):
                images.append((len(part) ** 0.5, part.mean(0)))
                outer += len(part) ** -0.5 * part.T @ part
                mass += len(part) ** 0.5
    means = np.stack(
        [np.average([m for _, m in one], 0, [w for w, _ in one]) for one in found.values()]
    )
    totals = np.array([sum(w for w, _ in one) for one in found.values()])
    within = (outer - (totals[:, None] * means).T @ means) / mass
    within += 0.02 * np.trace(within) / 8 * np.eye(8)
    scatter, freedom = np.zeros((8, 8)), 0.0
    for label, images in found.items():
        scatter += sum(w * np.outer(m - means[label], m - means[label]) for w, m in images)
        freedom += totals[label] - sum(w * w for w, _ in images) / totals[label]
    assert model.discriminant is not None
    axes, between = model.discriminant.axes.double().numpy(), model.discriminant.between.numpy()
    np.testing.assert_allclose(axes.T @ within @ axes, np.eye(8), atol=1e-3)
    np.testing.assert_allclose(axes.T @ (scatter / freedom) @ axes, np.diag(between), atol=1e-3)
    np.testing.assert_allclose(model.discriminant.means.numpy(), means @ axes, rtol=1e-3, atol=1e-3)
    assert between.max() > 0.01


def test_answers_are_brought_to_what_an_image_looks_like(
    tmp_path: Path, noisy: list[TrainingPair]
) -> None:
    made = recipe(tmp_path, replace(LINEAR, spread=False))
    model, towers = made.spec.build().eval(), Colours()
    made.start(model, noisy, lambda *_: None)
    assert model.discriminant is not None
    torch.nn.init.normal_(model.classify.weight)  # as if it had learnt something
    image = read_image(noisy[0].image)
    got = predictor_for(model, TestSettings(), towers)(image)
    with torch.inference_mode():
        grid, flat = flat_tokens(towers.tokens(image), made.spec)
        rounded = [one.half() for one in flat]
        logits = model(torch.tensor([grid]), *rounded)[0][0]
        probs = model.discriminant(rounded[1].float()).softmax(1)
        change = model.discriminant.change(rounded[1].float(), probs)
        want = (logits + change.T.unflatten(1, grid))[None]
        np.testing.assert_allclose(got, resize(want, image.shape[:2]).softmax(1)[0], atol=1e-5)
        assert change.abs().max() > 1e-3


@pytest.mark.parametrize("preset", [LINEAR, replace(LINEAR, adapts=False, finer=1.5)])
def test_classes_known_to_be_absent_get_nothing(
    tmp_path: Path, noisy: list[TrainingPair], preset: FrozenPreset
) -> None:
    made = recipe(tmp_path, preset)
    model = made.spec.build()
    made.start(model, noisy, lambda *_: None)
    image = read_image(noisy[0].image)
    predictor = predictor_for(model, TestSettings((1.0, 1.5), flip=True), Colours())
    free, told = predictor(image), predictor(image, present=[1])
    assert free[1].any()
    assert not told[1].any()
    np.testing.assert_allclose(told.sum(0), 1, atol=1e-4)


def test_a_decoder_of_before_does_not_adapt() -> None:
    old = spec(linear=("dino.12",)).build()
    assert old.discriminant is not None
    assert set(dict(old.discriminant.named_buffers())) == {"directions", "offsets"}
    assert "no discriminant" in spec(adapts=True).problem()


def test_what_a_decoder_starts_from_is_kept_and_not_trained(
    tmp_path: Path, pairs: list[TrainingPair]
) -> None:
    made = recipe(tmp_path, LINEAR)
    torch.manual_seed(0)
    model = made.spec.build()
    made.start(model, pairs, lambda *_: None)
    assert model.discriminant is not None
    before = model.discriminant.directions.clone()
    Trainer(model, made, TrainOptions(), ALONE).run(
        made.examples(pairs, 0), tmp_path, lambda _: None
    )
    kept = load_checkpoint(tmp_path / FINAL)
    again = kept.spec.build()
    fill_model(again, kept)
    torch.testing.assert_close(again.discriminant.directions, before, rtol=0, atol=0)
    assert again.spec.adapts
    assert bool(again.discriminant.axes.any())
    assert bool((again.classify.weight != 0).any())
    # A file of before knows of no discriminant.
    assert FrozenSpec((TokenInput("clip.4", 12),), ("a",)).build().discriminant is None


def test_a_discriminant_of_other_tokens_cannot_be_built() -> None:
    assert "does not have" in spec(linear=("clip.9",)).problem()
    assert spec(linear=("clip.4",)).problem() == ""


def spec(**fields: object) -> FrozenSpec:
    inputs = (TokenInput("clip.4", 12), TokenInput("dino.12", 8))
    return replace(FrozenSpec(inputs, ("a", "b"), width=16, heads=2), **fields)


def random_batch(grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = sum(h * w for h, w in grids)
    return [torch.randn(count, width, generator=generator) for width in (12, 8)]


def test_the_default_is_the_decoder_of_the_design() -> None:
    preset = get_segmenter_preset("frozen")
    assert isinstance(preset, FrozenPreset)
    widths = [384 if name.startswith("dino") else 768 for name in preset.tokens]
    inputs = tuple(map(TokenInput, preset.tokens, widths))
    model = FrozenSpec(inputs, tuple("abcdefghijklmnopqrst")).build()
    readers = sum(2 * w + w * 256 + 256 + 256 * 256 + 256 for w in widths)
    block = 4 * 256 + (3 + 1 + 4 + 4) * 256 * 256 + (3 + 1 + 4 + 1) * 256
    expected = readers + 6 * 256 * 256 + 256 + 2 * block + 256 * 21 + 21
    assert sum(one.numel() for one in model.parameters()) == expected


def test_an_image_does_not_see_the_others_of_its_batch() -> None:
    torch.manual_seed(0)
    model = spec().build().eval()
    grids = [(3, 4), (5, 2), (1, 1)]
    tokens = random_batch(grids)
    together = model(torch.tensor(grids), *tokens)
    start = 0
    for (h, w), logits in zip(grids, together, strict=True):
        assert logits.shape == (1, 3, h, w)
        own = [one[start : start + h * w] for one in tokens]
        (alone,) = model(torch.tensor([(h, w)]), *own)
        torch.testing.assert_close(logits, alone)
        start += h * w


def test_patches_have_no_order_of_their_own() -> None:
    torch.manual_seed(0)
    model = spec().build().eval()
    tokens = random_batch([(3, 4)])
    order = torch.randperm(12)
    (plain,) = model(torch.tensor([(3, 4)]), *tokens)
    (mixed,) = model(torch.tensor([(3, 4)]), *(one[order] for one in tokens))
    torch.testing.assert_close(mixed.flatten(2), plain.flatten(2)[..., order])


def test_a_block_is_attention_and_an_mlp_on_normed_tokens() -> None:
    torch.manual_seed(0)
    block = Block(8, 2).eval()
    tokens = torch.randn(5, 8)
    query, key, value = block.project(block.norm_1(tokens)).chunk(3, dim=1)
    mixed = torch.empty(5, 8)
    for head in (slice(0, 4), slice(4, 8)):
        scores = query[:, head] @ key[:, head].T / math.sqrt(4)
        mixed[:, head] = scores.softmax(1) @ value[:, head]
    after = tokens + block.mix(mixed)
    expected = after + block.mlp(block.norm_2(after))
    torch.testing.assert_close(block(tokens, [5]), expected)


def test_one_step_is_cross_entropy_at_the_labels_size(
    tmp_path: Path, pairs: list[TrainingPair]
) -> None:
    made = recipe(tmp_path, replace(PRESET, dropout=0.0))
    examples = made.examples(pairs, seed=3)
    parts = [examples[position] for position in range(4)]
    model, trained = trainer(made)
    logits = []
    labels = []
    for grid, label, _, *tokens in parts:
        (low,) = model(grid[None], *tokens)
        size = (4 * int(grid[0]), 4 * int(grid[1]))
        high = functional.interpolate(low, size=size, mode="bilinear", align_corners=False)
        logits.append(high[0].flatten(1))
        labels.append(label)
    expected = functional.cross_entropy(torch.cat(logits, 1)[None], torch.cat(labels)[None])
    step = trained.step([examples.collate(parts)])
    assert step.loss == pytest.approx(expected.item(), rel=1e-5)
    assert step.kept == 1
    assert step.picture().shape[2] == 3
    for (wanted, answer), label, one in zip(step.answers(), labels, logits, strict=True):
        assert torch.equal(wanted.flatten(), label)
        assert (answer.flatten() == one.argmax(0)).float().mean() > 0.999  # ties of rounding


def test_doubtful_pixels_do_not_count(tmp_path: Path, pairs: list[TrainingPair]) -> None:
    for pair in pairs:
        sure = np.full(pair.read(3)[1].shape, 0.97, np.float32)
        sure[:, :32] = 0.9
        assert pair.confidence
        write_confidence(pair.confidence, sure)
    made = recipe(tmp_path)
    part = made.part(made.examples(pairs, 0).collate([made.examples(pairs, 0)[0]]))
    labels, weights = part.targets[0]
    assert set(labels.unique().tolist()) == {0, IGNORE}
    assert torch.equal(weights > 0, labels != IGNORE)
    assert int(part.used) == int((labels == 0).sum()) < int(part.labelled)


def test_tokens_and_labels_are_mirrored_together(tmp_path: Path, pairs: list[TrainingPair]) -> None:
    examples = recipe(tmp_path).examples(pairs, seed=0)
    sides = set()
    for position in range(12):
        grid, labels, confidence, tokens, _ = examples[position]
        h, w = grid.tolist()
        marked = labels.view(4 * h, 4 * w)[0] > 0
        sides.add(bool(marked[0]))
        assert torch.equal(examples[position][1], labels)
        # The patch below a marked label has the colour of the marked side.
        left, right = tokens.view(h, w, -1)[0, 0], tokens.view(h, w, -1)[0, -1]
        coloured = left if marked[0] else right
        plain = right if marked[0] else left
        assert coloured.float().abs().sum() > plain.float().abs().sum()
        assert confidence.shape == labels.shape
    assert sides == {False, True}


def test_it_learns_what_tokens_tell(tmp_path: Path, pairs: list[TrainingPair]) -> None:
    made = recipe(tmp_path, replace(PRESET, iterations=60, average=0.9))
    model, trained = trainer(made)
    losses, last = [], model.fuse.weight.detach().clone()

    def note(step: Step) -> None:
        losses.append(step.loss)
        last.copy_(model.fuse.weight)

    trained.run(made.examples(pairs, 0), tmp_path / "c", note)
    assert losses[-1] < 0.2 < losses[0]
    saved = load_checkpoint(tmp_path / "c" / FINAL)
    assert saved.spec == made.spec
    assert saved.spec.towers() == {"clip": "colours 0 a", "dino": "colours 0 b"}
    mean = saved.build()
    assert isinstance(mean, FrozenDecoder)
    assert not torch.equal(mean.fuse.weight, last)  # the mean, not the last
    predictor = predictor_for(mean, made.test, Colours())
    assert predictor.labels == 3
    right = total = 0
    for pair in pairs:
        image, mask, _ = pair.read(3)
        probs = predictor(image)
        np.testing.assert_allclose(probs.sum(0), 1, atol=1e-5)
        right += int((probs.argmax(0) == mask).sum())
        total += mask.size
    assert right / total > 0.9


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_training_ends_with_the_same_bits(
    tmp_path: Path, pairs: list[TrainingPair], stop: int
) -> None:
    class StoppedError(Exception):
        pass

    def stopper(step: Step) -> None:
        if step.iteration == stop:
            raise StoppedError

    made = recipe(tmp_path)
    _, whole = trainer(made)
    whole.run(made.examples(pairs, 0), tmp_path / "whole", lambda _: None)
    # Without room for tokens nothing changes, either.
    other = recipe(tmp_path / "other", limit=0)
    _, broken = trainer(other)
    with pytest.raises(StoppedError):
        broken.run(other.examples(pairs, 0), tmp_path / "broken", stopper)
    torch.manual_seed(99)
    _, again = trainer(other)
    if saved := saved_iterations(tmp_path / "broken"):
        again.restore(load_checkpoint(saved[-1]))
    again.run(other.examples(pairs, 0), tmp_path / "broken", lambda _: None)
    expected, found = (
        load_checkpoint(tmp_path / name / FINAL).weights for name in ("whole", "broken")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_parts_make_the_same_update_as_the_whole(tmp_path: Path, pairs: list[TrainingPair]) -> None:
    made = recipe(tmp_path, replace(PRESET, dropout=0.0))
    examples = made.examples(pairs, 0)
    items = [examples[position] for position in range(4)]
    whole_model, whole = trainer(made)
    part_model, part = trainer(recipe(tmp_path, replace(PRESET, dropout=0.0, accumulate=2)))
    one = whole.step([examples.collate(items)])
    other = part.step([examples.collate(items[:2]), examples.collate(items[2:])])
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    for key, value in whole_model.state_dict().items():
        torch.testing.assert_close(value, part_model.state_dict()[key], rtol=1e-3, atol=1e-5)


def test_the_rate_rises_and_falls(tmp_path: Path) -> None:
    made = recipe(tmp_path, replace(PRESET, iterations=10, warmup=4, lr=1.0))
    rates = [made.rate(index) for index in range(11)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[7] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_only_matrices_decay(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    model = made.spec.build()
    matrices, rest = made.optimizer(model).param_groups
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.01, 0)
    assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert {one.ndim for one in matrices["params"]} == {2}


def test_weights_of_a_backbone_are_refused(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    with pytest.raises(UsageError, match=r"--backbone-weights r\.pth means nothing"):
        made.initialise(made.spec.build(), "r.pth", print)


def test_the_mirror_image_gets_the_mirrored_answer() -> None:
    torch.manual_seed(0)
    model = spec().build()
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    settings = TestSettings((1.0, 1.5), flip=True)
    predictor = predictor_for(model, settings, Colours())
    probs = predictor(image)
    assert probs.shape == (3, 50, 70)
    mirrored = predictor(np.ascontiguousarray(image[:, ::-1]))
    np.testing.assert_allclose(mirrored[:, :, ::-1], probs, atol=1e-5)


@pytest.mark.parametrize(("closer", "power"), [(1.0, 1.0), (1.5, 1.0), (1.0, 1.5)])
def test_answers_spread_over_what_the_towers_hold_for_one_thing(
    closer: float, power: float
) -> None:
    torch.manual_seed(0)
    made = spec(spread=True, finer=closer, attention_power=power)
    model, towers = made.build().eval(), Colours()
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    got = predictor_for(model, TestSettings(), towers)(image)
    found = towers.tokens(image, attention=True, closer=closer)
    with torch.inference_mode():
        grid, flat = flat_tokens(found, model.spec)
        (logits,) = model(torch.tensor([grid]), *(one.half() for one in flat))
    probs = logits[0].softmax(0).flatten(1).double().numpy()
    dino = found["dino.12"].flatten(0, 1).double().numpy()
    unit = dino / np.linalg.norm(dino, axis=1, keepdims=True)
    alike = np.exp((unit @ unit.T - 1) / 0.1)
    attention = found[ATTENTION].flatten(0, 1).double().numpy() ** power
    walk = np.sqrt(
        attention / attention.sum(1, keepdims=True) * (alike / alike.sum(1, keepdims=True))
    )
    for _ in range(3):
        walk /= walk.sum(0, keepdims=True)
        walk /= walk.sum(1, keepdims=True)
    spread = (walk + walk.T) @ probs.T
    spread /= spread.sum(1, keepdims=True)
    reached = torch.from_numpy(spread.T.reshape(1, 3, *grid).astype(np.float32))
    if closer > 1:
        flat = reached[0].flatten(1).T
        near = found["dino.near"].flatten(0, 1)
        reached = finer(flat, grid, near, found["dino.closer"], 0.05)[None]
        assert reached.shape == (1, 3, 4, 6)
    np.testing.assert_allclose(got, resize(reached, (48, 64))[0].numpy(), atol=2e-5)
    np.testing.assert_allclose(got.sum(0), 1, atol=1e-4)
    without = replace(model.spec, spread=False, finer=1.0).build().eval()
    without.load_state_dict(model.state_dict())
    assert np.abs(predictor_for(without, TestSettings(), towers)(image) - got).max() > 1e-3


def test_small_things_and_rare_labels_count() -> None:
    labels = torch.tensor([[[0, 0, 0, 0], [1, IGNORE, 0, 2]]])
    weights = torch.where(labels == IGNORE, 0.0, 1.0)
    weights[0, 0, 0] = 0.0  # four pixels of the background are learnt, one of the others each
    got = balanced(labels, weights, torch.tensor([1.0, 2.0, 8.0]))
    want = [[[0, 0.5, 0.5, 0.5], [2, 0, 0.5, 8]]]
    torch.testing.assert_close(got, torch.tensor(want))


def test_how_much_a_label_counts_comes_from_the_masks_and_is_kept(
    tmp_path: Path, pairs: list[TrainingPair]
) -> None:
    made = recipe(tmp_path, replace(LINEAR, balance=1.0))
    assert made.importance == ()
    some = [*pairs[1::2], pairs[0]]  # three images of the first class, one of the second
    ready = made.start(made.spec.build(), some, lambda *_: None)
    seen = np.zeros(3)
    for pair in some:
        _, labels = cells(pair, made)
        for label in range(3):
            seen[label] += np.sqrt(((labels == label).mean(1) >= 0.75).sum())
    np.testing.assert_allclose(ready.importance, seen.sum() / seen, rtol=1e-6)
    assert made.resume(ready.state()) == ready
    assert (
        recipe(tmp_path, replace(LINEAR, balance=0.0))
        .start(made.spec.build(), some, lambda *_: None)
        .importance
        == ()
    )
    batch = ready.examples(some, 0).collate([ready.examples(some, 0)[k] for k in range(3)])
    weighed, plain = ready.part(batch), made.part(batch)
    for (labels, weights), (_, before) in zip(weighed.targets, plain.targets, strict=True):
        torch.testing.assert_close(
            weights, balanced(labels, before, torch.tensor(ready.importance))
        )
    torch.testing.assert_close(
        weighed.weights, torch.stack([weights.sum() for _, weights in weighed.targets]).sum()[None]
    )


def test_other_towers_are_refused() -> None:
    model = spec(digests={"clip": "colours 0 a", "dino": "f" * 64}).build()
    with pytest.raises(ArtifactError, match="on a tower dino of sha256 ffffffffffff, not colours"):
        predictor_for(model, TestSettings(), Colours())


@pytest.mark.parametrize(
    "fields",
    [{"inputs": ()}, {"width": 1 << 40}, {"heads": 3}, {"blocks": -1}, {"dropout": 1.0}],
    ids=lambda fields: next(iter(fields)),
)
def test_what_no_decoder_can_be_is_known(fields: dict[str, object]) -> None:
    assert spec().problem() == ""
    assert spec(**fields).problem()


def test_classes_are_drawn_evenly() -> None:
    labels = [(0,), (0,), (0,), (0,), (0, 1), (2,), ()]
    draws = EvenClasses(labels, seed=1)
    drawn = [draws.at(position)[0] for position in range(30 * 3)]
    counts = np.bincount(drawn, minlength=7)
    assert counts.tolist() == [6, 6, 6, 6, 36, 30, 0]
    assert [EvenClasses(labels, 1).at(7)[0] for _ in range(2)] == [drawn[7]] * 2
    assert drawn != [EvenClasses(labels, 2).at(position)[0] for position in range(90)]
    chances = {draws.at(position)[1].random() for position in range(90)}
    assert len(chances) == 90


def test_without_labels_images_are_drawn_in_turn(tmp_path: Path, pairs: list[TrainingPair]) -> None:
    bare = [replace(pair, labels=()) for pair in pairs]
    even, turns = recipe(tmp_path), Passes(6, 5)
    found = even.examples(bare, 5)
    for position in range(6):
        index, _ = turns.at(position)
        assert found[position][0].tolist() == list(_grid(bare[index]))


def _grid(pair: TrainingPair) -> tuple[int, int]:
    height, width = pair.read(3)[1].shape
    return -(-height // 16), -(-width // 16)
