"""The stages in a row: in which order, what is told of them, and what a failing one ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipes.config import get_preset
from clipes.datasets import open_dataset
from clipes.disk.images import write_mask
from clipes.errors import ArtifactError, DatasetError, UsageError
from clipes.listener import Listener
from clipes.run.loop import Outcome, Summary
from clipes.stages.cam import CamRequest, ClipRequest, DataRequest
from clipes.stages.run import FolderResult, RunRequest, make_run_of
from clipes.types import Failure
from tests.heard import Heard
from tests.report_support import Made, make_run

IDS = {"a": (0,), "b": (1, 2), "c": (2,)}


def request(photos: Path, **more: object) -> RunRequest:
    cam = CamRequest(DataRequest("folder", photos), ClipRequest(), get_preset("default"))
    return RunRequest(cam, workers=1, **more)


def follow(made: Made, heard: Heard, maps: Outcome, *, numbered: bool = True) -> FolderResult:
    """Let the stages after ``cam`` run, whose maps are there."""

    def make_maps(listener: Listener) -> Outcome:
        with listener.progress("weights") as progress:
            progress(1, 1)
        with listener.progress("cam") as progress:
            progress(3, 3)
        for failure in maps.summary.failures:
            listener.report(failure)
        return maps

    data = open_dataset("folder", root=made.photos)
    asked = request(made.photos)
    return make_run_of(asked, data, make_maps, made.run, heard.listener, numbered=numbered)


ALL = Outcome(Summary(1, 2, (), {"were shrunk": 1}), ())


@pytest.mark.parametrize(
    ("asked", "scored", "stages"),
    [
        ({}, False, "cam refine report"),
        ({}, True, "cam refine eval report"),
        ({"train": True}, False, "cam refine train-seg report"),
        (
            {"train": True, "predict_on": Path("more")},
            True,
            "cam refine train-seg predict eval report",
        ),
    ],
)
def test_the_order_of_the_stages(asked: dict[str, object], scored: bool, stages: str) -> None:
    assert request(Path(), **asked).stages(scored=scored) == tuple(stages.split())


def test_to_predict_needs_a_segmenter() -> None:
    with pytest.raises(UsageError, match="add --train"):
        request(Path(), predict_on=Path("more"))


def test_progress_is_told_with_the_place_in_the_row(tmp_path: Path) -> None:
    heard = Heard()
    result = follow(make_run(tmp_path, IDS, refined=False), heard, ALL)
    names = list(dict.fromkeys(heard.steps))
    assert names == [
        "1/4 cam: weights",
        "1/4 cam",
        "2/4 refine: look",
        "2/4 refine",
        "3/4 eval: look",
        "3/4 eval",
        "4/4 report",
    ]
    assert "1 of 1 images were shrunk" in heard.said
    assert "1/4 cam: 3 of 3 done: 1 made, 2 there before, 0 failed" in heard.said
    assert "2/4 refine: 3 of 3 done: 3 made, 0 there before, 0 failed" in heard.said
    assert heard.said[-1] == f"4/4 report: {result.report}"
    assert result.scored is not None
    assert result.scored.stages["CRF"].images == 3
    assert result.masks.done == 3


def test_from_python_progress_has_the_stages_own_names(tmp_path: Path) -> None:
    heard = Heard()
    follow(make_run(tmp_path, IDS, refined=False, truth=False), heard, ALL, numbered=False)
    assert set(heard.steps) == {"weights", "cam", "look", "refine", "report"}


def test_an_image_is_reported_once_with_the_first_reason(tmp_path: Path) -> None:
    made, heard = make_run(tmp_path, IDS, refined=False), Heard()
    made.run.cams_path("b").unlink()
    lost, unusable = Failure("b", "cannot be read"), Failure("d", "no label")
    result = follow(made, heard, Outcome(Summary(2, 0, (lost,)), (unusable,)))
    assert heard.failures == [lost, unusable]
    assert result.failures == (lost, unusable)
    assert "1/4 cam: 2 of 4 done: 2 made, 0 there before, 2 failed" in heard.said
    assert "2/4 refine: 2 of 3 done: 2 made, 0 there before, 1 failed" in heard.said


def test_without_a_single_map_nothing_follows(tmp_path: Path) -> None:
    made, heard = make_run(tmp_path, IDS, refined=False), Heard()
    lost = tuple(Failure(id_, "cannot be read") for id_ in IDS)
    with pytest.raises(DatasetError, match="all 3 failed, the first is a: cannot be read"):
        follow(made, heard, Outcome(Summary(0, 0, lost), ()))
    assert not made.run.ids("pseudo")


def test_scores_that_fail_keep_no_page_away(tmp_path: Path) -> None:
    made, heard = make_run(tmp_path, IDS, refined=False), Heard()
    write_mask(made.photos / "masks" / "a.png", made.truth["a"][:10])
    with pytest.raises(ArtifactError, match="a: "):
        follow(made, heard, ALL)
    assert (made.run.root / "report" / "index.html").is_file()
    assert made.run.has_pseudo("c")


def test_a_command_of_several_stages_is_named_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, IDS).run
    run.begin("refine", {}, "clipes run")
    run.begin("relabel", {}, "clipes run")
    assert run.commands() == ["clipes cam <x>", "clipes run"]
