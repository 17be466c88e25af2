"""Standard streams in any encoding, full, or closed: no traceback, one line where one helps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.small_data import write_photos

ClipesTo = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An image whose name and label are in no Western encoding, and another."""
    root = tmp_path / "photos"
    write_photos(root, 2)
    (root / "images" / "p000.jpg").rename(root / "images" / "猫.jpg")
    (root / "masks" / "p000.png").rename(root / "masks" / "猫.png")
    labels = (root / "labels.csv").read_text().replace("p000.jpg,cat", "猫.jpg,犬")
    (root / "labels.csv").write_text(labels, "utf-8")
    return root


@pytest.fixture
def clipes(tmp_path: Path, photos: Path) -> ClipesTo:
    """Runs a command with streams as they are given."""

    def run(
        *arguments: str, to: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "clipes", *arguments]
        if to is not None:
            command = ["sh", "-c", f'exec "$@" {to}', "sh", *command]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            encoding=environment.get("PYTHONIOENCODING", "utf-8").replace("ascii", "utf-8"),
            check=False,
        )

    return run


CHECK = ("check", "--dataset", "folder", "--root", "photos")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_names_in_any_script_are_printed_in_any_encoding(clipes: ClipesTo, encoding: str) -> None:
    cat, dog = (name.encode(encoding, "backslashreplace").decode(encoding) for name in "猫犬")
    found = clipes(*CHECK, PYTHONIOENCODING=encoding)
    assert found.returncode == 1
    assert f"unknown class: {cat}: photos/labels.csv: unknown class '{dog}'" in found.stdout
    assert "Traceback" not in found.stderr
    data = clipes(*CHECK, "--json", PYTHONIOENCODING=encoding)
    # typer takes ASCII for a mistake, and prints UTF-8 instead.
    assert (dog if encoding != "ascii" else "犬") in data.stdout
    absent = clipes(*CHECK[:-1], "猫", PYTHONIOENCODING=encoding)
    assert absent.returncode == 1
    assert "Traceback" not in absent.stderr
    assert absent.stderr.startswith("clipes: there is no folder ")
    wrong = clipes("--猫", PYTHONIOENCODING=encoding)
    assert wrong.returncode == 2
    assert "No such option" in wrong.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", [("--version",), ("--help",), CHECK, (*CHECK, "--json")])
def test_a_full_disk_behind_stdout_is_one_line(
    clipes: ClipesTo, command: tuple[str, ...], buffered: bool
) -> None:
    done = clipes(*command, to="> /dev/full", PYTHONUNBUFFERED="" if buffered else "1")
    assert done.returncode == 1
    assert done.stderr == (
        "clipes: cannot write to standard output: No space left on device; make room, or send it "
        "elsewhere\n"
    )


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", [("--version",), CHECK, (*CHECK, "--json")])
def test_a_reader_that_has_seen_enough_ends_it_quietly(
    tmp_path: Path, photos: Path, command: tuple[str, ...], buffered: bool
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "clipes", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    with process.stderr:
        said = process.stderr.read()
    assert process.wait() == 1
    assert said == ""


def test_closed_streams_are_no_error(clipes: ClipesTo) -> None:
    done = clipes("--version", to=">&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = clipes("--version", to="2>&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("clipes ")
    done = clipes(*CHECK, to=">&- 2>&-")
    assert done.returncode == 1
