"""What a report measures without and with ground truth, and how it orders images."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipes.config import CONFIDENCE_THRESHOLD
from clipes.disk.images import write_mask
from clipes.listener import Listener
from clipes.masks.pseudo import cam_mask
from clipes.masks.scores import ConfusionMatrix
from clipes.report.measure import CUTS, Row, Tally, measure
from clipes.report.review import ClassSigns, Signs, read_signs, reasons, score
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.reopen import reopen
from clipes.stages.evaluate import evaluate_run
from clipes.stages.report import choose, measure_run
from clipes.types import IGNORE, CamMaps, PseudoLabel
from tests.report_support import CLASSES, Made, make_run

FINE = Signs((ClassSigns(0, 0.3, 0.1),), 0.05, 0.01)
SHOWN = {0: 2, 1: 4, 2: 5}
shares = st.floats(0, 1)


def quiet(*_: object) -> None:
    """Hears nothing."""


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make_run(tmp_path, {"a": (0,), "b": (0, 2), "c": (1,), "d": (2, 1, 0)})


def test_signs_are_what_slow_loops_count(made: Made) -> None:
    for id_, pseudo in made.pseudo.items():
        cams = made.run.load_cams(id_)
        coarse = cam_mask(cams, 1.0)
        signs = read_signs(cams, coarse, pseudo, 1.0, SHOWN)
        assert [one.label for one in signs.classes] == cams.labels.tolist()
        for one in signs.classes:
            now = {i for i, value in enumerate(pseudo.mask.ravel()) if value == one.label + 1}
            before = {i for i, value in enumerate(coarse.ravel()) if value == one.label + 1}
            assert one.area == len(now) / pseudo.mask.size
            assert one.disagreement == pytest.approx(1 - len(now & before) / len(now | before))
        assert signs.unsure == (pseudo.confidence < CONFIDENCE_THRESHOLD).mean()
        close = 0
        for row, column in np.ndindex(3, 4):
            values = sorted(float(m[row, column]) for m in cams.maps.astype(np.float32))
            first, second = sorted([*values, 1 - values[-1]])[::-1][:2]
            close += first - second < 0.2
        assert signs.ambiguous == close / 12


def test_before_the_crf_the_mask_of_the_maps_is_judged(made: Made) -> None:
    cams = made.run.load_cams("b")
    coarse = np.zeros(cams.size, np.uint8)
    coarse[:12] = 1
    signs = read_signs(cams, coarse, None, 1.0, SHOWN)
    assert signs.classes == (ClassSigns(0, 0.25, None, None, 2), ClassSigns(2, 0.0, None, None, 5))
    assert signs.unsure is None
    assert "bird: nothing labelled" in reasons(signs, CLASSES)


def test_a_segmenters_mask_is_compared_label_by_label(made: Made) -> None:
    for id_, pseudo in made.pseudo.items():
        cams = made.run.load_cams(id_)
        coarse = cam_mask(cams, 1.0)
        again = np.roll(pseudo.mask, 3, axis=1)
        alone = read_signs(cams, coarse, pseudo, 1.0, SHOWN)
        signs = read_signs(cams, coarse, pseudo, 1.0, SHOWN, again)
        assert alone.contests == ()
        assert replace(signs, contests=()) == alone
        for value, contest in zip([0, *(cams.labels + 1)], signs.contests, strict=True):
            one = {i for i, found in enumerate(pseudo.mask.ravel()) if found == value}
            other = {i for i, found in enumerate(again.ravel()) if found == value}
            assert contest == pytest.approx(1 - len(one & other) / len(one | other) if one else 0)
        assert signs.contested == max(signs.contests) > 0
        assert score(signs) == pytest.approx(score(alone) + 2 * signs.contested)


def test_what_a_segmenter_sees_elsewhere_is_said() -> None:
    torn = replace(FINE, contests=(0.1, 0.62))
    assert reasons(torn, CLASSES) == ("mask and segmenter disagree on 62 % of cat",)
    other = replace(FINE, contests=(0.7, 0.62))
    assert reasons(other, CLASSES) == ("mask and segmenter disagree on 70 % of the background",)
    assert reasons(replace(FINE, contests=(0.39, 0.0)), CLASSES) == ()


@given(shares, shares, shares, shares)
def test_each_sign_alone_raises_the_score(area: float, unsure: float, close: float, dis: float):
    signs = Signs((ClassSigns(0, area, dis),), close, unsure)
    assert score(signs) >= 0
    assert score(replace(signs, unsure=min(1, unsure + 0.01))) >= score(signs)
    assert score(replace(signs, ambiguous=min(1, close + 0.01))) >= score(signs)
    (one,) = signs.classes
    far = replace(signs, classes=(replace(one, drift=dis),))
    assert score(far) == pytest.approx(score(signs) + dis)
    alone, among = (replace(signs, classes=(replace(one, images=n),)) for n in (1, 20))
    assert score(alone) > score(among) > score(signs)
    empty = replace(signs, classes=(*signs.classes, ClassSigns(1, 0.0, 1.0)))
    assert score(empty) > score(signs) + 2


def test_a_usual_mask_gives_no_reason_and_reasons_come_by_weight() -> None:
    assert reasons(FINE, CLASSES) == ()
    bad = Signs(
        (
            ClassSigns(0, 0.0, 1.0),
            ClassSigns(1, 0.002, 0.97, 0.8, 5),
            ClassSigns(2, 0.95, 0.43, 0.7, 3),
        ),
        0.3,
        0.061,
    )
    assert reasons(bad, CLASSES) == (
        "cat: nothing labelled",
        "map undecided on 30 % of the image",
        "6.1 % of the pixels below confidence 0.95",
        "map and word alone disagree on 80 % of dog & <b>wolf</b>",
        "dog & <b>wolf</b>: only 0.20 % of the image",
        "hardly any background: 95 % of the image is labelled",
        "map and CRF disagree on 97 % of dog & <b>wolf</b>",
        "map and CRF disagree on 43 % of bird",
        "one of 3 images of bird",
    )
    assert score(bad) > 3 * score(FINE)


def all_measured(made: Made) -> tuple[list[Row], Tally]:
    samples = reopen(made.run, None).samples
    return measure_run(made.run, samples, CLASSES, 1, quiet)


def test_scores_are_those_of_eval(made: Made) -> None:
    (made.run.root / "confidence" / "c.png").unlink()
    (made.run.root / "pseudo" / "c.png").unlink()
    _, tally = all_measured(made)
    expected = evaluate_run(made.run, None, None, [1.0], Listener())
    assert tally.scores() == expected.stages
    assert tally.scores()["CRF"].images == 3


def test_the_curve_passes_through_the_scores(made: Made) -> None:
    _, tally = all_measured(made)
    points = {point.cut: point for point in tally.curve()}
    for cut, name in ((0.0, "CRF"), (0.95, "CRF >= 0.95")):
        expected = tally.scores()[name]
        assert points[cut].accuracy == expected.pixel_accuracy
        assert points[cut].coverage == expected.coverage
        assert points[cut].miou == pytest.approx(expected.miou)


def test_each_point_of_the_curve_is_the_score_of_the_pixels_kept(made: Made) -> None:
    _, tally = all_measured(made)
    points = tally.curve()
    assert len(points) > 10
    for point in points:
        matrix = ConfusionMatrix(4)
        for id_, truth in made.truth.items():
            stored = made.run.load_pseudo(id_)
            kept = np.where(stored.confidence >= np.float32(point.cut), stored.mask, IGNORE)
            matrix.update(truth, kept.astype(np.uint8))
        expected = matrix.scores()
        assert point.miou == pytest.approx(expected.miou)
        assert point.accuracy == pytest.approx(expected.pixel_accuracy)
        assert point.coverage == pytest.approx(expected.coverage)
    assert all(a.coverage > b.coverage for a, b in itertools.pairwise(points))


def test_the_histogram_counts_every_pixel_once(made: Made) -> None:
    _, tally = all_measured(made)
    bars = tally.histogram()
    stored = [made.run.load_pseudo(id_).confidence.ravel() for id_ in made.pseudo]
    values = np.concatenate(stored)
    edges = np.array([*CUTS, 2.0], np.float32)
    expected = np.histogram(values, edges)[0] / values.size
    np.testing.assert_allclose([share for *_, share in bars], expected)
    assert sum(share for *_, share in bars) == pytest.approx(1)


def test_an_image_has_the_mean_iou_of_the_labels_that_it_or_its_mask_holds(made: Made) -> None:
    rows, _ = all_measured(made)
    for row in rows:
        truth, mask = made.truth[row.id], made.pseudo[row.id].mask
        seen = [i for i, value in enumerate(truth.ravel()) if value != IGNORE]
        ious = []
        for label in (0, *(label + 1 for label in row.labels)):
            one = {i for i in seen if truth.ravel()[i] == label}
            other = {i for i in seen if mask.ravel()[i] == label}
            ious.append(len(one & other) / len(one | other))
        assert row.miou == pytest.approx(np.mean(ious))


@pytest.mark.parametrize("size", [1, 3])
def test_parts_add_up_to_the_whole(made: Made, size: int) -> None:
    samples = reopen(made.run, None).samples
    rows, tally, current = [], Tally(4), Freshness.of(made.run, CLASSES)
    whole_rows, whole = measure(samples, made.run, CLASSES, 1.0, current, SHOWN)
    for at in range(0, len(samples), size):
        some, sums = measure(samples[at : at + size], made.run, CLASSES, 1.0, current, SHOWN)
        rows += some
        tally.add(sums)
    assert rows == whole_rows
    assert tally.scores() == whole.scores()
    np.testing.assert_array_equal(tally.counts, whole.counts)
    np.testing.assert_array_equal(tally.pixels, whole.pixels)


def test_without_ground_truth_there_is_no_score_and_no_curve(tmp_path: Path) -> None:
    rows, tally = all_measured(make_run(tmp_path, {"a": (0,)}, truth=False))
    assert tally.scores() == {}
    assert tally.curve() == []
    assert len(tally.histogram()) == len(CUTS)
    assert rows[0].miou is None
    assert rows[0].score is not None


def test_maps_alone_are_judged_and_scored(tmp_path: Path) -> None:
    rows, tally = all_measured(make_run(tmp_path, {"a": (0,)}, refined=False))
    assert list(tally.scores()) == ["CAM (alpha 1)"]
    assert tally.histogram() == []
    assert rows[0].miou == tally.scores()["CAM (alpha 1)"].miou


def test_a_truth_that_is_all_ignored_gives_no_score(made: Made) -> None:
    write_mask(made.photos / "masks" / "a.png", np.full((48, 64), IGNORE, np.uint8))
    rows, _ = all_measured(made)
    assert [row.miou is None for row in rows] == [True, False, False, False]


def test_what_cannot_be_used_is_named_leads_the_queue_and_counts_nowhere(made: Made) -> None:
    _, before = all_measured(made)
    (made.photos / "images" / "a.png").write_bytes(b"no picture")
    made.run.cams_path("b").write_bytes(b"no maps")
    write_mask(made.photos / "masks" / "c.png", np.zeros((9, 9), np.uint8))
    wrong = CamMaps(np.array([7]), np.ones((1, 3, 4), np.float32), (48, 64))
    made.run.save_cams("d", wrong)
    rows, tally = all_measured(made)
    assert [row.failure != "" for row in rows] == [True] * 4
    assert "9 x 9" in rows[2].failure
    assert "its maps were made for class 7, its labels are cat and " in rows[3].failure
    assert all(row.urgency == float("inf") for row in rows)
    assert not tally.pixels.any()
    assert tally.scores() == {}
    assert before.scores()["CRF"].images == 4


def test_a_mask_of_another_class_list_is_refused(made: Made) -> None:
    mask = np.full((48, 64), 9, np.uint8)
    made.run.save_pseudo("a", PseudoLabel(mask, np.ones((48, 64), np.float32)))
    rows, _ = all_measured(made)
    assert "label 9" in rows[0].failure
    assert not rows[1].failure


def row(number: int, label: int, value: float, failure: str = "") -> Row:
    return Row(f"i{number:04}", (label,), (4, 4), None, value, (), None, failure)


ROWS = [row(number, min(number % 10, 3), number / 100) for number in range(400)]


def test_pictures_go_to_the_worst_and_to_every_class() -> None:
    chosen = choose(ROWS, 20, 100)
    assert len(chosen) == 100
    large = {index for index, big in chosen.items() if big}
    assert len(large) == 20
    assert large >= set(range(385, 400)), "the worst of the queue"
    assert {ROWS[index].labels for index in large} == {(0,), (1,), (2,), (3,)}
    others = sorted(index for index in chosen if index < 300)
    assert min(others) < 50, "some that need nobody, as the class usually is"
    assert set(range(325, 400)) <= set(chosen)


@pytest.mark.parametrize(("large", "small"), [(0, 0), (0, 7), (7, 0), (400, 400), (500, 9000)])
def test_pictures_are_bounded(large: int, small: int) -> None:
    chosen = choose(ROWS, large, small)
    assert sum(chosen.values()) == min(large, 400)
    assert len(chosen) == min(max(large, small), 400)


def test_with_ground_truth_the_lowest_scores_are_shown_too() -> None:
    known = [replace(one, miou=number / 400) for number, one in enumerate(ROWS)]
    chosen = choose(known, 20, 100)
    assert {index for index, big in chosen.items() if big} >= {*range(5), *range(390, 400)}
    assert set(chosen) >= {*range(20), *range(360, 400)}
    assert len(chosen) == 100


def test_what_cannot_be_shown_takes_no_place() -> None:
    rows = [*ROWS, row(400, 0, 0.0, "gone")]
    assert 400 not in choose(rows, 9, 9)
    assert choose([], 9, 9) == {}


def test_a_run_without_maps_of_these_images(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"a": (0,)}).run
    assert isinstance(run, Run)
    current = Freshness(run, CLASSES, cam={}, looks=None)
    assert measure([], run, CLASSES, 1.0, current, SHOWN)[0] == []
