"""``clipes report`` as a user runs it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.report_support import Made, make_run


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_run(tmp_path, {f"i{number:03}": (number % 3,) for number in range(100)}, (16, 24))


def test_the_page_and_the_queue(cli: Cli, made: Made) -> None:
    done = cli("report", made.run.root, "--pictures", 3, "--thumbnails", 5, "--workers", 2)
    assert done.returncode == 0, done.stderr
    page = made.run.root / "report" / "index.html"
    assert done.stdout == f"{page}\n"
    text = page.read_text("utf-8")
    assert text.count("<template ") == 5
    assert text.count("data-thumb=") == 5
    with page.with_name("review.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert [row["place"] for row in rows] == [str(number) for number in range(1, 101)]

    alone = cli("report", made.run.root, "--pictures", 3, "--thumbnails", 5, "--workers", 1)
    assert alone.returncode == 0, alone.stderr
    assert page.read_text("utf-8") == text, "threads change nothing"


def test_an_image_that_cannot_be_shown_is_said_and_the_page_is_there(cli: Cli, made: Made) -> None:
    made.run.cams_path("i007").write_bytes(b"no maps")
    done = cli("report", made.run.root)
    assert done.returncode == 1
    assert "skipping i007: " in done.stderr
    assert "Traceback" not in done.stderr
    assert (made.run.root / "report" / "index.html").is_file()


def test_without_a_run_there_is_one_line(cli: Cli, tmp_path: Path) -> None:
    done = cli("report", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "clipes cam" in done.stderr
    assert "Traceback" not in done.stderr
    assert cli("report", "--pictures", -1).returncode == 2
