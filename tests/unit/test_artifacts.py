"""The run folder: round trips, refusals, and what counts as another run."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipes.disk.files import read_arrays
from clipes.errors import ArtifactError, DatasetError, RunConflictError
from clipes.masks.pseudo import in_mask_order
from clipes.run.folder import Run, latest_run
from clipes.types import CamMaps, PseudoLabel


def make_maps() -> CamMaps:
    maps = np.random.default_rng(0).random((2, 4, 5), dtype=np.float32)
    return CamMaps(np.array([3, 0]), maps, (60, 75))


def test_maps_survive_as_float16(tmp_path: Path) -> None:
    run, maps = Run(tmp_path), make_maps()
    run.save_cams("a", maps)
    loaded = run.load_cams("a")
    assert loaded.labels.tolist() == [3, 0]
    assert loaded.maps.dtype == np.float16
    assert loaded.size == (60, 75)
    np.testing.assert_allclose(loaded.maps, maps.maps, atol=5e-4)
    assert run.ids("cams") == ["a"]


def test_drift_survives_with_its_classes_and_nonsense_is_refused(tmp_path: Path) -> None:
    run, maps = Run(tmp_path), make_maps()
    run.save_cams("a", maps)
    assert run.load_cams("a").drift is None
    run.save_cams("a", replace(maps, drift=np.array([0.25, 1.0], np.float32)))
    loaded = run.load_cams("a")
    assert loaded.drift is not None
    assert loaded.drift.tolist() == [0.25, 1.0]
    ordered = in_mask_order(loaded)
    assert (ordered.labels.tolist(), ordered.drift.tolist()) == ([0, 3], [1.0, 0.25])
    for wrong in ([0.5], [0.5, 2.0], [0.5, np.nan], [[0.5, 0.5]]):
        run.save_cams("a", replace(maps, drift=np.array(wrong)))
        with pytest.raises(ArtifactError, match="delete it and run 'clipes cam' again"):
            run.load_cams("a")


def test_the_same_maps_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Run(tmp_path / name).save_cams("a", make_maps())
    one, two = (tmp_path / name / "cams" / "a.npz" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_masks_and_confidence_survive(tmp_path: Path) -> None:
    confidence = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    run = Run(tmp_path)
    run.save_pseudo("a", PseudoLabel(mask, confidence))
    assert run.has_pseudo("a")
    loaded = run.load_pseudo("a")
    np.testing.assert_array_equal(loaded.mask, mask)
    np.testing.assert_allclose(loaded.confidence, confidence, atol=0.5 / 65535 + 1e-7)


def test_an_image_is_done_only_with_both_files(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save_pseudo("a", PseudoLabel(np.zeros((2, 2), np.uint8), np.ones((2, 2), np.float32)))
    run.confidence_path("a").unlink()
    assert not run.has_pseudo("a")


@pytest.mark.parametrize("bad_id", ["../x", "a/b", "..", "", "a\\b"])
def test_ids_cannot_leave_the_folder(tmp_path: Path, bad_id: str) -> None:
    with pytest.raises(DatasetError):
        Run(tmp_path).cams_path(bad_id)


def test_malformed_maps_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    path = run.cams_path("a")
    path.parent.mkdir()
    maps = np.zeros((1, 2, 2), np.float16)
    good = {"labels": np.array([1]), "maps": maps, "size": np.array([8, 8])}
    changes: list[dict[str, np.ndarray]] = [
        {"labels": np.array([1, 2])},
        {"labels": np.array([1.0])},
        {"maps": np.zeros((2, 2), np.float16)},
        {"size": np.array([8, 0])},
        {"size": np.array([8])},
        {"labels": np.array([{"a": 1}], dtype=object)},
    ]
    for change in changes:
        np.savez(path, **(good | change))
        with pytest.raises(ArtifactError):
            run.load_cams("a")
    plain = path.with_suffix(".npy")
    np.save(plain, good["maps"])
    whole = path.read_bytes()
    for junk in (b"", b"junk", pickle.dumps({"labels": 1}), plain.read_bytes(), whole[:50]):
        path.write_bytes(junk)
        with pytest.raises(ArtifactError, match=r"a\.npz"):
            run.load_cams("a")


def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, maps=np.zeros(10_000_000, np.uint8))
    assert path.stat().st_size < 20_000
    assert read_arrays(path, 20_000_000)["maps"].size == 10_000_000
    with pytest.raises(ValueError, match="more than 1000000"):
        read_arrays(path, 1_000_000)


def test_other_settings_are_a_conflict_that_names_them(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    settings = {"preset": {"name": "default", "cam": {"walk_power": 2}}, "classes": ("a", "b")}
    run.begin("cam", settings, "clipes cam")
    run.begin("cam", settings, "clipes cam --shard 1/2", facts={"root": "elsewhere"})
    run.begin("refine", {"iterations": 10}, "clipes refine")
    assert run.stage("cam")["command"] == "clipes cam --shard 1/2"
    changed = {"preset": {"name": "default", "cam": {"walk_power": 3}}, "classes": ("a", "b")}
    with pytest.raises(RunConflictError, match=r"preset\.cam\.walk_power = 2, not 3"):
        run.begin("cam", changed, "clipes cam")
    assert run.stage("cam")["settings"]["preset"]["cam"] == {"walk_power": 2}


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99}', "{", '{"schema": 1}'])
def test_a_damaged_manifest_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ArtifactError):
        Run(tmp_path).stage("cam")
    with pytest.raises(ArtifactError):
        Run(tmp_path).begin("cam", {}, "clipes cam")


def test_the_latest_run_is_the_one_touched_last(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="clipes cam"):
        latest_run(tmp_path)
    for age, name in enumerate(("new", "old")):
        run = Run(tmp_path / name)
        run.begin("cam", {}, "clipes cam")
        os.utime(run.manifest_path, (1000 - age, 1000 - age))
    assert latest_run(tmp_path).root.name == "new"
    assert json.loads((tmp_path / "old" / "run.json").read_text())["schema"] == 1
