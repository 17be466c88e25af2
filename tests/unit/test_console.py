"""What is printed where."""

from __future__ import annotations

import pytest

from clipes.cli import console
from clipes.masks.scores import Scores
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
