"""Which recipe is meant, from what is asked for and the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from clipes.config import get_segmenter_preset
from clipes.errors import UsageError
from clipes.run.folder import Run
from clipes.stages.train_request import Changes, Sources, TrainRequest


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "run")
    made.begin("cam", {"dataset": "coco", "classes": ["cat"]}, "clipes cam")
    return made


@pytest.mark.parametrize(
    ("changes", "weights", "gpu", "name"),
    [
        (Changes(), "auto", True, "clip-es-coco"),
        (Changes(), "auto", False, "frozen"),
        (Changes(iterations=3, lr=0.1, crf=True), "auto", False, "frozen"),
        (Changes(backbone="resnet50"), "auto", False, "small"),
        (Changes(multi_scale=False), "auto", False, "small"),
        (Changes(), "resnet.safetensors", False, "small"),
    ],
)
def test_the_recipe_suits_the_machine_and_what_is_asked_for(
    run: Run, changes: Changes, weights: str, gpu: bool, name: str
) -> None:
    request = TrainRequest(Sources(run, run, backbone_weights=weights), changes=changes)
    assert request.recipe_preset(gpu=gpu).name == name


def test_what_a_named_recipe_knows_nothing_of_is_refused(run: Run) -> None:
    request = TrainRequest(Sources(run, run), "frozen", Changes(crop=321))
    with pytest.raises(UsageError, match="--crop means nothing to preset frozen"):
        request.recipe_preset(gpu=False)


@pytest.mark.parametrize("name", ["small", "clip-es-voc", "frozen", "weakclip-small"])
def test_every_recipe_that_learns_masks_can_draw_classes_evenly_or_not(run: Run, name: str) -> None:
    for even in (True, False):
        request = TrainRequest(Sources(run, run), name, Changes(even_classes=even))
        assert request.recipe_preset(gpu=False).even_classes == even


def test_a_training_that_knew_no_choice_of_draws_is_gone_on_with() -> None:
    preset = get_segmenter_preset("small")
    assert "even_classes" not in preset.to_dict()
    assert replace(preset, even_classes=True).to_dict()["even_classes"]
