"""WeakCLIP's recipe: rates, views, whole images, training and asking, on a small CLIP."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from clipes.config import WeakClipPreset, get_segmenter_preset
from clipes.disk.images import write_confidence, write_mask
from clipes.errors import ArtifactError, UsageError
from clipes.run.tokens import CachedTokens
from clipes.seg.augment import Example
from clipes.seg.checkpoint import FINAL, Checkpoint, load_checkpoint
from clipes.seg.data import TrainingPair
from clipes.seg.kinds import predictor_for, recipe_for
from clipes.seg.loss import Guidance
from clipes.seg.parallel import Processes
from clipes.seg.predict_tokens import TokenPredictor
from clipes.seg.recipes import TestSettings
from clipes.seg.train import Step, Trainer, TrainOptions
from clipes.seg.views import require_patches
from clipes.seg.weakclip import WeakClip, token_names
from clipes.seg.weakclip_examples import distort, may_show, random_view
from clipes.seg.weakclip_predict import WindowPredictor, starts, view_size
from clipes.seg.weakclip_recipe import SpeakingTowers, WeakClipRecipe
from clipes.towers.side_by_side import CLIP, Towers
from clipes.towers.tokens import GLOBAL, JOINT, TowerTokens
from clipes.types import IGNORE
from tests.unit.clip_support import HALF, quiet, small_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Processes(0, 1, torch.device("cpu"))
CLASSES = ("red", "blue")
BLOCKS = (2, 3, 4)
WHOLE = WeakClipPreset(
    "test",
    BLOCKS,
    norm="group",
    crop=0,
    batch=2,
    iterations=4,
    lr=1e-3,
    warmup=1,
    boundary_present=True,
    test_scales=(1.0,),
    flip=False,
)
VIEWS = replace(WHOLE, norm="batch", crop=64, boundary_present=False)


@pytest.fixture(scope="module")
def towers() -> SpeakingTowers:
    source = TowerTokens(Towers(small_backbone(4)), token_names(BLOCKS), {CLIP: "a digest"}, 64)
    generator = torch.Generator().manual_seed(0)
    words = functional.normalize(torch.randn(3, 32, generator=generator), dim=1)
    return SpeakingTowers(source, words, (HALF, HALF), "words: random")


@pytest.fixture
def pairs(tmp_path: Path) -> list[TrainingPair]:
    """Images whose left part is red (class 0) or blue (class 1)."""
    found = []
    for index in range(3):
        height, width = 48 + 16 * index, 80
        image = np.full((height, width, 3), 110, np.uint8)
        mask = np.zeros((height, width), np.uint8)
        image[:, :32] = (220, 30, 30) if index % 2 else (30, 30, 220)
        mask[:, :32] = 1 if index % 2 else 2
        paths = [tmp_path / f"{index}-{kind}.png" for kind in ("image", "mask", "sure")]
        Image.fromarray(image).save(paths[0])
        write_mask(paths[1], mask)
        write_confidence(paths[2], np.full(mask.shape, 0.97, np.float32))
        found.append(TrainingPair(f"p{index}", *paths, (0,) if index % 2 else (1,)))
    return found


def recipe_of(
    towers: SpeakingTowers, tmp_path: Path, preset: WeakClipPreset = WHOLE
) -> WeakClipRecipe:
    tokens = None
    if not preset.crop:
        tokens = CachedTokens(lambda: towers.source, tmp_path / "tokens", 1 << 30)
    made = recipe_for(preset, CLASSES, Guidance(), tokens, open_towers=lambda: towers)
    assert isinstance(made, WeakClipRecipe)
    return made


def model_of(recipe: WeakClipRecipe) -> WeakClip:
    torch.manual_seed(0)
    model = recipe.spec.build()
    recipe.initialise(model, "auto", quiet)
    return model


def test_the_published_presets() -> None:
    voc, coco = get_segmenter_preset("weakclip-voc"), get_segmenter_preset("weakclip-coco")
    assert isinstance(voc, WeakClipPreset)
    assert (voc.blocks, voc.chained, voc.train_adapter, voc.norm) == (
        (4, 6, 8, 12),
        True,
        True,
        "batch",
    )
    assert (voc.crop, voc.scale, voc.contexts, voc.normalise) == (512, (0.5, 2.0), 8, "imagenet")
    assert (voc.batch, voc.iterations, voc.lr, voc.weight_decay) == (16, 20_000, 1e-4, 3e-5)
    crf = voc.boundary_crf
    assert (crf.iterations, crf.gaussian_sxy, crf.gaussian_compat) == (10, 3, 3)
    assert (crf.bilateral_sxy, crf.bilateral_srgb, crf.bilateral_compat) == (80, 13, 10)
    assert (len(voc.test_scales), voc.flip, voc.average, voc.boundary_every) == (6, True, 0, 1)
    assert coco == replace(voc, name="weakclip-coco", batch=24, iterations=40_000)
    # Trainings of before there could be a second tower are gone on with.
    assert "beside" not in voc.to_dict()
    assert get_segmenter_preset("weakclip-plus").to_dict()["beside"] == ("dino.12",)


def test_the_rate_rises_in_1500_updates_and_ends_at_a_millionth(
    towers: SpeakingTowers, tmp_path: Path
) -> None:
    preset = get_segmenter_preset("weakclip-voc")
    assert isinstance(preset, WeakClipPreset)
    rate = recipe_of(towers, tmp_path, preset).rate
    assert rate(0) == pytest.approx(1e-10, rel=1e-6)
    whole = 1e-6 + 0.5 * (1e-4 - 1e-6) * (1 + math.cos(math.pi * 750 / 20_000))
    assert rate(750) == pytest.approx(whole / 2, rel=1e-5)
    assert rate(10_000) == pytest.approx(5.05e-5)
    assert rate(20_000) == pytest.approx(1e-6)


def test_everything_that_learns_decays_and_the_adapter_need_not_learn(
    towers: SpeakingTowers, tmp_path: Path
) -> None:
    recipe = recipe_of(towers, tmp_path)
    model = model_of(recipe)
    (group,) = recipe.optimizer(model).param_groups
    assert (group["weight_decay"], len(group["params"])) == (3e-5, len(list(model.parameters())))
    code = recipe_of(towers, tmp_path, replace(WHOLE, train_adapter=False, chained=False))
    other = model_of(code)
    left = {id(one) for group in code.optimizer(other).param_groups for one in group["params"]}
    out = [other.adapter, *other.match.unused()]
    assert not left & {id(one) for module in out for one in module.parameters()}
    assert len(left) == sum(one.requires_grad for one in other.parameters()) > 0


# --- views


def halves(height: int, width: int) -> Example:
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2] = 200
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 1
    return image, mask, np.full((height, width), 0.5, np.float32)


def test_views_are_scaled_by_their_shorter_side_and_padded_with_what_is_ignored() -> None:
    preset = replace(VIEWS, scale=(0.5, 0.5))
    for seed in range(8):
        _, mask, sure = random_view(halves(200, 300), preset, np.random.default_rng(seed))
        assert mask.shape == (64, 64)
        assert int((mask != IGNORE).sum()) == 32 * 48
        assert np.array_equal(sure > 0, mask != IGNORE)


def test_what_is_padded_stays_the_mean_whatever_becomes_of_the_colours() -> None:
    preset, coloured = replace(VIEWS, scale=(0.5, 0.5)), 0
    for seed in range(8):
        image, mask, _ = random_view(halves(200, 300), preset, np.random.default_rng(seed))
        assert (image[mask == IGNORE] == [124, 116, 104]).all()
        coloured += not {*image[mask != IGNORE].ravel().tolist()} <= {*halves(200, 300)[0].ravel()}
    assert coloured


def test_very_long_images_are_shrunk_to_four_times_the_side() -> None:
    mask = random_view(
        halves(10, 1000), replace(VIEWS, scale=(1.0, 1.0)), np.random.default_rng(0)
    )[1]
    assert int((mask != IGNORE).sum()) == 3 * 64  # 256 x 3


def test_no_label_takes_more_than_three_quarters_of_a_view_if_it_can_be_helped() -> None:
    preset = replace(VIEWS, scale=(1.0, 1.0))
    shares = []
    for seed in range(40):
        mask = random_view(halves(64, 160), preset, np.random.default_rng(seed))[1]
        shares.append(max((mask == 0).mean(), (mask == 1).mean()))
    assert np.mean(np.array(shares) <= 0.75) > 0.9  # at random it were 33 in 97


def test_mirrored_views_keep_labels_on_their_pixels() -> None:
    preset, sides = replace(VIEWS, scale=(1.0, 1.0)), set()
    for seed in range(12):
        image, mask, _ = random_view(halves(64, 64), preset, np.random.default_rng(seed))
        sides.add(int(mask[0, 0]))
        assert image[mask == 1].mean() > image[mask == 0].mean() + 40
    assert sides == {0, 1}


def test_colours_change_within_bounds_and_greys_keep_no_hue() -> None:
    image = np.full((4, 4, 3), 120, np.uint8)
    seen = {tuple(distort(image, np.random.default_rng(seed))[0, 0]) for seed in range(60)}
    assert all(red == green == blue for red, green, blue in seen)
    values = [one[0] for one in seen]
    assert min(values) >= (120 - 32) / 2 - 1
    assert max(values) <= (120 + 32) * 1.5
    assert len(values) > 20
    red = np.full((4, 4, 3), (200, 20, 20), np.uint8)
    hues = [cv2.cvtColor(distort(red, np.random.default_rng(seed)), cv2.COLOR_RGB2HSV)[0, 0, 0]
            for seed in range(60)]  # fmt: skip
    assert all(min(hue, 180 - hue) <= 19 for hue in map(int, hues))
    assert len(set(hues)) > 10


def test_an_image_may_show_its_labels_and_what_its_mask_has(pairs: list[TrainingPair]) -> None:
    mask = np.array([[0, IGNORE, 3]], np.uint8)
    assert may_show(pairs[0], mask, 4).tolist() == [False, True, True, False]


def test_tokens_of_views_are_those_of_the_tower(
    towers: SpeakingTowers, pairs: list[TrainingPair], tmp_path: Path
) -> None:
    recipe = recipe_of(towers, tmp_path, VIEWS)
    examples = recipe.examples(pairs, 0)
    batch = examples.collate([examples[0], examples[1]])
    grids, *tokens = recipe.part(batch).inputs
    assert grids.tolist() == [[4, 4], [4, 4]]
    assert [tuple(one.shape) for one in tokens] == [(32, 64)] * 3 + [(32, 32), (2, 32)]
    pixels = ((batch[0][1] * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
    alone = towers.source.tokens(pixels)
    for name, found in ((JOINT, tokens[3][16:]), (GLOBAL, tokens[4][1:])):
        torch.testing.assert_close(alone[name].flatten(0, 1), found, rtol=1e-3, atol=1e-3)


def test_the_joint_tokens_are_what_clip_projects(towers: SpeakingTowers) -> None:
    clip = small_backbone(4)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    source = TowerTokens(Towers(clip), (JOINT, GLOBAL), {CLIP: ""}, 64)
    found = source.tokens(image)
    visual = clip.visual
    with torch.inference_mode():
        tokens = clip._embed(clip.prepare(image, 64)[None], (4, 4))
        expected = visual.ln_post(visual.transformer(tokens)) @ visual.proj
    assert source.widths == {JOINT: 32, GLOBAL: 32}
    torch.testing.assert_close(found[GLOBAL][0], expected[0, :1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[JOINT].flatten(0, 1), expected[0, 1:], rtol=1e-3, atol=1e-4)


# --- whole images


def test_whole_images_are_mirrored_with_labels_and_the_small_copy(
    towers: SpeakingTowers, pairs: list[TrainingPair], tmp_path: Path
) -> None:
    recipe = recipe_of(towers, tmp_path)
    examples, sides = recipe.examples(pairs, 0), set()
    for position in range(12):
        part = recipe.part(examples.collate([examples[position]]))
        (target,) = part.targets
        h, w = part.inputs[0][0].tolist()
        assert target.labels.shape == (1, 4 * h, 4 * w)
        assert target.image.shape == (2 * h, 2 * w, 3)
        shown = target.labels[0, 0] > 0
        sides.add(bool(shown[0]))
        colours = np.abs(target.image.astype(int) - 110).sum(2)[0]
        assert (colours[0] > 100) == bool(shown[0])
        assert (colours[-1] > 100) == bool(shown[-1])
        label = int(target.labels.max())
        assert target.present.tolist() == [label == 1, label == 2]
    assert sides == {False, True}


@pytest.mark.parametrize("preset", [WHOLE, VIEWS], ids=["whole", "views"])
def test_a_cell_has_the_label_of_the_pixel_in_its_middle(
    towers: SpeakingTowers, pairs: list[TrainingPair], tmp_path: Path, preset: WeakClipPreset
) -> None:
    edge = 29  # above it: row 28, the middle of the fourth cell; below it all others near
    pair = replace(pairs[1], labels=(0,))
    mask = np.zeros((64, 64), np.uint8)
    mask[edge:] = 1
    Image.fromarray(np.full((64, 64, 3), 110, np.uint8)).save(pair.image)
    assert pair.mask is not None
    assert pair.confidence is not None
    write_mask(pair.mask, mask)
    write_confidence(pair.confidence, np.full(mask.shape, 0.97, np.float32))
    recipe = recipe_of(towers, tmp_path, replace(preset, scale=(1.0, 1.0)))
    examples = recipe.examples([pair], 0)
    (target,) = recipe.part(examples.collate([examples[0]])).targets
    assert target.cells.tolist() == mask[4::8, 4::8][None].tolist()
    assert bool((target.cell_weights == 1).all())


def test_of_every_few_images_one_has_a_boundary_that_counts_for_all(
    towers: SpeakingTowers, pairs: list[TrainingPair], tmp_path: Path
) -> None:
    recipe = recipe_of(towers, tmp_path, replace(WHOLE, boundary_every=3))
    examples = recipe.examples(pairs, 0)
    part = recipe.part(examples.collate([examples[position] for position in range(2, 8)]))
    assert [one.boundary for one in part.targets] == [0, 3, 0, 0, 3, 0]


@pytest.mark.parametrize("preset", [WHOLE, VIEWS], ids=["whole", "views"])
def test_it_learns_what_it_is_taught(
    towers: SpeakingTowers, pairs: list[TrainingPair], tmp_path: Path, preset: WeakClipPreset
) -> None:
    recipe = recipe_of(towers, tmp_path, replace(preset, iterations=1000))
    trainer = Trainer(model_of(recipe), recipe, TrainOptions(), ALONE)
    examples = recipe.examples(pairs, 0)
    batch = examples.collate([examples[0], examples[1]])
    steps = [trainer.step([batch]) for _ in range(12)]
    assert steps[-1].loss < 0.5 * steps[0].loss
    picture, answers = steps[-1].picture(), steps[-1].answers()
    assert picture.shape == (sum(len(one) for one, _ in answers), max_width(answers), 3)
    agreed = [(wanted == answer)[wanted != IGNORE].float().mean() for wanted, answer in answers]
    assert min(agreed) > 0.5, "it has learnt them by now"
    assert steps[-1].kept == 1


def max_width(answers: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Columns of image, labels and answer beside each other."""
    return max(3 * wanted.shape[1] for wanted, _ in answers)


