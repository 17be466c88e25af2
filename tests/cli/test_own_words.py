"""A folder of classes that nobody knows, offline: what ``cam`` fits, keeps, and says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clipes.run.folder import Run
from clipes.words.features import load_text_features
from tests.cli.forked import Starter
from tests.cli.small_data import CLASSES, write_photos

FITS = ("--preset", "fast", "--weights", "clip.safetensors")


def cam(out: str, *more: str) -> list[str]:
    """Return the command that makes maps without any vectors."""
    return ["cam", "--dataset", "folder", "--root", "photos", "--out", out, *FITS, *more]


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", 4)
    return tmp_path / "photos" / "labels.csv"


def test_the_way_of_a_newcomer(start: Starter, tmp_path: Path, labels: Path) -> None:
    made = start(*cam("run"))
    assert made.returncode == 0, made.stderr
    assert "no vectors are shipped for 'cat', 'dog', 'sofa'" in made.stderr
    assert "images of each class: cat 2, dog 2, sofa 1" in made.stderr
    assert "few images of 'cat', 'dog', 'sofa'" in made.stderr
    run = Run(tmp_path / "run")
    record = run.cam_record()
    assert record.facts.fitted == {"cat": 2, "dog": 2, "sofa": 1}
    assert record.settings.text is not None
    assert "fitted to the labels of 4 of the run's own images" in record.settings.text.note
    assert start("refine", "run", "--workers", "1").returncode == 0
    assert start("report", "run").returncode == 0
    page = (run.root / "report" / "index.html").read_text("utf-8")
    assert "fitted to the run&#39;s own labels" in page

    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    again = start(*cam("run"))
    assert "maps: 0 made, 4 there before, 0 failed" in again.stderr
    assert "weights" not in again.stderr
    assert {path: path.read_bytes() for path in before} == before

    # Its vectors are of use elsewhere.
    other = start(*cam("other"), "--text-features", "run/words/vectors.npz")
    assert other.returncode == 0, other.stderr
    for id_ in run.ids("cams"):
        np.testing.assert_array_equal(
            Run(tmp_path / "other").load_cams(id_).maps, run.load_cams(id_).maps
        )


def test_corrected_labels_fit_anew_unless_what_was_learnt_is_to_be_kept(
    start: Starter, tmp_path: Path, labels: Path
) -> None:
    right = labels.read_text()
    labels.write_text(right.replace("p000.jpg,cat", "p000.jpg,sofa"))
    assert start(*cam("run")).returncode == 0
    labels.write_text(right)
    kept = start(*cam("run", "--keep-looks"))
    assert "maps: 1 made, 3 there before" in kept.stderr, kept.stderr
    fitted = start(*cam("run"))
    assert "they are fitted anew" in fitted.stderr
    assert "maps: 4 made, 0 there before" in fitted.stderr
    assert start(*cam("at-once")).returncode == 0
    for name in ("words/vectors.npz", "cams/p003.npz"):
        corrected, at_once = ((tmp_path / run / name).read_bytes() for run in ("run", "at-once"))
        assert corrected == at_once


def test_no_fit_stops_as_without_vectors(start: Starter, tmp_path: Path, labels: Path) -> None:
    labels.write_text(labels.read_text().replace("cat", "tapir"))
    (labels.parent / "classes.txt").write_text("tapir\ndog\nsofa\n")
    stopped = start(*cam("run", "--no-fit"))
    assert stopped.returncode == 1
    assert "channels, the weights clip.safetensors 16" in stopped.stderr
    assert not (tmp_path / "run").exists()
    # Vectors that were named are a person's own choice.
    named = start(*cam("run"), "--text-features", "text.npz")
    assert named.returncode == 1
    assert "no text feature for the class 'tapir'" in named.stderr


def test_other_settings_are_refused_before_vectors_are_fitted(
    start: Starter, tmp_path: Path, labels: Path
) -> None:
    assert start(*cam("run")).returncode == 0
    vectors = (tmp_path / "run/words/vectors.npz").read_bytes()
    labels.write_text(labels.read_text().replace("p000.jpg,cat", "p000.jpg,sofa"))
    other = start(*cam("run", "--preset", "reference"))
    assert other.returncode == 1
    assert "was made by 'cam' with preset.name" in other.stderr
    assert (tmp_path / "run/words/vectors.npz").read_bytes() == vectors


def test_images_that_are_all_labelled_alike_are_an_error_in_one_line(
    start: Starter, labels: Path
) -> None:
    rows = "".join(f"p{k:03}.jpg,cat\n" for k in range(4))
    labels.write_text(f"image,labels\n{rows}")
    stopped = start(*cam("run"))
    assert stopped.returncode == 1
    assert "all 4 images are labelled alike" in stopped.stderr


def test_shards_use_the_same_vectors(start: Starter, tmp_path: Path, labels: Path) -> None:
    first, second = (start(*cam("run", "--shard", f"{k}/2")) for k in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "encode" not in second.stderr
    assert Run(tmp_path / "run").ids("cams") == ["p000", "p001", "p002", "p003"]
    text = load_text_features(tmp_path / "run/words/vectors.npz")
    assert text.classes == CLASSES
    settings = json.loads((tmp_path / "run/run.json").read_text())["stages"]["cam"]["settings"]
    assert settings["text"]["note"] == text.note
