"""WeCLIP+: its published size, what its two towers see, its loss, its labels, training, asking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from clipes.config import (
    BOX_THRESHOLDS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    WeClipPlusPreset,
    get_segmenter_preset,
)
from clipes.maps.affinity import box_mask, sinkhorn, walked
from clipes.maps.rfm import refined_attention
from clipes.masks.par import par
from clipes.seg.checkpoint import FINAL, load_checkpoint
from clipes.seg.data import TrainingPair
from clipes.seg.frozen import TokenInput
from clipes.seg.kinds import predictor_for
from clipes.seg.parallel import Processes
from clipes.seg.recipes import TestSettings
from clipes.seg.resize import resize
from clipes.seg.train import Step, Trainer, TrainOptions
from clipes.seg.weclip_labels import PlusTeacher, labels_of_the_sure, make_labels
from clipes.seg.weclip_loss import (
    affinity_loss,
    affinity_target,
    balanced_cross_entropy,
    dice_loss,
    weclip_plus_loss,
)
from clipes.seg.weclip_plus import WeClipPlusSpec
from clipes.seg.weclip_plus_recipe import WeClipPlusRecipe
from clipes.towers.side_by_side import CLIP, DINO, Towers
from clipes.towers.tokens import TowerTokens
from tests.dino_support import tiny_dino
from tests.unit.clip_support import HALF
from tests.unit.weclip_support import clip_and_words, unmasked_pairs, views

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Processes(0, 1, torch.device("cpu"))
CLASSES = ("cat", "dog", "sofa")
PRESET = WeClipPlusPreset(
    "test", crop=64, batch=2, iterations=4, warmup=1, affinity_blocks=2, refine_blocks=3, side=64
)
DIGESTS = {CLIP: "a digest", DINO: "another"}
SPEC = WeClipPlusSpec(
    ("a", "b"),
    read=(TokenInput("clip.3", 12), TokenInput("dino.2", 8)),
    width=16,
    blocks=2,
    heads=2,
)


@pytest.fixture(scope="module")
def teacher() -> PlusTeacher:
    clip, words = clip_and_words(CLASSES)
    return PlusTeacher(clip, words, HALF, HALF, DIGESTS, tiny_dino())


@pytest.fixture
def pairs(tmp_path: Path) -> list[TrainingPair]:
    return unmasked_pairs(tmp_path)


def recipe_of(teacher: PlusTeacher, preset: WeClipPlusPreset = PRESET) -> WeClipPlusRecipe:
    return WeClipPlusRecipe(preset, CLASSES, lambda: teacher)


@pytest.mark.parametrize(
    ("width", "blocks", "count"), [(384, 3, 2_933_269), (768, 3, 3_031_573), (1024, 5, 4_676_629)]
)
def test_the_published_decoders_have_the_published_sizes(
    width: int, blocks: int, count: int
) -> None:
    read = (TokenInput("clip.11", 768), TokenInput("dino.12", width))
    names = tuple(f"class {number}" for number in range(20))
    model = WeClipPlusSpec(names, read=read, blocks=blocks).build()
    assert sum(one.numel() for one in model.parameters()) == count


def test_the_published_presets() -> None:
    voc, coco = get_segmenter_preset("weclip-plus-voc"), get_segmenter_preset("weclip-plus-coco")
    assert isinstance(voc, WeClipPlusPreset)
    assert (voc.lr, voc.batch, voc.iterations, voc.refine_from) == (2e-4, 4, 30_000, 0)
    assert (voc.boxes, voc.sure_from, voc.sure, voc.test_scales) == (False, 18_000, 0.75, (1, 1.5))
    changed = {"iterations": 80_000, "batch": 8, "refine_blocks": 8, "sure_from": 40_000}
    lambda_ = BOX_THRESHOLDS["coco"]
    assert coco == replace(
        voc, name="weclip-plus-coco", box_threshold=lambda_, boxes=True, **changed
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 3},
        {"read": SPEC.read[:1]},
        {"read": SPEC.read[::-1]},
        {"width": 1 << 20},
        {"dropout": 1.0},
        {"blocks": -1},
    ],
)
def test_specs_of_no_decoder_say_so(wrong: dict[str, object]) -> None:
    assert not SPEC.problem()
    assert replace(SPEC, **wrong).problem()


def test_both_towers_are_answered_by_the_same_blocks_on_clips_grid() -> None:
    torch.manual_seed(0)
    model = SPEC.build().eval()
    clip, dino = torch.randn(2, 4, 5, 12), torch.randn(2, 6, 7, 8)
    by_clip, by_dino, affinity = model(clip, dino)
    fused = []
    for number, tokens in enumerate((clip, dino)):
        read = model.fuse[number](model.readers[number](tokens)).permute(0, 3, 1, 2)
        brought = functional.interpolate(read, (4, 5), mode="bilinear", align_corners=False)
        fused.append(brought.flatten(2).mT)
    for logits, one in ((by_clip, fused[0]), (by_dino, fused[1])):
        expected = model.classify(model.blocks(one))
        torch.testing.assert_close(logits.flatten(2).mT, expected)
    both = torch.cat(fused, 2)
    torch.testing.assert_close(affinity, (both @ both.mT).sigmoid())
    tokens = {"clip.3": clip[0], "dino.2": dino[0]}
    torch.testing.assert_close(model.score(tokens), (by_clip[:1] + by_dino[:1]) / 2)


def test_dice_is_of_sums_over_the_batch() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 2, (2, 4, 4))
    probs = logits.softmax(1)
    expected = []
    for label in range(3):
        wanted = (labels == label).float()
        common = (probs[:, label] * wanted).sum()
        expected.append(2 * common / (probs[:, label].sum() + wanted.sum()))
    assert expected[2] == 0  # no pixel is of that label
    torch.testing.assert_close(dice_loss(logits, labels), 1 - torch.stack(expected).mean())


def test_each_tower_learns_a_tenth_of_the_others_answer() -> None:
    clip, dino = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    labels, affinity = torch.randint(0, 3, (2, 4, 4)), torch.rand(2, 16, 16)
    cams = torch.randint(0, 3, (2, 4, 4))  # before the decoder labelled what it is sure of
    mean = (clip + dino) / 2
    expected = (
        balanced_cross_entropy(mean, labels)
        + dice_loss(mean, labels)
        + 0.1 * affinity_loss(affinity, affinity_target(cams, (4, 4)))
        + 0.1 * balanced_cross_entropy(clip, dino.argmax(1))
        + 0.1 * balanced_cross_entropy(dino, clip.argmax(1))
    )
    torch.testing.assert_close(weclip_plus_loss(clip, dino, affinity, cams, labels), expected)


@pytest.mark.parametrize("label", [0, 1])
def test_batches_of_one_kind_have_a_finite_loss_and_gradient(label: int) -> None:
    model = SPEC.build()
    outputs = model(torch.randn(2, 4, 5, 12), torch.randn(2, 6, 7, 8))
    labels = torch.full((2, 64, 80), label)
    loss = weclip_plus_loss(*outputs, labels, labels)
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(one.grad.isfinite().all()) for one in model.parameters())


def test_the_second_tower_sees_a_view_in_its_own_colours_and_patches(teacher: PlusTeacher) -> None:
    some = views()
    tokens = recipe_of(teacher).part((some, torch.eye(2, 3).bool(), torch.zeros(2))).inputs[1]
    side = teacher.dino.patch
    grid = 64 // side
    pixels = some * 0.5 + 0.5
    mean, std = (torch.tensor(one)[:, None, None] for one in (IMAGENET_MEAN, IMAGENET_STD))
    seen = resize((pixels - mean) / std, (grid * side, grid * side))
    expected = teacher.dino.encode(seen).unflatten(1, (grid, grid))
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("least", [1.0, 1e-3])
@pytest.mark.parametrize("boxes", [False, True])
def test_maps_are_multiplied_by_what_patches_are_taken_for(
    teacher: PlusTeacher, boxes: bool, least: float
) -> None:
    some, present = views(), torch.tensor([[True, False, False], [False, True, True]])
    preset = replace(PRESET, boxes=boxes)
    _, seen = teacher.look(some, present, preset)
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 16, 4, generator=drawn)
    affinity = (tokens @ tokens.mT).sigmoid()
    # However little is taken for a class, its map is scaled to 1: it is not lost for good.
    probs = torch.randn(2, 4, 4, 4, generator=drawn).softmax(1) * least
    labels = make_labels(seen, some, affinity, preset, probs)
    for image, values in ((0, [0, 1]), (1, [0, 2, 3])):
        attention = refined_attention(seen[image].attention[-3:], affinity[image], absolute=False)
        cams = seen[image].sources
        within = (
            np.stack([box_mask(one, 0.4, last_row_in_box=False) for one in cams]) if boxes else 1
        )
        sources = cams * within * probs[image, values[1:]].numpy()
        maps = torch.from_numpy(walked(sinkhorn(attention, 3), sources, 2))
        maps = maps - maps.amin((1, 2), keepdim=True)
        maps = resize((maps / (1e-7 + maps.amax((1, 2), keepdim=True)))[None], (64, 64))[0]
        scores = torch.cat([1 - maps.amax(0, keepdim=True), maps])
        expected = torch.tensor(values)[par(some[image], scores).argmax(0)]
        assert float((expected == labels[image]).float().mean()) > 0.999


def test_the_sure_label_themselves_whatever_the_image_is_said_to_hold() -> None:
    labels = torch.ones(1, 2, 2, dtype=torch.long)
    probs = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.1, 0.7], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]])
    logits = probs.log().T.reshape(1, 3, 2, 2)
    assert labels_of_the_sure(labels, logits, 0.75)[0].tolist() == [[0, 1], [2, 1]]


def test_the_decoder_labels_itself_from_the_update_that_the_preset_says(
    teacher: PlusTeacher,
) -> None:
    recipe = recipe_of(teacher, replace(PRESET, sure_from=7))
    present = torch.tensor([[True, False, False]] * 2)
    parts = [recipe.part((views(), present, torch.tensor([t, t]))) for t in (6, 7)]
    logits = torch.zeros(2, 4, 4, 4)
    logits[:, 3] = 9  # a class that neither image has
    outputs = [logits, logits, torch.full((2, 16, 16), 0.5)]
    told, own = (recipe.picture(outputs, part)[:, 64:128] for part in parts)
    answer = recipe.picture(outputs, parts[0])[:, 128:]
    assert not np.array_equal(told, answer)
    assert np.array_equal(own, answer)


def test_the_sure_are_told_at_the_size_of_the_labels() -> None:
    # Half way between two patches nothing is sure, though both are.
    logits = torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]]])
    found = labels_of_the_sure(torch.full((1, 1, 8), 7), logits, 0.999)
    assert found[0, 0, :2].tolist() == [0, 0]
    assert found[0, 0, -2:].tolist() == [1, 1]
    assert 7 in found[0, 0, 3:5].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_at_lower_precision_the_affinity_and_the_loss_are_exact(dtype: torch.dtype) -> None:
    model = SPEC.build()
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(torch.randn(2, 4, 5, 12), torch.randn(2, 6, 7, 8))
        labels = torch.randint(0, 3, (2, 64, 80))
        loss = weclip_plus_loss(*outputs, labels, labels)
    assert outputs[2].dtype == loss.dtype == torch.float32
    loss.backward()
    assert bool(loss.isfinite())


def test_training_learns_saves_and_goes_on_exactly(
    teacher: PlusTeacher, pairs: list[TrainingPair], tmp_path: Path
) -> None:
    recipe = recipe_of(teacher, replace(PRESET, sure_from=3))
    losses: list[float] = []
    options = TrainOptions(save_every=2)
    middle = []

    def note(step: Step) -> None:
        losses.append(step.loss)
        if step.iteration == 3:
            middle.append(load_checkpoint(tmp_path / "iteration-0000002.pt"))

    torch.manual_seed(0)
    Trainer(recipe.spec.build(), recipe, options, ALONE).run(
        recipe.examples(pairs, 0), tmp_path, note
    )
    whole = load_checkpoint(tmp_path / FINAL)
    assert whole.spec == recipe.spec
    again = Trainer(recipe.spec.build(), recipe, options, ALONE)
    again.restore(middle[0])
    again.run(recipe.examples(pairs, 0), tmp_path / "again", lambda step: losses.append(step.loss))
    assert losses[4:] == losses[2:4]
    rest = load_checkpoint(tmp_path / "again" / FINAL).weights
    assert all(torch.equal(rest[name], one) for name, one in whole.weights.items())


def test_it_learns_what_it_is_taught(teacher: PlusTeacher, pairs: list[TrainingPair]) -> None:
    preset = replace(PRESET, iterations=1000, lr=2e-3, scale=(1.0, 1.0), refine_from=1000)
    recipe = recipe_of(teacher, preset)
    torch.manual_seed(0)
    trainer = Trainer(recipe.spec.build(), recipe, TrainOptions(), ALONE)
    examples = recipe.examples(pairs[:2], 0)
    batch = examples.collate([examples[0], examples[1]])
    losses = [trainer.step([batch]).loss for _ in range(40)]
    assert losses[-1] < 0.6 * losses[0]


def test_asking_is_by_both_towers_on_grids_of_their_own(teacher: PlusTeacher) -> None:
    torch.manual_seed(0)
    model = recipe_of(teacher).spec.build()
    towers = Towers(teacher.clip, {DINO: teacher.dino})
    source = TowerTokens(towers, model.spec.inputs, DIGESTS, 64, raw=True, own_grids=True)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tokens = source.tokens(image)
    grid = 64 // teacher.dino.patch
    assert [tuple(tokens[name].shape[:2]) for name in model.spec.inputs] == [(4, 4), (grid, grid)]
    ask = predictor_for(model, TestSettings((1.0, 1.5), flip=True), source)
    probs = ask(image)
    assert probs.shape == (4, 64, 64)
    np.testing.assert_allclose(probs.sum(0), 1, rtol=1e-5)
    alone = predictor_for(model, TestSettings(), source)(image)
    with torch.inference_mode():
        expected = resize(model.score(tokens), (64, 64)).softmax(1)[0]
    np.testing.assert_allclose(alone, expected.numpy(), atol=1e-6)
