"""Updates: the recipe, and that restarts, parts and bad losses do what is promised."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from clipes.config import SegmenterPreset, get_segmenter_preset
from clipes.device import choose_device
from clipes.errors import ArtifactError, BackendError, UsageError
from clipes.masks.scores import ConfusionMatrix
from clipes.run.curve import CURVE, read_curve
from clipes.seg import train
from clipes.seg.checkpoint import FINAL, load_checkpoint, saved_iterations
from clipes.seg.deeplab_recipe import DeepLabRecipe
from clipes.seg.frozen_recipe import FrozenRecipe
from clipes.seg.log import Curve, TensorBoard
from clipes.seg.loss import Guidance
from clipes.seg.parallel import Processes
from clipes.seg.recipes import Batch, Recipe, Schedule
from clipes.seg.train import (
    Step,
    Trainer,
    TrainingError,
    TrainOptions,
    choose_precision,
    part_size,
)
from clipes.seg.weakclip_recipe import WeakClipRecipe
from clipes.seg.weclip_plus_recipe import WeClipPlusRecipe
from clipes.seg.weclip_recipe import WeClipRecipe
from clipes.types import IGNORE
from tests.seg_support import SIDE, SPEC, TinySegmenter, Views

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = Processes(0, 1, torch.device("cpu"))
PRESET = SegmenterPreset(
    "test",
    backbone="resnet18",
    crop=SIDE,
    batch=4,
    accumulate=1,
    iterations=6,
    lr=1e-3,
    train_scales=(1.0, 0.5),
)

SURE = Guidance(0.3)
SPEC_LABELS = 1 + len(SPEC.classes)


def build(
    preset: SegmenterPreset = PRESET,
    guidance: Guidance = SURE,
    *,
    dropout: float = 0.0,
    **options: object,
) -> tuple[TinySegmenter, Trainer]:
    torch.manual_seed(0)
    model = TinySegmenter(dropout)
    chosen = replace(TrainOptions(save_every=2), **options)
    return model, Trainer(model, recipe(preset, guidance), chosen, ALONE)


def recipe(preset: SegmenterPreset = PRESET, guidance: Guidance = SURE) -> DeepLabRecipe:
    return DeepLabRecipe(preset, SPEC.classes, guidance)


def parts(views: Views, preset: SegmenterPreset, iteration: int) -> list[Batch]:
    size = preset.batch // preset.accumulate
    made = []
    for part in range(preset.accumulate):
        start = iteration * preset.batch + part * size
        items = [views[position] for position in range(start, start + size)]
        images, labels, confidence = (torch.stack(column) for column in zip(*items, strict=True))
        made.append((images, labels, confidence))
    return made


def weights(model: TinySegmenter) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_three_groups_as_in_deeplab() -> None:
    model, _ = build()
    body, head, biases = recipe().optimizer(model).param_groups
    assert [group["factor"] for group in (body, head, biases)] == [1, 10, 20]
    assert [group["weight_decay"] for group in (body, head, biases)] == [5e-4, 5e-4, 0]
    assert len(head["params"]) == len(biases["params"]) == 4
    assert all(parameter.ndim == 4 for parameter in body["params"])
    assert all(parameter.ndim == 1 for parameter in biases["params"])
    named = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert named == {id(p) for group in (body, head, biases) for p in group["params"]}


def test_the_rate_falls_by_the_power() -> None:
    _, trainer = build()
    rates = [trainer.step(parts(Views(), PRESET, index)).lr for index in range(3)]
    assert rates == pytest.approx([1e-3 * (1 - index / 6) ** 0.9 for index in range(3)])


def test_one_update_is_sgd_on_the_sum_of_the_branches() -> None:
    model, trainer = build(guidance=Guidance(None))
    (item,) = parts(Views(), PRESET, 0)
    other, _ = build(guidance=Guidance(None))
    logits = other(item[0])
    half = other(torch.nn.functional.interpolate(item[0], size=(16, 16), mode="bilinear"))
    wide = torch.nn.functional.interpolate(half, size=(4, 4), mode="bilinear")
    labels = item[1]
    loss = sum(
        torch.nn.functional.cross_entropy(one, labels[:, start::step, start::step])
        for one, start, step in ((logits, 4, 8), (half, 8, 16), (torch.maximum(logits, wide), 4, 8))
    )
    loss.backward()
    step = trainer.step([item])
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    kernel = "backbone.conv2.weight"
    parameter = dict(other.named_parameters())[kernel]
    expected = parameter - 1e-3 * (parameter.grad + 5e-4 * parameter)
    torch.testing.assert_close(model.state_dict()[kernel], expected)
    bias = dict(other.named_parameters())["head.branches.0.bias"]
    torch.testing.assert_close(model.state_dict()["head.branches.0.bias"], bias - 20e-3 * bias.grad)


def test_parts_make_the_same_update_as_the_whole() -> None:
    divided = replace(PRESET, accumulate=2)
    whole_model, whole = build()
    part_model, part = build(divided)
    for index in range(2):
        one = whole.step(parts(Views(), PRESET, index))
        other = part.step(parts(Views(), divided, index))
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    for key, value in whole_model.state_dict().items():
        torch.testing.assert_close(value, part_model.state_dict()[key], rtol=1e-4, atol=1e-6)


def test_cut_and_soft_are_other_losses() -> None:
    losses = {
        name: build(guidance=guidance)[1].step(parts(Views(), PRESET, 0))
        for name, guidance in {
            "cut": Guidance(0.3),
            "plain": Guidance(None),
            "soft": Guidance(None, soft=True),
        }.items()
    }
    assert len({round(step.loss, 6) for step in losses.values()}) == 3
    assert losses["plain"].kept == 1
    assert losses["cut"].kept == pytest.approx(0.7, abs=0.05)


def test_ignored_batches_cost_nothing_and_move_nothing() -> None:
    still = replace(PRESET, weight_decay=0.0)
    model, trainer = build(still)
    before = weights(model)
    step = trainer.step(parts(Views(IGNORE), still, 0))
    assert step.loss == 0.0
    assert step.kept == 0.0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("dropout", "freeze"), [(0.0, True), (0.5, False)])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_run_ends_with_the_same_bits(
    dropout: float, freeze: bool, stop: int, tmp_path: Path
) -> None:
    class StoppedError(Exception):
        pass

    def stopper(step: Step) -> None:
        if step.iteration == stop:
            raise StoppedError

    preset = replace(PRESET, freeze_norms=freeze)
    model, trainer = build(preset, dropout=dropout)
    trainer.run(Views(), tmp_path / "whole", lambda _: None)
    _, broken = build(preset, dropout=dropout)
    with pytest.raises(StoppedError):
        broken.run(Views(), tmp_path / "broken", stopper)
    torch.manual_seed(99)
    broken_model, broken = build(preset, dropout=dropout)
    saved = saved_iterations(tmp_path / "broken")
    if saved:
        broken.restore(load_checkpoint(saved[-1]))
    broken.run(Views(), tmp_path / "broken", lambda _: None)
    for key, value in model.state_dict().items():
        assert torch.equal(value, broken_model.state_dict()[key]), key
    final = load_checkpoint(tmp_path / "broken" / FINAL)
    assert final.iteration == 6
    assert saved_iterations(tmp_path / "broken") == []


class Telling(TinySegmenter):
    """A model that works something out when it is saved, as one with a text tower does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("told", torch.zeros(()))
        self.register_state_dict_pre_hook(lambda *_: self.told.copy_(self.tell()))

    def tell(self) -> torch.Tensor:
        return sum(one.detach().square().sum() for one in self.parameters())