def test_parts_make_the_same_loss_as_the_whole(
    towers: SpeakingTowers, pairs: list[TrainingPair], tmp_path: Path
) -> None:
    losses = []
    for accumulate in (1, 2):
        recipe = recipe_of(towers, tmp_path, replace(WHOLE, accumulate=accumulate))
        trainer = Trainer(model_of(recipe), recipe, TrainOptions(), ALONE)
        trainer._network.eval()  # dropout draws by the part
        examples = recipe.examples(pairs, 0)
        items = [[examples[0]], [examples[1]]]
        parts = items if accumulate == 2 else [items[0] + items[1]]
        losses.append(trainer.step([examples.collate(part) for part in parts]).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_saves_and_goes_on_exactly(
    towers: SpeakingTowers, pairs: list[TrainingPair], tmp_path: Path
) -> None:
    recipe = recipe_of(towers, tmp_path, replace(WHOLE, average=0.9))
    options = TrainOptions(save_every=2)
    losses: list[float] = []
    middle: list[Checkpoint] = []

    def note(step: Step) -> None:
        losses.append(step.loss)
        if step.iteration == 3:
            middle.append(load_checkpoint(tmp_path / "iteration-0000002.pt"))

    Trainer(model_of(recipe), recipe, options, ALONE).run(recipe.examples(pairs, 0), tmp_path, note)
    whole = load_checkpoint(tmp_path / FINAL)
    again = Trainer(recipe.spec.build(), recipe, options, ALONE)
    again.restore(middle[0])
    again.run(recipe.examples(pairs, 0), tmp_path / "again", lambda step: losses.append(step.loss))
    assert losses[4:] == losses[2:4]
    assert whole.spec == recipe.spec
    assert whole.spec.towers() == {CLIP: "a digest"}
    rest = load_checkpoint(tmp_path / "again" / FINAL).weights
    assert all(torch.equal(rest[name], one) for name, one in whole.weights.items())


def test_what_makes_no_sense_is_refused(towers: SpeakingTowers, tmp_path: Path) -> None:
    recipe = recipe_of(towers, tmp_path, replace(VIEWS, crop=100))
    with pytest.raises(UsageError, match="views of 100 pixels are not of whole patches"):
        recipe.check_part(2)
    with pytest.raises(UsageError, match="CLIP stays as it is"):
        recipe_of(towers, tmp_path).initialise(
            recipe_of(towers, tmp_path).spec.build(), "f.pt", quiet
        )


# --- asking


def test_windows_cover_a_view_at_two_thirds_of_their_side() -> None:
    assert starts(64, 64) == [0]
    assert starts(48, 64) == [0]
    assert starts(112, 64) == [0, 32, 48]
    assert view_size((375, 500), 512) == (512, 688)
    assert view_size((10, 1000), 512) == (512, 2048)
    assert view_size((3, 3), 16) == (16, 16)


def test_windows_are_averaged_before_the_softmax(towers: SpeakingTowers, tmp_path: Path) -> None:
    model = model_of(recipe_of(towers, tmp_path, VIEWS)).eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    ask = predictor_for(model, TestSettings((1.0,)), towers.source)
    assert isinstance(ask, WindowPredictor)
    total, count = torch.zeros(1, 3, 8, 12), torch.zeros(12)
    for left in (0, 32):
        found = towers.source.tokens(np.ascontiguousarray(image[:, left : left + 64]))
        tokens = [found[one.name].flatten(0, 1) for one in model.spec.inputs]
        with torch.no_grad():
            total[..., left // 8 : left // 8 + 8] += model(torch.tensor([[4, 4]]), *tokens)[0]
        count[left // 8 : left // 8 + 8] += 1
    mean = functional.interpolate(total / count, size=(64, 96), mode="bilinear")
    np.testing.assert_allclose(ask(image), mean.softmax(1)[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("preset", [WHOLE, VIEWS], ids=["whole", "views"])
def test_asking_averages_scales_and_mirror_images(
    towers: SpeakingTowers, tmp_path: Path, preset: WeakClipPreset
) -> None:
    model = model_of(recipe_of(towers, tmp_path, preset))
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    ask = predictor_for(model, TestSettings((1.0, 0.75), flip=True), towers.source)
    assert isinstance(ask, WindowPredictor if preset.crop else TokenPredictor)
    probs = ask(image)
    assert probs.shape == (3, 50, 70)
    np.testing.assert_allclose(probs.sum(0), 1, rtol=1e-5)
    told = ask(image, present=[1])
    assert probs[1].any()
    assert not told[1].any()
    np.testing.assert_allclose(told.sum(0), 1, rtol=1e-4)
    back = np.ascontiguousarray(image[:, ::-1])
    alone = [predictor_for(model, TestSettings((scale,)), towers.source) for scale in (1.0, 0.75)]
    four = [part for one in alone for part in (one(image), one(back)[:, :, ::-1])]
    np.testing.assert_allclose(probs, np.mean(four, 0), atol=1e-5)
    np.testing.assert_allclose(ask(back)[:, :, ::-1], probs, atol=0.02)


def test_a_clip_of_other_patches_is_refused_for_views() -> None:
    require_patches(16, "weakclip-voc")
    with pytest.raises(UsageError, match="patches of 16 pixels, this CLIP has patches of 14"):
        require_patches(14, "weakclip-voc")


def test_a_training_that_ends_in_the_rise_of_its_rate_says_so(
    towers: SpeakingTowers, tmp_path: Path
) -> None:
    recipe = recipe_of(towers, tmp_path, replace(WHOLE, warmup=4))
    told: list[str] = []
    recipe.initialise(recipe.spec.build(), "auto", told.append)
    assert "the rate rises for 4 updates: this training ends before" in told


def test_another_tower_is_refused(towers: SpeakingTowers, tmp_path: Path) -> None:
    other = TowerTokens(Towers(small_backbone(4)), token_names(BLOCKS), {CLIP: "another"}, 64)
    for preset in (WHOLE, VIEWS):
        model = model_of(recipe_of(towers, tmp_path, preset))
        with pytest.raises(ArtifactError, match="trained on a tower clip"):
            predictor_for(model, TestSettings(), other)
