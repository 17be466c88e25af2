"""Large pictures from file to mask, as a user has them made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipes.disk.images import read_confidence, read_mask
from clipes.run.folder import Run
from tests.cli.conftest import Cli

SIZE = (300, 700)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A large picture and a small one, and their labels."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("large.tif", SIZE), ("small.png", (100, 120))):
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    (folder / "labels.csv").write_text("image,labels\nlarge.tif,cat;dog\nsmall.png,dog\n")
    return folder


@pytest.mark.parametrize("preset", ["fast", "clip"])
def test_large_pictures_are_done_in_tiles(
    cli: Cli, pictures: Path, tiny_weights: Path, tmp_path: Path, preset: str
) -> None:
    out = tmp_path / "run"
    cam = ["cam", "--dataset", "folder", "--root", str(pictures), "--out", str(out)]
    cam += ["--preset", preset, "--weights", str(tiny_weights), "--tile", "256"]
    refine = ["refine", str(out), "--workers", "1", "--tile", "300"]
    for command, side in ((cam, 256), (refine, 300)):
        first, again = cli(*command), cli(*command)
        assert f"1 of 2 images are so large that they were worked on in tiles of {side}" in (
            first.stderr
        )
        assert "2 made, 0 there before" in first.stderr
        assert "0 made, 2 there before" in again.stderr
    stages = json.loads((out / "run.json").read_text())["stages"]
    assert [stages[name]["settings"]["tile"] for name in ("cam", "refine")] == [256, 300]
    assert read_mask(out / "pseudo" / "large.png").shape == SIZE
    assert read_confidence(out / "confidence" / "large.png").shape == SIZE
    assert set(Run(out).load_cams("large").labels) == {0, 1}
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp"]
    other = cli(*refine[:-2])
    assert other.returncode == 1
    assert "was made by 'refine' with tile = 300, not null" in other.stderr


def test_tiles_of_one_line_are_those_of_all_its_stages(
    cli: Cli, pictures: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    line = ["run", "--dataset", "folder", "--root", str(pictures), "--out", str(out)]
    line += ["--preset", "fast", "--weights", str(tiny_weights), "--workers", "1", "--tile", "300"]
    done = cli(*line)
    assert done.returncode == 0, done.stderr
    told = "1 of 2 images are so large that they were worked on in tiles of 300 pixels"
    assert done.stderr.count(told) == 2
    stages = json.loads((out / "run.json").read_text())["stages"]
    assert [stages[name]["settings"]["tile"] for name in ("cam", "refine")] == [300, 300]
    assert (out / "report" / "index.html").is_file()


def test_the_paper_s_preset_has_no_tiles(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    done = cli(
        *["cam", "--dataset", "folder", "--root", str(pictures), "--out", str(tmp_path / "run")],
        *["--preset", "reference", "--tile", "512"],
    )
    assert done.returncode == 2
    assert "the preset reference cannot see in tiles" in done.stderr
