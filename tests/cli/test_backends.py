"""``clipes refine`` on a real Ray and a real Dask cluster of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli

pytestmark = pytest.mark.slow


def cam(cli: Cli, photos: Path, weights: Path) -> None:
    done = cli("cam", "--dataset", "folder", "--root", photos, "--weights", weights, "--out", "run")
    assert done.returncode == 0, done.stderr


def made(folder: Path) -> dict[str, bytes]:
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for stage in ("pseudo", "confidence")
        for path in (folder / stage).iterdir()
    }


@pytest.mark.parametrize(("backend", "module"), [("ray", "ray"), ("dask", "distributed")])
def test_a_cluster_makes_the_same_files(backend, module, cli, photos, tiny_weights, tmp_path):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install clipes[{backend}]")
    cam(cli, photos, tiny_weights)
    for path in (photos / "images" / "p1.jpg", photos / "images" / "p2.jpg"):
        path.rename(path.with_suffix(".gone"))  # failures come back from other processes, too
    alone = cli("refine", "run", "--workers", 2)
    expected = made(tmp_path / "run")
    assert len(expected) == 8
    for stage in ("pseudo", "confidence"):
        for path in (tmp_path / "run" / stage).iterdir():
            path.unlink()
    spread = cli("refine", "run", "--backend", backend, "--workers", 2)
    assert spread.returncode == alone.returncode == 1
    assert made(tmp_path / "run") == expected
    assert "masks: 4 made, 0 there before, 2 failed" in spread.stderr
    assert spread.stdout.strip() == "run"


def test_a_cluster_that_is_not_there_is_one_line(cli, photos, tiny_weights, environment):
    pytest.importorskip("distributed", reason="distributed is not installed")
    cam(cli, photos, tiny_weights)
    # Nothing listens on port 1; the wait is the library's own setting.
    environment |= {
        "DASK_SCHEDULER_ADDRESS": "tcp://127.0.0.1:1",
        "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s",
    }
    done = cli("refine", "run", "--backend", "dask")
    assert done.returncode == 1
    assert "DASK_SCHEDULER_ADDRESS" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
