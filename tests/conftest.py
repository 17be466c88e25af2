"""What tests share: a small CLIP, and the reference data beside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_clip import tiny_clip
from tests.torch_threads import torch_threads

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Give each run a folder of its own for what tests write.

    Where nothing is kept, pytest locks no folder, and a run that ends takes those of all others of
    the same user along: a single test would break a run of all beside it.
    """
    if hasattr(config, "workerinput"):
        return  # the folder of a worker is within that of its run
    folder = tempfile.mkdtemp(prefix="clipes-tests-")
    os.environ["PYTEST_DEBUG_TEMPROOT"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tests off the user's data; weights are cached between test runs on purpose."""
    os.environ.pop("CLIPES_DATA", None)
    os.environ["NO_COLOR"] = "1"
    # Tests that run side by side share the cores.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the stages work on a processor; and more only wait for each other in small layers."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real images, features and the reference's results; not part of the project."""
    path = Path(os.environ.get("CLIPES_SHARED", ROOT.parent / "shared"))
    if not (path / "golden").is_dir():
        pytest.skip(f"the reference data is not at {path}; set CLIPES_SHARED")
    return path


def _make_weights(shared: Path, size: str, folder: Path) -> Path:
    path = folder / f"{size}.pt"
    script = shared / "golden" / "make_weights.py"
    subprocess.run([sys.executable, script, size, path], check=True)
    return path


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a ``tiny_clip``."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(tiny_clip(), path)
    return path


@pytest.fixture(scope="session")
def golden_tiny_weights(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small CLIP that golden data were made with."""
    return _make_weights(shared, "tiny", tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="session")
def golden_full_weights(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of ViT-B/16's size."""
    return _make_weights(shared, "vit-b-16", tmp_path_factory.mktemp("weights"))
