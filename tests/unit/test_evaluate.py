"""Scores against ground truth that is incomplete, of another kind, or of another data set."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clipes.datasets import VOC_CLASSES
from clipes.disk.images import read_mask, write_confidence, write_mask
from clipes.errors import ArtifactError, DatasetError
from clipes.listener import Listener
from clipes.run.folder import Run
from clipes.run.record import TrainSettings
from clipes.run.reopen import reopen
from clipes.stages.evaluate import Scored, evaluate_folder, evaluate_run
from clipes.stages.train_examples import training_pairs
from clipes.stages.train_request import Sources
from clipes.types import CamMaps, PseudoLabel
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


def score_run(run: Run, gt: Path | None = None) -> tuple[Scored, list[str]]:
    said: list[str] = []
    return evaluate_run(run, None, gt, [1.0], Listener(said.append)), said


def score_folder(folder: Path, truth: Path) -> tuple[Scored, list[str]]:
    said: list[str] = []
    scored = evaluate_folder(folder, truth, "voc", Listener(said.append))
    return scored, said


def write_predictions(run: Run, truth: Path, val: str | None, *ids: str) -> None:
    """Write what a trained segmenter leaves behind; its predictions are the ground truth."""
    for id_ in ids:
        write_mask(run.root / "predictions" / f"{id_}.png", read_mask(truth / f"{id_}.png"))
    settings = TrainSettings(
        preset={},
        seed=0,
        threshold=None,
        loss="ce",
        amp="off",
        masks=None,
        confidence=None,
        split=None,
        examples=2,
        backbone_weights="none",
        val=val,
    )
    run.begin("train-seg", settings.to_dict(), "clipes train-seg")


@pytest.fixture
def taught(tmp_path: Path) -> Run:
    """A run of the first two of four photos, and a segmenter that predicted the others."""
    photos = tmp_path / "photos"
    run = write_refined(tmp_path / "run", photos, COUNT)
    for name, ids in (("train", ("p000", "p001")), ("val", ("p002", "p003"))):
        (photos / f"{name}.txt").write_text("\n".join(ids))
    settings = {**run.stage("cam")["settings"], "split": "train"}
    run.begin("cam", settings, "clipes cam", {"root": str(photos)}, anew=True)
    for id_ in ("p002", "p003"):
        run.pseudo_path(id_).unlink()
    for id_ in ("p000", "p001"):
        write_confidence(run.confidence_path(id_), np.ones((48, 64), np.float32))
    write_predictions(run, photos / "masks", "val", "p002", "p003")
    return run


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


def test_a_segmenter_is_scored_where_only_validation_images_have_ground_truth(
    taught: Run, tmp_path: Path
) -> None:
    truth, gt = tmp_path / "photos" / "masks", tmp_path / "val-masks"
    for id_ in ("p000", "p001"):
        (truth / f"{id_}.png").unlink()
    skipped = (
        f"the images of {taught.root} itself have no ground truth: only the segmenter's "
        "predictions of others are scored"
    )
    scored, said = score_run(taught)
    assert said == [skipped]
    assert {name: it.images for name, it in scored.stages.items()} == {"segmenter, val": 2}
    assert scored.stages["segmenter, val"].miou == 1

    truth.rename(gt)
    scored, said = score_run(taught, gt)
    assert said == [skipped]
    assert {name: it.images for name, it in scored.stages.items()} == {"segmenter, val": 2}

    with pytest.raises(DatasetError, match="no ground-truth masks for the images of"):
        score_run(taught)
    for path in (taught.root / "predictions").iterdir():
        path.unlink()
    with pytest.raises(ArtifactError, match="val-masks belongs to an image of"):
        score_run(taught, gt)


def test_maps_of_pictures_that_only_some_stages_take_are_scored(
    run: Run, truth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for id_ in run.ids("pseudo"):
        found = read_mask(truth / f"{id_}.png")
        labels = np.unique(found[found > 0]).astype(np.int64) - 1
        maps = np.stack([found == 1 + label for label in labels]).astype(np.float16)
        run.save_cams(id_, CamMaps(labels, maps, found.shape))
    monkeypatch.setitem(Run.load_cams.__kwdefaults__, "most", 48 * 64 - 1)
    scored, _ = score_run(run)
    assert scored.stages["CAM (alpha 1)"].images == COUNT
    assert scored.stages["CAM (alpha 1)"].miou == 1


def test_masks_of_which_no_pixel_is_confident_cost_one_row(run: Run) -> None:
    for id_ in run.ids("pseudo"):
        write_confidence(run.confidence_path(id_), np.full((48, 64), 0.5, np.float32))
    scored, said = score_run(run)
    assert {name: it.miou for name, it in scored.stages.items()} == {"CRF": 1}
    assert said == [
        "CRF >= 0.95: no scores, no pixel of its 4 images has both a ground truth and a label"
    ]


def test_masks_without_any_label_leave_nothing_to_score(run: Run) -> None:
    change(run.root / "pseudo", lambda mask: np.full_like(mask, 255))
    said: list[str] = []
    with pytest.raises(ArtifactError) as caught:
        evaluate_run(run, None, None, [1.0], Listener(said.append))
    assert str(caught.value) == (
        f"nothing to score in {run.root}; why what is there does not count is said above"
    )
    assert [remark.split(":")[0] for remark in said] == ["CRF", "CRF >= 0.95"]


@pytest.mark.parametrize("name", ["segmenter, train", "relabelled", "pseudo"])
def test_output_of_background_images_alone_costs_its_rows(run: Run, truth: Path, name: str) -> None:
    background = np.zeros((48, 64), np.uint8)
    write_mask(truth / "p000.png", background)
    if name == "relabelled":
        sure = PseudoLabel(background, np.ones((48, 64), np.float32))
        run.relabelled.save_pseudo("p000", sure)
    else:
        write_mask(run.root / "predictions" / "p000.png", background)
    if name == "pseudo":
        write_mask(run.root / "predictions" / "p001.png", read_mask(truth / "p001.png"))
        for id_ in ("p001", "p002", "p003"):
            run.pseudo_path(id_).unlink()
    scored, said = score_run(run)
    left = {"segmenter, train": 2} if name == "pseudo" else {"CRF": 4, "CRF >= 0.95": 4}
    assert {stage: it.images for stage, it in scored.stages.items()} == left
    assert (
        f"{name}: no scores, the ground truth of its 1 images, such as {truth / 'p000.png'}, shows "
        "no class"
    ) in said


def test_validation_masks_of_another_kind_cost_one_row(taught: Run, tmp_path: Path) -> None:
    truth = tmp_path / "photos" / "masks"
    for id_ in ("p002", "p003"):
        path = truth / f"{id_}.png"
        write_mask(path, np.where(read_mask(path) > 0, 255, 0).astype(np.uint8))
    scored, said = score_run(taught)
    assert set(scored.stages) == {"CRF", "CRF >= 0.95"}
    assert said == [
        "segmenter, val: no scores, the ground truth of its 2 images, such as "
        f"{truth / 'p002.png'}, shows no class"
    ]


def test_a_list_of_validation_images_that_is_gone_costs_one_row(
    taught: Run, tmp_path: Path
) -> None:
    (tmp_path / "photos" / "val.txt").unlink()
    scored, said = score_run(taught)
    assert {name: it.miou for name, it in scored.stages.items()} == {"CRF": 1, "CRF >= 0.95": 1}
    assert len(said) == 1
    assert said[0].startswith("no scores of the segmenter: no list of images 'val': looked for ")


def test_validation_images_need_no_labels(taught: Run, tmp_path: Path) -> None:
    labels = tmp_path / "photos" / "labels.csv"
    rows = labels.read_text().splitlines(keepends=True)
    labels.write_text("".join(row for row in rows if not row.startswith("p003")))
    scored, said = score_run(taught)
    assert scored.stages["segmenter, val"].images == 2
    assert said == []


def test_validation_images_that_are_left_out_are_said(taught: Run, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "images" / "p003.jpg").unlink()
    scored, said = score_run(taught)
    assert scored.stages["segmenter, val"].images == 1
    assert len(said) == 1
    assert said[0].startswith(
        "segmenter, val: left out: 1 of the data set's images cannot be used, the first is p003: "
    )
    (photos / "val.txt").write_text("p001\np002\n")
    (photos / "masks" / "p001.png").unlink()
    _, said = score_run(taught)
    end = "1 of 2 images have no ground truth and are not scored, the first is p001"
    assert said == [end, f"segmenter, val: {end}"]
