from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clipes.errors import ArtifactError
from clipes.masks.scores import ConfusionMatrix
from clipes.masks.values import pairs_of, pixels_of, values_in
from clipes.types import IGNORE

N = 4
LABELS = st.sampled_from([*range(N), IGNORE])
MASKS = arrays(np.uint8, (3, 5), elements=LABELS)
PAIRS = st.lists(st.tuples(MASKS, MASKS), min_size=1, max_size=4)


def mask(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.uint8)


def matrix_of(pairs, n: int = N) -> ConfusionMatrix:
    matrix = ConfusionMatrix(n)
    for truth, prediction in pairs:
        matrix.update(truth, prediction)
    return matrix


def literal_scores(pairs):
    """The definitions, one pixel at a time, with sets of pixel positions."""
    true_at = {k: set() for k in range(N)}
    said_at = {k: set() for k in range(N)}
    with_truth = scored = right = 0
    for image, (truth, prediction) in enumerate(pairs):
        for place in np.ndindex(truth.shape):
            t, p = int(truth[place]), int(prediction[place])
            if t == 255:
                continue
            with_truth += 1
            if p == 255:
                continue
            scored += 1
            right += t == p
            true_at[t].add((image, place))
            said_at[p].add((image, place))
    iou = [
        len(true_at[k] & said_at[k]) / len(true_at[k] | said_at[k])
        if true_at[k] | said_at[k]
        else None
        for k in range(N)
    ]
    known = [value for value in iou if value is not None]
    return sum(known) / len(known), right / scored, scored / with_truth, iou


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_scores_equal_the_literal_definition(pairs):
    matrix = matrix_of(pairs)
    if not any(((t != 255) & (p != 255)).any() for t, p in pairs):
        with pytest.raises(ArtifactError, match="nothing to score"):
            matrix.scores()
        return
    miou, accuracy, coverage, iou = literal_scores(pairs)
    scores = matrix.scores()
    assert scores.iou == tuple(iou)
    assert math.isclose(scores.miou, miou, rel_tol=1e-12)
    assert scores.pixel_accuracy == accuracy
    assert scores.coverage == coverage
    assert scores.images == len(pairs)


@settings(max_examples=30, deadline=None)
@given(PAIRS, st.permutations(range(N)))
def test_renaming_the_classes_permutes_the_iou(pairs, order):
    rename = np.full(256, IGNORE, dtype=np.uint8)
    rename[:N] = order
    before = matrix_of(pairs).counts
    after = matrix_of([(rename[t], rename[p]) for t, p in pairs]).counts
    assert np.array_equal(after[np.ix_(order, order)], before)


@settings(max_examples=30, deadline=None)
@given(PAIRS, PAIRS)
def test_adding_matrices_equals_counting_everything_in_one(first, second):
    one, two = matrix_of(first), matrix_of(second)
    before = one.counts
    total, whole = one + two, matrix_of(first + second)
    assert np.array_equal(total.counts, whole.counts)
    assert total.images == whole.images
    assert np.array_equal(one.counts, before)
    if whole.counts.sum():
        assert total.scores() == whole.scores()


def test_rows_are_true_and_columns_predicted_labels():
    assert matrix_of([(mask([0, 0, 1]), mask([0, 1, 1]))], 2).counts.tolist() == [[1, 1], [0, 1]]


def test_absent_classes_are_none_and_outside_the_mean():
    scores = matrix_of([(mask([0, 0, 2, 2]), mask([0, 0, 2, 0]))]).scores()
    assert scores.iou == (2 / 3, None, 1 / 2, None)
    assert scores.miou == pytest.approx((2 / 3 + 1 / 2) / 2, rel=1e-15)


def test_a_class_that_is_only_predicted_counts_as_zero():
    assert matrix_of([(mask([0, 0]), mask([0, 3]))]).scores().iou == (1 / 2, None, None, 0.0)


def test_unlabelled_pixels_lower_the_coverage_and_nothing_else():
    sure = matrix_of([(mask([0, 1, 1]), mask([0, 1, 0]))]).scores()
    partly = matrix_of([(mask([0, 1, 1, 1]), mask([0, 1, 0, IGNORE]))]).scores()
    assert (partly.miou, partly.pixel_accuracy, partly.iou) == (
        sure.miou,
        sure.pixel_accuracy,
        sure.iou,
    )
    assert (sure.coverage, partly.coverage) == (1.0, 3 / 4)


def test_sizes_that_differ_are_named():
    with pytest.raises(ArtifactError, match="2 x 3 and the prediction 3 x 2"):
        ConfusionMatrix(N).update(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))


@pytest.mark.parametrize("swap", [False, True])
def test_labels_beyond_the_classes_are_named(swap):
    pair = (mask([0, 0, 0]), mask([N, 0, 254]))
    matrix = ConfusionMatrix(N)
    with pytest.raises(ArtifactError, match="label 4, 254, but there are 3 classes") as caught:
        matrix.update(*(pair[::-1] if swap else pair))
    assert ("ground truth" if swap else "prediction") in str(caught.value)
    assert matrix.counts.sum() == 0
    assert matrix.images == 0


def test_wrong_type_and_wrong_number_of_classes_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        ConfusionMatrix(N).update(mask([0]), np.array([[300]]))
    for n in (0, 256):
        with pytest.raises(ValueError, match="1 to 255"):
            ConfusionMatrix(n)
    with pytest.raises(ValueError, match="cannot add"):
        ConfusionMatrix(2) + ConfusionMatrix(3)


def test_all_254_classes_fit():
    every = np.arange(255, dtype=np.uint8)[None]
    matrix = ConfusionMatrix(255)
    matrix.update(every, every)
    assert matrix.scores().miou == 1.0


def test_counts_stay_exact_past_single_precision():
    matrix = ConfusionMatrix(2)
    truth = np.zeros((64, 64), np.uint8)
    truth[0, 0] = 1
    matrix.update(truth, truth)
    for _ in range(14):
        matrix += matrix
    assert matrix.counts.tolist() == [[4095 * 2**14, 0], [0, 2**14]]
    assert 4095 * 2**14 > 2**24


def test_ground_truth_scores_one_against_itself(shared):
    from clipes.disk.images import read_mask

    matrix = ConfusionMatrix(21)
    for path in sorted((shared / "data/voc_sample/SegmentationClassAug").iterdir())[:20]:
        truth = read_mask(path)
        matrix.update(truth, truth)
    scores = matrix.scores()
    assert (scores.miou, scores.pixel_accuracy, scores.coverage) == (1.0, 1.0, 1.0)


def test_large_masks_are_counted_by_rows_and_not_widened_whole() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice(np.array([0, 1, 3, IGNORE], np.uint8), (3000, 4000))
    said = rng.choice(np.array([0, 1, 2], np.uint8), (3000, 4000))
    tracemalloc.start()
    table, pixels = pairs_of(truth, said), pixels_of(truth)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 5 * truth.size  # bytes; 8 a pixel and more at once
    assert table.sum() == truth.size
    for t in (0, 1, 3, IGNORE):
        assert pixels[t] == (truth == t).sum()
        for p in (0, 1, 2):
            assert table[t, p] == ((truth == t) & (said == p)).sum()
    assert values_in(truth) == (0, 1, 3)
