"""Presets, shards, errors: the small contracts others script against."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest

from clipes.config import PRESETS, get_preset
from clipes.errors import ArtifactError, DatasetError, UsageError
from clipes.processes import local_rank
from clipes.run.folder import Run
from clipes.run.loop import Shard
from clipes.run.record import CamSettings
from clipes.run.reopen import preset_of
from clipes.types import Sample


def test_the_reference_preset_holds_the_published_numbers() -> None:
    reference = get_preset("reference")
    assert asdict(reference.cam) == {
        "patches": None,  # softmax-GradCAM
        "affinity_blocks": 8,
        "sinkhorn_iterations": 3,
        "walk_power": 2,
        "box_threshold": 0.4,
        "last_row_in_box": False,
        "fp16_positions": True,
        "max_patches": 1600,
    }
    assert asdict(reference.crf) == {
        "iterations": 10,
        "gaussian_sxy": 1.0,
        "gaussian_compat": 3.0,
        "bilateral_sxy": 67.0,
        "bilateral_srgb": 3.0,
        "bilateral_compat": 4.0,
    }
    assert reference.background_exponent == 1.0
    with pytest.raises(FrozenInstanceError):
        reference.name = "other"  # type: ignore[misc]
    with pytest.raises(UsageError, match="reference, default, clip, fast"):
        get_preset("nonsense")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_run_json(name: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    preset = get_preset(name).with_box_threshold(0.7)
    settings = CamSettings("voc", ("cat",), preset=preset)
    run.begin("cam", settings.to_dict(), "clipes cam")
    assert run.cam_record().settings == settings
    assert preset_of(run) == preset


NEWER = get_preset("default").to_dict()
NEWER["cam"]["patches"]["third_round"] = True


@pytest.mark.parametrize(
    "preset", [None, {"walk": 3}, 3, {"name": "x", "cam": {"patches": 1}}, NEWER]
)
def test_a_run_without_a_preset_that_is_known_is_damaged(preset: object, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin("cam", {"dataset": "voc", "classes": ["cat"], "preset": preset}, "clipes cam")
    with pytest.raises(ArtifactError, match="how the maps were made"):
        preset_of(run)


def test_shards_share_out_every_sample_once() -> None:
    samples = [Sample(str(index), Path(f"{index}.jpg"), (0,)) for index in range(11)]
    parts = [Shard.parse(f"{index}/3").of(samples) for index in range(3)]
    assert sorted(len(part) for part in parts) == [3, 4, 4]
    assert {sample.id for part in parts for sample in part} == {str(index) for index in range(11)}


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "a/b", "1/2/3", "0.0/1"])
def test_a_wrong_shard_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="0/4"):
        Shard.parse(text)


def test_torchrun_and_slurm_say_which_part_is_whose() -> None:
    assert Shard.from_environment({}) == Shard(0, 1)
    assert Shard.from_environment({"RANK": "1", "WORLD_SIZE": "4"}) == Shard(1, 4)
    srun = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_STEP_ID": "0"}
    assert Shard.from_environment(srun) == Shard(2, 3)
    assert Shard.from_environment({"RANK": "1"}) == Shard(0, 1)
    with pytest.raises(UsageError):
        Shard.from_environment({"RANK": "4", "WORLD_SIZE": "4"})


def test_a_batch_script_without_srun_is_the_only_process() -> None:
    assert Shard.from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == Shard(0, 1)


def test_the_number_of_a_gpu_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, number in (("", 0), ("0", 0), ("3", 3)):
        monkeypatch.setenv("LOCAL_RANK", text)
        assert local_rank() == number
    for text in ("a", "-1", "1.0"):
        monkeypatch.setenv("LOCAL_RANK", text)
        with pytest.raises(UsageError, match=f"LOCAL_RANK is '{text}', no number of a GPU"):
            local_rank()


def test_errors_are_one_line_and_cross_processes() -> None:
    error = DatasetError("nothing\nfound at /x", "give --root")
    assert str(error) == "nothing found at /x; give --root"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (DatasetError, str(error))
