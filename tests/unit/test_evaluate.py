"""Scores against ground truth that is incomplete, of another kind, or of another data set."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clipes.datasets import VOC_CLASSES
from clipes.disk.images import read_mask, write_confidence, write_mask
from clipes.errors import ArtifactError
from clipes.listener import Listener
from clipes.run.folder import Run
from clipes.run.reopen import reopen
from clipes.stages.evaluate import Scored, evaluate_folder, evaluate_run
from clipes.stages.train_examples import training_pairs
from clipes.stages.train_request import Sources
from tests.cli.small_data import write_refined

COUNT = 4


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of four photos; its masks are the ground truth."""
    run = write_refined(tmp_path / "run", tmp_path / "photos", COUNT)
    for id_ in run.ids("pseudo"):
        write_confidence(run.confidence_path(id_), np.ones((48, 64), np.float32))
    return run


@pytest.fixture
def truth(run: Run, tmp_path: Path) -> Path:
    return tmp_path / "photos" / "masks"


def change(folder: Path, of: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in folder.glob("*.png"):
        write_mask(path, of(read_mask(path)).astype(np.uint8))


def score_run(run: Run) -> tuple[Scored, list[str]]:
    said: list[str] = []
    return evaluate_run(run, None, None, [1.0], Listener(said.append)), said


def score_folder(folder: Path, truth: Path) -> tuple[Scored, list[str]]:
    said: list[str] = []
    scored = evaluate_folder(folder, truth, "voc", Listener(said.append))
    return scored, said


def test_nothing_is_said_of_what_is_complete(run: Run, truth: Path) -> None:
    scored, said = score_run(run)
    assert scored.stages["CRF"].miou == 1
    assert said == []
    assert score_folder(run.root / "pseudo", truth)[1] == []


def test_a_folder_of_a_run_has_the_names_of_its_classes(
    run: Run, truth: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    own = evaluate_folder(run.root / "pseudo", truth, None, Listener(said.append))
    assert own.classes == run.cam_record().settings.classes
    shutil.copytree(run.root / "pseudo", run.relabelled.root / "pseudo")
    again = evaluate_folder(run.relabelled.root / "pseudo", truth, None, Listener(said.append))
    assert again.classes == own.classes
    assert said == []
    shutil.copytree(run.root / "pseudo", tmp_path / "alone" / "masks")
    (tmp_path / "alone" / "run.json").write_text("[]")  # another program's
    alone = evaluate_folder(tmp_path / "alone" / "masks", truth, None, Listener(said.append))
    assert alone.classes == VOC_CLASSES
    assert said[0] == "classes: VOC's 20, for want of other names (--prompts)"


@pytest.mark.parametrize("values", ["0 and 255", "0", "255"])
def test_ground_truth_without_any_class_is_refused(run: Run, truth: Path, values: str) -> None:
    on, off = (255 if "255" in values else 0), (0 if "0" in values.split() else 255)
    change(truth, lambda mask: np.where(mask > 0, on, off))
    for score in (lambda: score_run(run), lambda: score_folder(run.root / "pseudo", truth)):
        with pytest.raises(ArtifactError) as caught:
            score()
        assert f"p000.png hold only {values};" in str(caught.value)
        assert "1 for the first class and so on, 255 for not labelled" in str(caught.value)
        assert "a single class is 1, not 255" in str(caught.value)


def test_classes_that_the_ground_truth_never_shows_are_said(run: Run, truth: Path) -> None:
    # A mask of "object or not", scored as if it were one of classes.
    change(truth, lambda mask: mask > 0)
    _, said = score_run(run)
    assert len(said) == 1
    assert "nowhere in the ground truth of these images: dog, sofa; masks hold 0" in said[0]


def test_missing_masks_are_counted(run: Run, truth: Path) -> None:
    for id_ in ("p000", "p003"):
        run.pseudo_path(id_).unlink()
    scored, said = score_folder(run.root / "pseudo", truth)
    assert scored.stages["masks"].images == 2
    assert said == [f"2 of 4 ground-truth masks of {truth} have no mask in {run.root / 'pseudo'}"]
    scored, said = score_run(run)
    assert scored.stages["CRF"].images == 2
    assert said == ["pseudo: 2 of 4 images have none yet, the first is p000"]


def test_missing_ground_truth_is_counted(run: Run, truth: Path) -> None:
    (truth / "p003.png").unlink()
    scored, said = score_folder(run.root / "pseudo", truth)
    assert scored.stages["masks"].images == 3
    assert said == [f"1 of 4 masks have no ground truth in {truth}"]
    scored, said = score_run(run)
    assert scored.stages["CRF"].images == 3
    end = "the first is p003"
    assert said == [f"1 of 4 images have no ground truth and are not scored, {end}"]


def test_missing_predictions_are_counted(run: Run) -> None:
    write_mask(run.root / "predictions" / "p000.png", np.zeros((48, 64), np.uint8))
    scored, said = score_run(run)
    assert scored.stages["segmenter, train"].images == 1
    assert said == ["predictions: 3 of 4 images have none yet, the first is p001"]


def test_sizes_that_differ_name_both_files_and_blame_none(run: Run, truth: Path) -> None:
    write_mask(truth / "p002.png", np.ones((24, 64), np.uint8))
    with pytest.raises(ArtifactError) as caught:
        score_run(run)
    assert str(caught.value) == (
        "p002: the ground truth is 24 x 64 and the prediction 48 x 64 (ground truth "
        f"{truth / 'p002.png'}, CRF {run.pseudo_path('p002')}); both must have the size of the "
        "image, held upright; replace the one that has not"
    )


def test_a_value_that_is_no_class_says_what_masks_hold(run: Run, truth: Path) -> None:
    change(truth, lambda mask: np.where(mask > 0, 128, 0))
    with pytest.raises(ArtifactError, match=r"label 128, but there are 3 classes \(.*p000.png"):
        score_run(run)
    with pytest.raises(ArtifactError, match="masks hold 0 for background, 1 for the first class"):
        score_run(run)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "there is no folder {gt}; check the path given by --gt"),
        ([], "no mask in {gt} belongs to an image of {run}: it holds no file; a mask is a PNG"),
        (["p000.jpg", "x.txt"], ": none of its 2 files is a PNG, the first is p000.jpg; a mask is"),
        (
            ["q.png"],
            "called otherwise, the first is q.png; a mask is a PNG of label numbers, called ",
        ),
    ],
)
def test_a_folder_of_ground_truth_that_is_none_is_described(
    run: Run, tmp_path: Path, files: list[str] | None, said: str
) -> None:
    gt = tmp_path / "gt"
    for name in files or []:
        gt.mkdir(exist_ok=True)
        (gt / name).write_bytes(b"")
    if files == []:
        gt.mkdir()
    with pytest.raises(ArtifactError) as caught:
        evaluate_run(run, None, gt, [1.0], Listener())
    assert said.format(gt=gt, run=run.root) in str(caught.value)
    with pytest.raises(ArtifactError) as caught:
        score_folder(run.root / "pseudo", gt)
    assert said.format(gt=gt, run=run.root).replace("an image of", "a mask in").replace(
        f"{run.root}:", f"{run.root / 'pseudo'}:"
    ) in str(caught.value)
    sources = Sources(run, run, masks=gt)
    with pytest.raises(ArtifactError) as caught:
        training_pairs(sources, reopen(run, None), guided=False, say=print)
    assert said.format(gt=gt, run=run.root).replace("--gt", "--masks") in str(caught.value)


def test_masks_of_suffix_in_capitals_are_found(run: Run, truth: Path, tmp_path: Path) -> None:
    gt = tmp_path / "gt"
    gt.mkdir()
    for path in truth.glob("*.png"):
        path.rename(gt / f"{path.stem}.PNG")
    scored = evaluate_run(run, None, gt, [1.0], Listener())
    assert scored.stages["CRF"].images == COUNT
    sources = Sources(run, run, masks=gt)
    assert len(training_pairs(sources, reopen(run, None), guided=False, say=print)) == COUNT
