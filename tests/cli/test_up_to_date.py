"""Labels, pictures and settings that change after a stage: made again, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipes.config import PRESETS
from clipes.disk.images import read_mask, write_mask
from clipes.run.folder import Run
from clipes.stages.cam import CamRequest, ClipRequest, DataRequest, asked_of_clip
from clipes.words.vocabulary import load_vocabulary
from tests.cli.conftest import Cli
from tests.cli.forked import Starter
from tests.cli.small_data import CLASSES, cam, train, write_photos

FAST = ("--preset", "fast")


@pytest.fixture
def finished(start: Starter, tmp_path: Path) -> Run:
    """A run of four images with masks, each image on its own."""
    write_photos(tmp_path / "photos", 4)
    done = start(*cam("run"), *FAST)
    assert done.returncode == 0, done.stderr
    assert start("refine", "run", "--workers", "1").returncode == 0
    return Run(tmp_path / "run")


def as_csv(root: Path, labels: dict[str, str]) -> list[str]:
    rows = "".join(f"{name},{label}\n" for name, label in labels.items())
    (root / "labels.csv").write_text(f"image,labels\n{rows}")
    return []


def as_json(root: Path, labels: dict[str, str]) -> list[str]:
    (root / "labels.csv").unlink(missing_ok=True)
    (root / "labels.json").write_text(json.dumps({k: [v] for k, v in labels.items()}))
    return []


def as_text(root: Path, labels: dict[str, str]) -> list[str]:
    (root / "labels.csv").unlink(missing_ok=True)
    (root / "labels.txt").write_text("".join(f"{k} {v}\n" for k, v in labels.items()))
    return []


def as_option(root: Path, labels: dict[str, str]) -> list[str]:
    as_csv(root, labels)
    (root / "labels.csv").rename(root / "mine.csv")
    return ["--labels", str(root / "mine.csv")]


@pytest.mark.parametrize("write", [as_csv, as_json, as_text, as_option])
def test_a_corrected_label_is_followed_down_to_the_export(
    start: Starter, tmp_path: Path, write: Callable[[Path, dict[str, str]], list[str]]
) -> None:
    photos, run = tmp_path / "photos", Run(tmp_path / "run")
    write_photos(photos, 4)
    labels = {f"p{k:03}.jpg": CLASSES[k % 2] for k in range(4)}
    options = write(photos, labels)
    assert start(*cam("run"), *FAST, *options).returncode == 0
    assert start("refine", "run", "--workers", "1").returncode == 0
    assert start("export", "run", "--format", "coco").returncode == 0

    write(photos, {**labels, "p000.jpg": "sofa"})
    early = start("refine", "run", "--workers", "1")
    assert early.returncode == 1
    said = "p000: its maps were made for cat, its labels are sofa"
    assert f"skipping {said}; run 'clipes cam' again" in early.stderr
    assert "0 made, 3 there before, 1 failed" in early.stderr
    for command in (("report", "run"), ("export", "run", "--format", "coco")):
        stale = start(*command)
        assert stale.returncode == 1
        assert said in stale.stderr
    scored = start("eval", "run")
    assert f"out of date: 1 of 4 images, the first is {said}" in scored.stderr

    again = start(*cam("run"), *FAST, *options)
    assert again.returncode == 0, again.stderr
    assert f"made again: {said}" in again.stderr
    assert "maps: 1 made, 3 there before, 0 failed" in again.stderr
    assert run.load_cams("p000").labels.tolist() == [2]
    between = start("eval", "run")
    assert "its mask was made from other maps than there are now" in between.stderr
    refined = start("refine", "run", "--workers", "1")
    assert "masks: 1 made, 3 there before, 0 failed" in refined.stderr
    assert set(np.unique(read_mask(run.pseudo_path("p000")))) <= {0, 3}
    exported = start("export", "run", "--format", "coco")
    assert exported.returncode == 0, exported.stderr
    content = json.loads((run.root / "export/coco/instances.json").read_text())
    first = {a["category_id"] for a in content["annotations"] if a["image_id"] == 1}
    assert first <= {3}
    assert "out of date" not in start("eval", "run").stderr
    assert start("report", "run").returncode == 0


def test_another_picture_of_the_same_size_is_made_again(finished: Run, start: Starter) -> None:
    photos = finished.root.parent / "photos" / "images"
    before = finished.load_cams("p001").maps
    Image.open(photos / "p000.jpg").transpose(Image.Transpose.ROTATE_180).save(photos / "p001.jpg")
    refined = start("refine", "run", "--workers", "1")
    assert "skipping p001: its maps were made from another picture of that name" in refined.stderr
    again = start(*cam("run"), *FAST)
    assert "maps: 1 made, 3 there before" in again.stderr
    assert np.abs(finished.load_cams("p001").maps - before).max() > 0.01
    assert "masks: 1 made, 3 there" in start("refine", "run", "--workers", "1").stderr


def test_what_classes_look_like_follows_the_labels_unless_it_is_to_be_kept(
    start: Starter, tmp_path: Path
) -> None:
    """After a correction, a run is what it would have been with the right labels at once."""
    write_photos(tmp_path / "photos", 5)
    table = tmp_path / "photos" / "labels.csv"
    right = table.read_text()
    table.write_text(right.replace("p000.jpg,cat", "p000.jpg,sofa"))
    assert start(*cam("run")).returncode == 0
    table.write_text(right)
    kept = start(*cam("run"), "--keep-looks")
    assert "maps: 1 made, 4 there before" in kept.stderr
    learnt = start(*cam("run"))
    assert "maps: 5 made, 0 there before" in learnt.stderr
    assert "1 of the 5 images that say what the classes look like have other" in learnt.stderr
    assert start(*cam("at-once")).returncode == 0
    for name in ("looks/statistics.npz", *(f"cams/p{k:03}.npz" for k in range(5))):
        once, twice = tmp_path / "at-once" / name, tmp_path / "run" / name
        assert once.read_bytes() == twice.read_bytes(), name


def test_what_classes_look_like_is_learnt_from_corrected_masks(
    start: Starter, tmp_path: Path
) -> None:
    ids = write_photos(tmp_path / "photos", 4)
    run = Run(tmp_path / "run")
    assert start(*cam("run")).returncode == 0
    own = run.looks_path.read_bytes()
    (tmp_path / "mended").mkdir()
    for id_ in ids[:2]:
        shutil.copy(tmp_path / "photos" / "masks" / f"{id_}.png", tmp_path / "mended")
    imported = start("import", "run", "mended", "--format", "voc")
    assert "import: 2 corrected masks (2 changed, 0 as they were), 0 there" in imported.stderr

    kept = start(*cam("run"), "--keep-looks")
    assert "maps: 0 made, 4 there before" in kept.stderr
    learnt = start(*cam("run"))
    assert "2 of the 4 images that say what the classes look like have other" in learnt.stderr
    assert "2 corrected masks say what the classes look like" in learnt.stderr
    assert "maps: 4 made, 0 there before" in learnt.stderr
    assert run.cam_record().facts.corrected == 2
    assert run.looks_path.read_bytes() != own
    os.utime(run.manifest_path, (1000, 1000))
    assert "maps: 0 made, 4 there before" in start(*cam("run")).stderr
    assert run.manifest_path.stat().st_mtime > 1000  # later commands without a run mean this one

    without = start(*cam("run"), "--no-use-corrected")
    assert "maps: 4 made, 0 there before" in without.stderr
    assert "corrected masks say" not in without.stderr
    assert run.cam_record().facts.corrected == 0
    assert run.looks_path.read_bytes() == own
    assert "maps: 0 made, 4 there before" in start(*cam("run"), "--no-use-corrected").stderr


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Every file with its inode: one that is written again has another."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_ino) for path in files}


def test_a_run_with_nothing_to_do_needs_no_torch_and_writes_nothing(
    start: Starter, tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos", 3)
    assert start(*cam("run")).returncode == 0
    assert start("refine", "run", "--workers", "1").returncode == 0
    before = contents(tmp_path / "run")
    for command in (cam("run"), ["refine", "run"]):
        code = (
            "import sys\nfrom clipes.cli import main\n"
            "try:\n    main()\n"
            "finally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "0 made, 3 there before, 0 failed\nFalse\n" in done.stderr
    assert contents(tmp_path / "run") == before


def test_other_weights_or_words_are_refused_by_name(finished: Run, start: Starter) -> None:
    root = finished.root.parent
    arrays = dict(np.load(root / "text.npz"))
    np.savez(root / "text.npz", **{**arrays, "features": arrays["features"][:, ::-1]})
    done = start(*cam("run"), *FAST)
    assert done.returncode == 1
    assert "was made by 'cam' with text.sha256 =" in done.stderr


def test_the_same_words_mean_other_files_in_another_folder(
    finished: Run, ask: Callable[..., Any], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(tmp_path / "clip.safetensors", elsewhere)
    arrays = dict(np.load(tmp_path / "text.npz"))
    np.savez(elsewhere / "text.npz", **{**arrays, "features": arrays["features"][:, ::-1]})
    environment = {**os.environ, "CLIPES_CACHE": str(tmp_path / "cache")}
    there = Starter(ask, elsewhere, environment)
    done = there(*cam(finished.root, tmp_path / "photos"), *FAST)
    assert done.returncode == 1
    assert "was made by 'cam' with text.sha256 =" in done.stderr


def test_files_that_are_asked_for_are_recorded_with_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(clip: ClipRequest) -> list[object]:
        request = CamRequest(DataRequest("folder"), clip, PRESETS["fast"])
        known = asked_of_clip(request, load_vocabulary("voc"), [])
        assert known is not None
        return [known[key] for key in ("weights", "text_features", "template", "dino")]

    files = ("w.pt", "v.npz", "t.txt", "d.pt")
    for file in files:
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    given = ClipRequest("w.pt", text_features=Path("v.npz"), template="t.txt", dino="d.pt")
    assert asked(given) == [str(tmp_path / file) for file in files]
    assert asked(ClipRequest(template="a {}.")) == ["auto", None, "a {}.", "auto"]


@pytest.mark.parametrize("given", ["some.txt", "lists/some.txt"])
def test_a_list_of_images_is_the_same_from_another_folder(
    start: Starter, ask: Callable[..., Any], tmp_path: Path, given: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    for folder, ids in ((tmp_path, "p000\np002\n"), (elsewhere, "p001\n")):
        (folder / given).parent.mkdir(parents=True, exist_ok=True)
        (folder / given).write_text(ids)
    write_photos(tmp_path / "photos", 4)
    again = [*cam("run"), *FAST, "--split", given]
    done = start(*again)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "run")
    there = Starter(ask, elsewhere, {**os.environ, "CLIPES_CACHE": str(tmp_path / "cache")})
    done = there("refine", str(run.root), "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert run.ids("pseudo") == ["p000", "p002"]

    written = json.loads(run.manifest_path.read_text())
    assert written["stages"]["cam"]["settings"]["split"] == str(tmp_path / given)
    written["stages"]["cam"]["settings"]["split"] = given  # as an older clipes wrote it
    run.manifest_path.write_text(json.dumps(written))
    assert start(*again).returncode == 0


def test_words_without_any_for_the_background_are_refused_and_not_recorded(
    start: Starter, tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos", 1)
    arrays = dict(np.load(tmp_path / "text.npz"))
    classes = {key: arrays[key][: len(CLASSES)] for key in ("names", "features", "background")}
    np.savez(tmp_path / "alone.npz", **{**arrays, **classes})
    refused = start(*cam("run"), *FAST, "--text-features", "alone.npz")
    assert refused.returncode == 1
    assert "there are no words for the background; give 'clipes cam' such" in refused.stderr
    made = start(*cam("run"), *FAST)
    assert made.returncode == 0, made.stderr


def test_maps_that_show_nothing_are_said(start: Starter, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 1, (16, 16))  # one patch
    made = start(*cam("run"), *FAST)
    assert made.returncode == 0, made.stderr
    assert "1 of 1 images have maps that show nothing" in made.stderr


def test_what_is_refused_is_named_in_words(finished: Run, start: Starter) -> None:
    root = finished.root.parent
    (root / "clip.safetensors").rename(root / "same.safetensors")
    same = [part.replace("clip.saf", "same.saf") for part in cam("run")]
    assert "0 made, 4 there before" in start(*same, *FAST).stderr
    assert 'preset.name = "fast", not "default"' in start(*same).stderr
    other = start(*same, *FAST, "--model", "ViT-L-14")
    assert other.returncode == 1
    assert "same.safetensors is no ViT-L-14: its image tower has width 64" in other.stderr
    arrays = dict(np.load(root / "text.npz"))
    np.savez(root / "text.npz", **{**arrays, "features": arrays["features"][:, ::-1]})
    assert "other words or vectors (--prompts, --template" in start(*same, *FAST).stderr


def test_classes_that_changed_with_the_labels_are_explained(start: Starter, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 3)
    (tmp_path / "photos" / "classes.txt").unlink()
    assert start(*cam("run"), *FAST).returncode == 0
    table = tmp_path / "photos" / "labels.csv"
    table.write_text(table.read_text().replace("p000.jpg,cat", "p000.jpg,sofa"))
    changed = start(*cam("run"), *FAST)
    assert changed.returncode == 1
    assert "write all of them into classes.txt" in changed.stderr
    (tmp_path / "photos" / "classes.txt").write_text("cat\ndog\nsofa\n")
    assert "maps: 1 made, 2 there before" in start(*cam("run"), *FAST).stderr


def test_other_settings_of_tags_are_refused_on_a_finished_run(
    start: Starter, tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos", 2)
    command = [*cam("run"), *FAST, "--labels", "auto", "--tag-threshold"]
    assert start(*command, "0.0").returncode == 0
    assert "0 made, 2 there before" in start(*command, "0.0").stderr
    other = start(*command, "0.5")
    assert other.returncode == 1
    assert "tags.threshold = 0.0, not 0.5" in other.stderr


def test_a_data_set_that_moved_is_told_once(finished: Run, start: Starter) -> None:
    root = finished.root.parent
    (root / "photos").rename(root / "moved")
    lost = start("refine", "run")
    assert lost.returncode == 1
    assert lost.stderr.splitlines()[-1] == (
        f"clipes: the data set of run is no longer at {root / 'photos'}; say once where it is now "
        "with --root"
    )
    assert "0 made, 4 there before" in start("refine", "run", "--root", "moved").stderr
    assert start("eval", "run").returncode == 0
    assert "0 made, 4 there before" in start(*cam("run", "moved"), *FAST).stderr


def test_a_label_file_in_a_data_set_moves_with_it(start: Starter, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, 2)
    (photos / "labels.csv").rename(photos / "mine.csv")
    assert start(*cam("run"), *FAST, "--labels", "photos/mine.csv").returncode == 0
    photos.rename(tmp_path / "moved")
    assert start("refine", "run", "--root", "moved", "--workers", "1").returncode == 0
    again = start(*cam("run", "moved"), *FAST, "--labels", "moved/mine.csv")
    assert "0 made, 2 there before" in again.stderr


def test_maps_of_images_that_are_gone_are_named(finished: Run, start: Starter) -> None:
    photos = finished.root.parent / "photos"
    (photos / "images" / "p003.jpg").unlink()
    rows = (photos / "labels.csv").read_text().splitlines()
    (photos / "labels.csv").write_text("\n".join(rows[:-1]))
    done = start(*cam("run"), *FAST)
    assert "0 made, 3 there before" in done.stderr
    assert "1 files in run/cams belong to no image of the data set any more" in done.stderr


def test_images_that_the_data_set_no_longer_offers_are_named(finished: Run, start: Starter) -> None:
    table = finished.root.parent / "photos" / "labels.csv"
    table.write_text(table.read_text().replace("p000.jpg,cat", "p000.jpg,bird"))
    why = f"p000: {table}: unknown class 'bird'"
    for command in (("export", "run", "--format", "voc"), ("report", "run")):
        done = start(*command)
        assert done.returncode == 1
        assert f"skipping {why}" in done.stderr
    for command in (("eval", "run"), train("run", "run")):
        done = start(*command)
        assert done.returncode == 0, done.stderr
        said = f"left out: 1 of the data set's images cannot be used, the first is {why}"
        assert said in done.stderr
    (finished.root.parent / "photos" / "images" / "p000.jpg").unlink()
    table.write_text(table.read_text().replace("p000.jpg,bird\n", ""))
    for folder, command in (
        ("pseudo", ("export", "run", "--format", "voc")),
        ("cams", ("report", "run")),
        ("cams", ("eval", "run")),
        ("pseudo", (*train("run", "run"), "--no-resume")),
    ):
        done = start(*command)
        assert done.returncode == 0, done.stderr
        assert f"1 files in run/{folder} belong to no image of the data set any" in done.stderr


def test_a_mask_that_a_person_edited_is_not_written_over(finished: Run, start: Starter) -> None:
    path = finished.pseudo_path("p000")
    write_mask(path, np.full_like(read_mask(path), 1))
    assert "0 made, 4 there before" in start("refine", "run").stderr
    table = finished.root.parent / "photos" / "labels.csv"
    table.write_text(table.read_text().replace("p000.jpg,cat", "p000.jpg,cat;dog"))
    assert start(*cam("run"), *FAST).returncode == 0
    done = start("refine", "run", "--workers", "1")
    assert done.returncode == 1
    assert "and was edited since: " in done.stderr
    advice = "run/pseudo/p000.png; it may be a person's work: delete it and run 'clipes refine' to"
    assert advice in done.stderr
    for command in (("export", "run", "--format", "coco"), ("report", "run")):
        assert advice in start(*command).stderr
    assert (read_mask(path) == 1).all()
    path.unlink()
    assert start("refine", "run", "--workers", "1").returncode == 0


def test_a_training_on_masks_that_changed_is_refused(
    cli: Cli, finished: Run, tmp_path: Path
) -> None:
    command = ["train-seg", "--no-cgl", "--run", "run", "--backbone", "mobilenet_v3_large"]
    command += ["--backbone-weights", "none", "--crop", "32", "--batch", "2", "--iterations", "1"]
    command += ["--no-flip", "--test-scales", "1"]
    assert cli(*command).returncode == 0
    predicted = finished.root / "predictions" / "p000.png"
    before = predicted.stat().st_mtime_ns
    record = (finished.root / "run.json").read_bytes()
    again = cli(*command)
    assert "trained before" in again.stderr
    assert "0 made, 4 there before" in again.stderr
    assert (finished.root / "run.json").read_bytes() == record
    photos = tmp_path / "photos" / "images"
    shutil.copy(photos / "p001.jpg", photos / "p000.jpg")
    changed = cli(*command)
    assert changed.returncode == 1
    assert "run/checkpoints learnt from have changed since" in changed.stderr
    anew = cli(*command, "--no-resume")
    assert anew.returncode == 0, anew.stderr
    assert "left out: 1 images, the first is p000: its maps were made from another" in anew.stderr
    assert predicted.stat().st_mtime_ns > before