class Averaged(DeepLabRecipe):
    @property
    def schedule(self) -> Schedule:
        return replace(super().schedule, average=0.9)


def test_what_a_model_says_when_it_is_saved_is_said_of_the_mean(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Telling()
    preset = replace(PRESET, lr=0.05)
    trainer = Trainer(model, Averaged(preset, SPEC.classes, SURE), TrainOptions(), ALONE)
    before = model.tell()
    trainer.run(Views(), tmp_path, lambda _: None)
    saved = load_checkpoint(tmp_path / FINAL).weights
    expected = sum(saved[name].square().sum() for name, _ in model.named_parameters())
    torch.testing.assert_close(saved["told"], expected)
    assert abs(before - expected) > 1e-3


def test_the_latest_checkpoints_are_kept(tmp_path: Path) -> None:
    _, trainer = build(save_every=1)
    seen = []
    trainer.run(Views(), tmp_path, lambda _: seen.append(len(saved_iterations(tmp_path))))
    assert seen == [0, 1, 2, 2, 2, 2]


def test_ten_checkpoints_of_a_short_training_unless_others_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trainer = build(replace(PRESET, iterations=23), save_every=None)
    seen: list[list[int]] = []

    def note(step: Step) -> None:
        seen.append([load_checkpoint(path).iteration for path in saved_iterations(tmp_path)])

    trainer.run(Views(), tmp_path, note)
    assert seen[3] == [2]
    assert seen[-1] == [20, 22]
    monkeypatch.setattr(train, "LONGEST_UNSAVED", 1)  # long ones are saved more often than that
    _, trainer = build(replace(PRESET, iterations=23), save_every=None)
    trainer.run(Views(), tmp_path, note)
    assert seen[26] == [2, 3]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Poisoned(Views):
        def __getitem__(self, position: int) -> Batch:
            image, labels, confidence = super().__getitem__(position)
            return (image * torch.nan if position == 13 else image), labels, confidence

    model, trainer = build()
    with pytest.raises(TrainingError, match="loss is nan at iteration 4"):
        trainer.run(Poisoned(), tmp_path, lambda _: None)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    (kept,) = saved_iterations(tmp_path)
    assert load_checkpoint(kept).iteration == 2


def test_a_gpu_that_is_too_small_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, trainer = build()

    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(trainer._optimizer, "step", full)
        with pytest.raises(BackendError, match="too little memory"):
            trainer.step(parts(Views(), PRESET, 0))
    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(BackendError, match="too little memory for 4 images at a time; raise --acc"):
        trainer.step(parts(Views(), PRESET, 0))


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    _, trainer = build(replace(PRESET, lr=1e30), save_every=1)
    with pytest.raises(TrainingError, match=r"finite|loss is"):
        trainer.run(Views(), tmp_path, lambda _: None)
    assert not (tmp_path / FINAL).exists()
    for path in saved_iterations(tmp_path):
        saved = load_checkpoint(path).weights
        assert all(bool(torch.isfinite(value).all()) for value in saved.values())


def test_a_checkpoint_without_a_training_cannot_be_resumed(tmp_path: Path) -> None:
    _, trainer = build()
    trainer.run(Views(), tmp_path, lambda _: None)
    _, again = build()
    with pytest.raises(ArtifactError, match="does not hold the state"):
        again.restore(load_checkpoint(tmp_path / FINAL))


def test_batches_that_cannot_be_divided_are_refused() -> None:
    assert part_size(recipe(replace(PRESET, batch=10, accumulate=2)), 1) == 5
    with pytest.raises(UsageError, match="batch of 10"):
        part_size(recipe(replace(PRESET, batch=10, accumulate=2)), 2)
    with pytest.raises(UsageError, match="one image at a time"):
        part_size(recipe(replace(PRESET, arch="deeplabv3", batch=2, accumulate=2)), 1)


def test_precision_and_device_are_checked() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == "none"
    with pytest.raises(UsageError, match="fp16"):
        choose_precision("fp16", cpu)
    assert choose_device("cpu") == cpu
    with pytest.raises(UsageError, match="nonsense"):
        choose_device("nonsense")


def test_bf16_is_close_to_fp32() -> None:
    exact = build()[1].step(parts(Views(), PRESET, 0)).loss
    rough = build(amp="bf16")[1].step(parts(Views(), PRESET, 0)).loss
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.05)


