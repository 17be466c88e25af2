"""WeCLIP's recipe: rates, views, labels made on the way, training and asking, on a small CLIP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from clipes.config import BOX_THRESHOLDS, CamParams, WeClipPreset, get_segmenter_preset
from clipes.errors import ArtifactError, UsageError
from clipes.maps.affinity import propagate, sinkhorn
from clipes.maps.evidence import by_gradient
from clipes.maps.rfm import refined_attention
from clipes.masks.par import par
from clipes.seg.checkpoint import FINAL, Checkpoint, load_checkpoint
from clipes.seg.data import TrainingPair
from clipes.seg.kinds import predictor_for
from clipes.seg.parallel import Processes
from clipes.seg.recipes import TestSettings
from clipes.seg.resize import resize
from clipes.seg.train import Step, Trainer, TrainOptions
from clipes.seg.weclip_labels import Teacher, make_labels
from clipes.seg.weclip_recipe import WeClipRecipe, random_view
from clipes.towers.side_by_side import CLIP, Towers
from clipes.towers.tokens import TowerTokens
from tests.unit.clip_support import HALF
from tests.unit.weclip_support import clip_and_words, unmasked_pairs, views

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Processes(0, 1, torch.device("cpu"))
CLASSES = ("cat", "dog", "sofa")
PRESET = WeClipPreset(
    "test", crop=64, batch=2, iterations=4, warmup=1, affinity_blocks=2, refine_blocks=3, side=64
)
DIGESTS = {CLIP: "a digest"}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    clip, words = clip_and_words(CLASSES)
    return Teacher(clip, words, HALF, HALF, DIGESTS)


@pytest.fixture
def pairs(tmp_path: Path) -> list[TrainingPair]:
    return unmasked_pairs(tmp_path)


def recipe_of(teacher: Teacher, preset: WeClipPreset = PRESET) -> WeClipRecipe:
    return WeClipRecipe(preset, CLASSES, lambda: teacher)


def test_the_published_presets() -> None:
    voc, coco = get_segmenter_preset("weclip-voc"), get_segmenter_preset("weclip-coco")
    assert isinstance(voc, WeClipPreset)
    assert (voc.crop, voc.batch, voc.iterations, voc.weight_decay) == (320, 4, 30_000, 0.01)
    assert (voc.scale, voc.normalise, voc.refine_absolute) == ((0.5, 2.0), "imagenet", False)
    assert (voc.refine_blocks, voc.refine_from, voc.box_threshold) == (6, 15_000, 0.4)
    assert (voc.side, voc.test_scales, voc.flip, voc.crf) == (512, (1.0, 0.75), True, False)
    changed = {"iterations": 80_000, "refine_blocks": 10, "refine_from": 40_000}
    lambda_ = BOX_THRESHOLDS["coco"]
    assert coco == replace(voc, name="weclip-coco", box_threshold=lambda_, **changed)


def test_the_true_rate_rises_in_fifty_updates_and_falls_from_the_start(teacher: Teacher) -> None:
    preset = get_segmenter_preset("weclip-voc")
    assert isinstance(preset, WeClipPreset)
    rate = recipe_of(teacher, preset).rate
    assert rate(0) == pytest.approx(2e-9, rel=1e-6)
    assert rate(25) == pytest.approx(1e-3, rel=1e-5)
    assert rate(50) == pytest.approx(1.99667e-3, rel=1e-5)
    assert rate(15_000) == pytest.approx(1e-3)


def test_everything_decays(teacher: Teacher) -> None:
    recipe = recipe_of(teacher)
    model = recipe.spec.build()
    (group,) = recipe.optimizer(model).param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    settings = (group["betas"], group["eps"], group["weight_decay"], group["lr"])
    assert settings == ((0.9, 0.999), 1e-8, 0.01, 2e-3)


def test_small_images_are_padded_with_black_and_large_ones_cut() -> None:
    image = np.full((40, 30, 3), 200, np.uint8)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        shrunk = random_view(image, replace(PRESET, scale=(0.5, 0.5)), rng)
        assert shrunk.shape == (64, 64, 3)
        assert int((shrunk == 200).all(2).sum()) == 20 * 15
        assert int((shrunk == 0).all(2).sum()) == 64 * 64 - 20 * 15
        assert (random_view(image, replace(PRESET, scale=(3.0, 3.0)), rng) == 200).all()


def test_views_are_made_smaller_as_pillow_does() -> None:
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    view = random_view(image, replace(PRESET, scale=(0.5, 0.5)), np.random.default_rng(1))
    small = np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(view, small) or np.array_equal(view, small[:, ::-1])
    assert view.std() < 30  # 37 without an average over all pixels


def test_examples_name_their_classes_and_update(
    teacher: Teacher, pairs: list[TrainingPair]
) -> None:
    examples = recipe_of(teacher).examples(pairs, seed=0)
    drawn = [examples[position] for position in range(6)]
    present = {tuple(one[1].nonzero()[:, 0].tolist()) for one in drawn}
    assert present == {(0,), (1, 2), (1,)}
    assert [int(one[2]) for one in drawn] == [0, 0, 1, 1, 2, 2]
    assert torch.equal(drawn[4][0], examples[4][0])


def test_tokens_are_those_of_each_block_as_it_leaves_them(teacher: Teacher) -> None:
    tokens, _ = teacher.look(views(), torch.tensor([[True, False, False]] * 2), PRESET)
    source = TowerTokens(Towers(teacher.clip), ["clip.1", "clip.3"], DIGESTS, 16, raw=True)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels = teacher.clip.prepare(image, 16)[None]
    same, _ = teacher.look(pixels, torch.tensor([[True, False, False]]), PRESET)
    assert tokens.shape == (2, 3, 4, 4, 64)
    for layer, name in ((0, "clip.1"), (2, "clip.3")):
        torch.testing.assert_close(same[0, layer], source.tokens(image)[name])


@pytest.mark.parametrize("refined", [False, True])
def test_labels_are_cams_spread_by_attention_and_refined_by_par(
    teacher: Teacher, refined: bool
) -> None:
    some = views()
    present = torch.tensor([[True, False, False], [False, True, True]])
    _, seen = teacher.look(some, present, PRESET)
    tokens = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    affinity = (tokens @ tokens.mT).sigmoid() if refined else None
    labels = make_labels(seen, some, affinity, PRESET)

    params = CamParams(affinity_blocks=2, last_row_in_box=False)
    evidence = by_gradient(
        Towers(teacher.clip), teacher.vectors, params, {CLIP: some}, [[0], [1, 2]]
    )
    for image, values in ((0, [0, 1]), (1, [0, 2, 3])):
        attention = evidence[image].attention
        if affinity is not None:
            candidates = seen[image].attention[-3:]
            attention = refined_attention(candidates, affinity[image], absolute=False)
        maps = propagate(sinkhorn(attention, 3), evidence[image].sources, params, 2)
        large = [cv2.resize(one, (64, 64), interpolation=cv2.INTER_LINEAR) for one in maps]
        scores = np.stack([1 - np.max(large, 0), *large])
        expected = par(some[image], torch.from_numpy(scores)).argmax(0)
        agreed = (torch.tensor(values)[expected] == labels[image]).float().mean()
        assert agreed > 0.999  # rounding may tip a tie


def test_what_is_learnt_refines_labels_from_the_update_that_the_preset_says(
    teacher: Teacher,
) -> None:
    recipe = recipe_of(teacher, replace(PRESET, refine_from=7))
    present = torch.tensor([[True, False, False]] * 2)
    parts = [recipe.part((views(), present, torch.tensor([t, t]))) for t in (6, 7)]
    assert [part.updates for part in parts] == [6, 7]
    # An affinity of single patches tears the maps apart.
    torn = (torch.eye(16) * 0.9 + 0.01).repeat(2, 1, 1)
    outputs = [torch.zeros(2, 4, 4, 4), torn]
    assert recipe.picture(outputs, parts[0]).shape == (128, 192, 3)
    assert not np.array_equal(*(recipe.picture(outputs, part) for part in parts))


def test_training_learns_saves_and_goes_on_exactly(
    teacher: Teacher, pairs: list[TrainingPair], tmp_path: Path
) -> None:
    recipe = recipe_of(teacher, replace(PRESET, refine_from=2))
    options = TrainOptions(save_every=3)
    losses: list[float] = []
    middle: list[Checkpoint] = []

    def note(step: Step) -> None:
        losses.append(step.loss)
        if step.iteration == 4:
            middle.append(load_checkpoint(tmp_path / "iteration-0000003.pt"))

    Trainer(recipe.spec.build(), recipe, options, ALONE).run(
        recipe.examples(pairs, 0), tmp_path, note
    )
    assert len(losses) == 4
    assert all(np.isfinite(losses))
    whole = load_checkpoint(tmp_path / FINAL)
    again = Trainer(recipe.spec.build(), recipe, options, ALONE)
    again.restore(middle[0])
    again.run(recipe.examples(pairs, 0), tmp_path / "again", lambda step: losses.append(step.loss))
    assert losses[4] == losses[3]
    assert whole.spec == recipe.spec
    rest = load_checkpoint(tmp_path / "again" / FINAL).weights
    assert all(torch.equal(rest[name], one) for name, one in whole.weights.items())


def test_it_learns_what_it_is_taught(teacher: Teacher, pairs: list[TrainingPair]) -> None:
    recipe = recipe_of(teacher, replace(PRESET, iterations=1000, scale=(1.0, 1.0), crop=48))
    torch.manual_seed(0)
    trainer = Trainer(recipe.spec.build(), recipe, TrainOptions(), ALONE)
    examples = recipe.examples(pairs[:2], 0)
    batch = examples.collate([examples[0], examples[1]])
    losses = [trainer.step([batch]).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_asking_averages_scales_and_mirror_images(teacher: Teacher) -> None:
    model = recipe_of(teacher).spec.build()
    source = TowerTokens(Towers(teacher.clip), model.spec.inputs, DIGESTS, 64, raw=True)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    ask = predictor_for(model, TestSettings((1.0, 0.75), flip=True), source)
    probs = ask(image)
    assert probs.shape == (4, 50, 70)
    np.testing.assert_allclose(probs.sum(0), 1, rtol=1e-5)
    answers, whole = [], model.spec.side / 70
    for scale in (1.0, 0.75):
        size = (round(70 * whole * scale), round(50 * whole * scale))
        for mirrored in (False, True):
            view = cv2.resize(image, size)[:, :: -1 if mirrored else 1]
            with torch.inference_mode():
                answer = model.score(source.tokens(np.ascontiguousarray(view)))
            answers.append(answer.flip(3) if mirrored else answer)
    mean = torch.stack([resize(one, answers[0].shape[2:]) for one in answers]).mean(0)
    expected = resize(mean, (50, 70)).softmax(1)[0].numpy()
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    reordered = predictor_for(model, TestSettings((0.75, 1.0), flip=True), source)(image)
    np.testing.assert_allclose(reordered, probs, atol=1e-5)
    told = ask(image, present=[1])
    assert probs[1].any()
    assert not told[1].any()
    np.testing.assert_allclose(told.sum(0), 1, rtol=1e-4)
    mirrored = ask(np.ascontiguousarray(image[:, ::-1]))
    np.testing.assert_allclose(mirrored[:, :, ::-1], probs, atol=0.02)
    with pytest.raises(UsageError, match="WeCLIP is not asked at a scale of 3"):
        predictor_for(model, TestSettings((1.0, 3.0)), source)
    other = TowerTokens(Towers(teacher.clip), model.spec.inputs, {CLIP: "another"}, 64, raw=True)
    with pytest.raises(ArtifactError, match="trained on a tower clip"):
        predictor_for(model, TestSettings(), other)


def test_a_backbones_weights_mean_nothing(teacher: Teacher) -> None:
    recipe = recipe_of(teacher)
    told: list[str] = []
    recipe.initialise(recipe.spec.build(), "auto", told.append)
    assert "labels are made as it learns" in told[0]
    with pytest.raises(UsageError, match="the towers stay as they are"):
        recipe.initialise(recipe.spec.build(), "file.pt", told.append)
