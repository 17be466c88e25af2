"""What is printed where."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipes.cli import console
from clipes.datasets.problems import Kind, Problem
from clipes.masks.scores import Scores
from clipes.stages.check import ClassCount, Findings
from clipes.stages.evaluate import Scored, scores_to_json

SCORES = Scores(0.5, 0.75, 1.0, (0.9, None, 0.1), 3)


def test_progress_in_a_log_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress_bar("cam") as progress:
        for done in range(101):
            now = float(done)
            progress(done, 100)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 4
    assert lines[0] == "cam: 20 %, about 80 s left"


def test_what_was_done_before_takes_no_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training goes on after iteration 50."""
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress_bar("train") as progress:
        progress(50, 100)
        now = 30.0
        progress(60, 100)
    assert capsys.readouterr().err == "train: 60 %, about 120 s left\n"


def test_scores_are_data_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_scores(Scored(("cat", "dog"), {"CRF": SCORES}), per_class=True)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "50.00" in captured.out
    assert "dog" in captured.out
    # A class that neither side shows has no IoU and takes no row.
    assert "cat" not in captured.out


def test_scores_as_json_name_the_classes() -> None:
    stage = scores_to_json(Scored(("cat", "dog"), {"CRF": SCORES}))["stages"]["CRF"]
    assert stage["iou"] == {"background": 0.9, "cat": None, "dog": 0.1}
    assert (stage["miou"], stage["images"]) == (0.5, 3)


NAMES = ("[dog]", "cat [/x]", "shoe:cat:1")


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    scores = Scores(0.5, 0.75, 1.0, (0.9, 0.1, 0.2, 0.3), 3)
    console.print_scores(Scored(NAMES, {"CRF": scores}), per_class=True)
    problem = Problem("[id]", "no :cat: in [red]", Kind.missing_image)
    classes = tuple(ClassCount(name, 1, rare=False) for name in NAMES)
    console.print_findings(Findings("voc", Path(), 1, 0, (problem,), classes))
    console.say(":dog: [/x]")
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    rows = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert rows == ["CRF", "background", *NAMES, *NAMES, "missing image"]
    assert lines[-1] == "missing image: [id]: no :cat: in [red]"
    assert captured.err == ":dog: [/x]\n"


def test_tables_in_a_pipe_are_not_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    scores = {f"relabelled, round {k}, corrected": SCORES for k in range(9)}
    console.print_scores(Scored(("dining table" * 9, "dog"), scores), per_class=True)
    out = capsys.readouterr().out
    assert "\u2026" not in out
    assert "..." not in out
    (row,) = [line for line in out.splitlines() if "background" in line]
    assert row.count("90.0") == 9