def test_panels_show_view_labels_and_answer() -> None:
    _, trainer = build(guidance=Guidance(None))
    step = trainer.step(parts(Views(2), PRESET, 0))
    picture = step.picture()
    assert picture.shape == (64, 96, 3)
    assert picture[:32, 32:64].reshape(-1, 3).tolist() == [[0, 128, 0]] * 1024


def test_tensorboard_gets_curves_and_panels(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed; pip install 'clipes[train]'",
    )
    board = TensorBoard(tmp_path, 0, print)
    _, trainer = build()
    losses = []

    def on_step(step: Step) -> None:
        board.write(step)
        losses.append(step.loss)

    trainer.run(Views(), tmp_path / "checkpoints", on_step)
    board.close()
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "kept"}
    assert events.Scalars("loss")[0].value == pytest.approx(losses[0])
    assert [event.step for event in events.Images("views")] == [6]


def test_tensorboard_drops_what_a_training_that_was_broken_off_wrote(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed; pip install 'clipes[train]'",
    )
    for after in (0, 10):
        board = TensorBoard(tmp_path, after, print)
        for iteration in range(after + 1, 21):
            board.write(Step(iteration, 30, 1.0 + after, 0.1, 1.0, Views, list))
        board.close()
    events = reader.EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (10, 1.0), (20, 11.0)]


def test_without_tensorboard_training_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    told: list[str] = []
    board = TensorBoard(tmp_path, 0, told.append)
    _, trainer = build()
    trainer.run(Views(), tmp_path, board.write)
    board.close()
    assert len(told) == 1
    assert "pip install 'clipes[train]'" in told[0]


def test_the_curve_is_kept_and_gone_on_with(tmp_path: Path) -> None:
    labels = SPEC_LABELS
    steps: list[Step] = []
    _, trainer = build()
    curve = Curve(tmp_path, labels, 0, print)

    def on_step(step: Step) -> None:
        steps.append(step)
        curve.write(step)

    trainer.run(Views(), tmp_path / "checkpoints", on_step)
    points = read_curve(tmp_path)
    assert [point.iteration for point in points] == [1, 2, 3, 4, 5, 6]
    for step, point in zip(steps, points, strict=True):
        assert (point.loss, point.rate) == pytest.approx((step.loss, step.lr), rel=1e-4)
    matrix = ConfusionMatrix(labels)
    for step in steps:
        for wanted, answer in step.answers():
            assert wanted.shape == answer.shape == (SIDE, SIDE)
            matrix.update(wanted.numpy().astype("uint8"), answer.numpy().astype("uint8"))
    assert points[-1].miou == pytest.approx(matrix.scores().miou, rel=1e-4)
    # Broken off after update 4: what came later is forgotten.
    again = Curve(tmp_path, labels, 4, print)
    again.write(steps[4])
    assert [point.iteration for point in read_curve(tmp_path)] == [1, 2, 3, 4, 5]
    assert read_curve(tmp_path)[:4] == points[:4]


