"""What a shell is offered, through the protocol its completion script speaks; and how soon."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from clipes.choices import DatasetKind, ExportFormat, PresetName, SegmenterPresetName
from clipes.config import PRESETS, SEGMENTER_PRESETS
from clipes.datasets import DATASETS
from clipes.formats import FORMATS

Complete = Callable[..., list[str]]


def clipes(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "clipes", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def offered(*words: str) -> list[str]:
    """Return what bash is offered for the last word."""
    line = " ".join(("clipes", *words))
    found = clipes(_CLIPES_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words)))
    return found.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("cam", "--preset", ""), list(PresetName.names())),
        (("refine", "--preset", "re"), ["reference"]),
        (("check", "--dataset", ""), list(DatasetKind.names())),
        (("export", "--format", "c"), ["coco", "cvat", "cvat-mask", "clip-es"]),
        (("cam", "--weights", "re"), ["registry"]),
        (("cam", "--weights", "./my"), []),  # the shell goes on with files
        (("prompts", "fit", "--device", "c"), ["cpu", "cuda"]),
        (("ex",), ["export"]),
        (("weights", "f"), ["fetch"]),
    ],
)
def test_values_are_offered(words: tuple[str, ...], expected: list[str]) -> None:
    assert offered(*words) == expected


def test_options_are_offered() -> None:
    assert set(offered("export", "--co")) == {"--confidence", "--components", "--copy"}


def test_the_lists_that_are_offered_are_complete() -> None:
    assert list(PresetName.names()) == list(PRESETS)
    assert list(DatasetKind.names()) == list(DATASETS)
    assert set(SegmenterPresetName.names()) == {"auto", *SEGMENTER_PRESETS}
    assert list(ExportFormat.names()) == list(FORMATS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_that_way(shell: str) -> None:
    script = clipes(_CLIPES_COMPLETE=f"source_{shell}")
    assert f"_CLIPES_COMPLETE=complete_{shell}" in script


def test_the_help_tells_how_to_install_it() -> None:
    assert "--install-completion" in clipes("--help", COLUMNS="200")


def test_help_is_quick() -> None:
    code = (
        "import sys\n"
        "from clipes.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'cv2', 'numba', 'PIL', 'open_clip', 'joblib', 'onnx'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED []\n")
    best = min(_seconds() for _ in range(3))
    assert best < 1.5  # 0.3 s where nothing else runs; torch alone takes more than this


def _seconds() -> float:
    start = time.perf_counter()
    clipes("--help")
    return time.perf_counter() - start
