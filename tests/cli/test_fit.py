"""``clipes prompts fit``: labelled images in, vectors out that ``cam`` takes."""

from __future__ import annotations

from pathlib import Path

from clipes.run.folder import Run
from clipes.words.features import load_text_features
from tests.cli.conftest import Cli


def test_fitted_vectors_make_maps(
    cli: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    words = tmp_path / "words.toml"
    words.write_text('classes = ["cat", "dog"]\nbackground = []\n')
    fit = ("prompts", "fit", "--data", photos, "--weights", tiny_weights, "--prompts", words)
    done = cli(*fit, "--out", "vectors.npz")
    assert done.returncode == 0, done.stderr
    assert "cat\t2 images" in done.stdout
    features = load_text_features(tmp_path / "vectors.npz")
    assert features.classes == ("cat", "dog")
    # What no map claims has a vector too, where there is such a patch.
    assert set(features.background_words) - {"anything else"} == {"cow", "person", "sofa"}
    assert "not text features" in features.note

    (photos / "pets.csv").write_text("image,labels\np0.jpg,cat\np2.jpg,cat;dog\n")
    (photos / "pets.txt").write_text("p0\np2\n")
    cam = ("cam", "--dataset", "folder", "--root", photos, "--weights", tiny_weights)
    pets = ("--labels", photos / "pets.csv", "--split", photos / "pets.txt", "--prompts", words)
    made = cli(*cam, *pets, "--text-features", "vectors.npz")
    assert made.returncode == 0, made.stderr
    run = Run(tmp_path / "runs" / "folder")
    assert run.load_cams("p2").labels.tolist() == [0, 1]
    assert "not text features" in run.stage("cam")["settings"]["text"]["note"]


def test_a_class_that_no_image_shows_is_named(
    cli: Cli, photos: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    words = tmp_path / "words.toml"
    words.write_text('classes = ["cat", "unicorn"]\nbackground = []\n')
    fit = ("prompts", "fit", "--data", photos, "--weights", tiny_weights, "--prompts", words)
    done = cli(*fit, "--out", "vectors.npz")
    assert done.returncode == 1
    assert "unicorn" in done.stderr
    assert not (tmp_path / "vectors.npz").exists()