def test_long_trainings_have_a_hundred_points(tmp_path: Path) -> None:
    _, trainer = build()
    step = trainer.step(parts(Views(), PRESET, 0))
    curve = Curve(tmp_path, SPEC_LABELS, 0, print)
    for iteration in range(1, 1051):
        curve.write(replace(step, iteration=iteration, total=1050, loss=float(iteration)))
    points = read_curve(tmp_path)
    assert len(points) == 105
    assert [points[0].iteration, points[-1].iteration] == [10, 1050]
    assert points[0].loss == 5.5


HEADER = "iteration,loss,rate,kept,miou\n"


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "iteration,loss\n1,2\n",
        "\x00",
        HEADER + "1,nan,1,1,1\n",
        HEADER + "1,1,1\n",
        HEADER + "one,1,1,1,1\n",
        HEADER + "0,1,1,1,1\n",
        HEADER + "2,1,1,1,1\n1,1,1,1,1\n",
    ],
)
def test_a_damaged_curve_is_named_and_starts_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / CURVE).write_text(text)
    with pytest.raises(ArtifactError, match=r"training\.csv is damaged"):
        read_curve(tmp_path)
    told: list[str] = []
    _, trainer = build()
    curve = Curve(tmp_path, SPEC_LABELS, 4, told.append)
    curve.write(trainer.step(parts(Views(), PRESET, 0)))
    assert "starts anew" in told[0]
    assert len(read_curve(tmp_path)) == 1


def test_a_curve_of_endless_rows_is_read_to_a_bound(tmp_path: Path) -> None:
    rows = "".join(f"{n},1,1,1,1\n" for n in range(1, 10_500))
    (tmp_path / CURVE).write_text(HEADER + rows)
    assert len(read_curve(tmp_path)) == 10_000


def test_views_without_a_label_end_no_training(tmp_path: Path) -> None:
    _, trainer = build(guidance=Guidance(2.0))  # surer than anything
    curve = Curve(tmp_path, SPEC_LABELS, 0, print)
    curve.write(trainer.step(parts(Views(), PRESET, 0)))
    assert read_curve(tmp_path) == []


@pytest.mark.parametrize(
    "recipe", [DeepLabRecipe, FrozenRecipe, WeakClipRecipe, WeClipRecipe, WeClipPlusRecipe]
)
def test_recipes_name_the_specs_that_they_make(recipe: type[Recipe]) -> None:
    assert get_type_hints(recipe.spec.fget)["return"] is recipe.made


def test_the_papers_recipe() -> None:
    voc, coco = get_segmenter_preset("clip-es-voc"), get_segmenter_preset("clip-es-coco")
    recipe = (voc.arch, voc.backbone, voc.output_stride, voc.crop, voc.batch, voc.accumulate)
    assert recipe == ("deeplabv2", "resnet101", 8, 321, 10, 2)
    rates = (voc.lr, voc.head_lr, voc.momentum, voc.weight_decay, voc.power, voc.iterations)
    assert rates == (2e-4, 10, 0.9, 5e-4, 0.9, 20_000)
    assert voc.train_scales == (1.0, 0.75, 0.5)
    assert voc.scale == (0.5, 1.5)
    assert voc.colour == 0
    assert voc.flip
    assert voc.crf
    assert coco == replace(voc, name="clip-es-coco", iterations=100_000)
    with pytest.raises(UsageError, match="clip-es-voc"):
        get_segmenter_preset("paper")


def test_the_trainer_knows_no_architecture() -> None:
    """What is DeepLab's, or another kind's, is in its recipe."""
    source = Path(train.__file__).read_text("utf-8").lower()
    words = ("deeplab", "branch", "poly", "stride", "aspp", "crop", "backbone", "freeze")
    assert [word for word in words if word in source] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_gpu_does_what_the_cpu_does(amp: str) -> None:
    expected = build()[1].step(parts(Views(), PRESET, 0)).loss
    torch.manual_seed(0)
    model = TinySegmenter().cuda()
    processes = Processes(0, 1, torch.device("cuda", 0))
    trainer = Trainer(model, recipe(), TrainOptions(amp=amp), processes)
    steps = [trainer.step(parts(Views(), PRESET, index)) for index in range(3)]
    assert steps[0].loss == pytest.approx(expected, rel=1e-3 if amp == "none" else 0.05)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
