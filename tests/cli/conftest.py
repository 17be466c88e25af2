"""Real subprocesses of the command line, on a small data set and synthetic weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipes.disk.images import write_mask
from tests.cli.forked import Starter, forking
from tests.cli.inline import exit_code
from tests.cli.small_data import write_clip
from tests.dino_support import cache_dino

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def ask() -> Iterator[Callable[..., Any]]:
    """What ``Starter`` starts commands with."""
    with forking() as ask:
        yield ask


@pytest.fixture
def start(ask: Callable[..., Any], tmp_path: Path) -> Starter:
    """Starts commands in ``tmp_path``, where a small CLIP is."""
    write_clip(tmp_path / "clip.safetensors", tmp_path / "text.npz")
    cache_dino(folder=tmp_path / "cache")
    return Starter(ask, tmp_path, {**os.environ, "CLIPES_CACHE": str(tmp_path / "cache")})


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    cache_dino(folder=tmp_path / "cache")
    return {**os.environ, "CLIPES_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def cli(tmp_path: Path, environment: dict[str, str]) -> Cli:
    return partial(_run, tmp_path, environment, ())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands of this process work: a folder with an empty cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def inline(here: Path, capsys: pytest.CaptureFixture[str], one_thread: None) -> Cli:
    """As ``cli``, but in this process: importing torch once is enough."""
    cache_dino()

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = exit_code(*arguments)
        told = capsys.readouterr()
        return subprocess.CompletedProcess("clipes", code, told.out, told.err)

    return run


@pytest.fixture
def two_ranks(tmp_path: Path, environment: dict[str, str]) -> Cli:
    """The command line as torchrun starts it, in two processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return partial(_run, tmp_path, environment, launcher)


def _run(
    cwd: Path, environment: dict[str, str], launcher: tuple[str, ...], *arguments: object
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "clipes", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six small pictures of VOC classes with labels and ground truth."""
    root = tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["image,labels"]
    for index, labels in enumerate(["cat", "dog", "cat;dog", "person", "cow", "person;sofa"]):
        height, width = 80 + 16 * index, 120
        pixels = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        picture.save(root / "images" / f"p{index}.jpg")
        truth = np.zeros((height, width), np.uint8)
        truth[20:60, 30:90] = 1 + index % 2
        write_mask(root / "masks" / f"p{index}.png", truth)
        lines.append(f"p{index}.jpg,{labels}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root
