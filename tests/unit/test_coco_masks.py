from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipes.datasets import COCO_CLASSES, open_dataset
from clipes.datasets.outlines import (
    decode_runs,
    draw,
    fill_polygon,
    fill_runs,
    parse_outline,
)
from clipes.errors import ClipesError, DatasetError
from clipes.images import read_mask
from clipes.stages import masks
from clipes.types import Failure
from tests.unit.coco_support import (
    CATEGORY_IDS,
    annotation,
    picture,
    write_image,
    write_instances,
)

some = settings(max_examples=80, deadline=None)


def inside_literally(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Count, for each pixel's centre, the sides that a ray to its left crosses."""
    mask = np.zeros(size, bool)
    for row, column in np.ndindex(size):
        x, y = column + 0.5, row + 0.5
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
            if (y0 <= y) != (y1 <= y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x:
                mask[row, column] ^= True
    return mask


@some
@given(
    st.lists(st.tuples(st.integers(-20, 90), st.integers(-20, 70)), min_size=3, max_size=12).map(
        lambda corners: np.array(corners, np.float64) / 8
    ),
)
def test_polygons_are_filled_by_pixel_centres(points):
    size = (7, 9)
    expected = inside_literally(points, size)
    assert np.array_equal(fill_polygon(points.astype(np.float32), size), expected)


def test_a_square_covers_its_pixels_and_no_more():
    mask = fill_polygon(np.array([[2, 1], [6, 1], [6, 4], [2, 4]], np.float32), (6, 9))
    expected = np.zeros((6, 9), bool)
    expected[1:4, 2:6] = True
    assert np.array_equal(mask, expected)


def encode_runs(mask: np.ndarray) -> tuple[list[int], str]:
    """COCO's run lengths of a mask, as a list and as text; the reverse of what is tested."""
    pixels = mask.T.ravel().astype(int)
    starts = [0, *(np.flatnonzero(np.diff(pixels)) + 1), len(pixels)]
    runs = np.diff(starts).tolist()
    runs = [0, *runs] if pixels[0] else runs
    text = ""
    for index, run in enumerate(runs):
        number = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            group = number & 31
            number >>= 5
            more = number != (-1 if group & 16 else 0)
            text += chr(48 + group + 32 * more)
    return runs, text


@some
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_run_lengths_come_back(height, width, data):
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    runs, text = encode_runs(mask)
    assert decode_runs(text).tolist() == runs
    assert np.array_equal(fill_runs(np.array(runs), mask.shape), mask)


def test_run_lengths_as_pycocotools_writes_them():
    # Written by pycocotools 2.0.11: encode(asfortranarray(mask)), counts as text.
    mask = np.zeros((30, 50), np.uint8)
    mask[3:25, 5:45] = 1
    mask[10:12, 20:22] = 0
    assert np.array_equal(fill_runs(decode_runs(PYCOCOTOOLS), mask.shape), mask.astype(bool))


PYCOCOTOOLS = (
    "i4f080000000000000000000000000000AJ66JJ66900000000000000000000000000000000000000000000c4"
)


@pytest.mark.parametrize(
    "outline",
    [
        None,
        "text",
        [],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 5, 1e9]],
        [3],
        {"counts": None},
        {"counts": [1, -1]},
        {"counts": [1.5]},
        {"counts": "\x00"},
        {"counts": "PPPPPPPPPPPPPPPPPP"},
        {"counts": "P"},
        {"counts": "O"},
    ],
)
def test_malformed_outlines_are_named(outline):
    with pytest.raises(DatasetError, match="cannot be drawn"):
        parse_outline({"segmentation": outline}, 1)
    with pytest.raises(DatasetError, match="run lengths of 5 pixels for 2 x 3"):
        draw([parse_outline({"segmentation": {"counts": [2, 3]}}, 1)], (2, 3))


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.just("counts"), inner),
    max_leaves=12,
)


@some
@given(JSONS, JSONS, st.sampled_from([0, 1, None]))
def test_no_outline_raises_anything_else(outline, area, crowd):
    entry = {"segmentation": outline, "area": area, "iscrowd": crowd}
    with suppress(ClipesError):
        assert draw([parse_outline(entry, 7)], (5, 6)).shape == (5, 6)


def test_small_objects_lie_above_and_crowds_below():
    table = {"segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]], "area": 100}
    book = {"segmentation": [[2, 2, 5, 2, 5, 5, 2, 5]], "area": 9.0}
    crowd = {"segmentation": {"counts": [0, 200]}, "area": 1, "iscrowd": 1}
    for order in ((table, book, crowd), (crowd, book, table)):
        values = {id(table): 3, id(book): 2, id(crowd): 1}
        mask = draw([parse_outline(entry, values[id(entry)]) for entry in order], (10, 20))
        assert (mask[2:5, 2:5] == 2).all()
        assert (mask[:, 10:] == 255).all()
        assert (mask == 3).sum() == 91


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    images = [picture(k) for k in (1, 2, 3, 4)]
    objects = [
        annotation(1, CATEGORY_IDS[0]),
        annotation(2, CATEGORY_IDS[79], {"size": [24, 32], "counts": [0, 24, 744]}),
        annotation(1, CATEGORY_IDS[1], [[4, 4, 6, 4, 6, 6, 4, 6]], area=4),
        annotation(3, CATEGORY_IDS[2], [[1, 2]]),
    ]
    path = tmp_path / "annotations/instances_train2014.json"
    write_instances(path, images, objects)
    for item in images:
        write_image(tmp_path / "train2014" / item["file_name"])
    return tmp_path


@pytest.mark.parametrize("at_once", [1, 100])
def test_masks_are_drawn_where_the_data_set_looks(coco, monkeypatch, at_once):
    monkeypatch.setattr(masks, "_IMAGES_AT_ONCE", at_once)
    told: list[Failure] = []
    steps: list[tuple[int, int]] = []

    def draw_all():
        return masks.draw_coco_masks(
            coco, None, progress=lambda *step: steps.append(step), report=told.append
        )

    folder, summary = draw_all()
    assert folder == coco / "SegmentationClass"
    assert (summary.done, summary.skipped, len(summary.failures)) == (2, 0, 1)
    assert [failure.id for failure in told] == ["COCO_train2014_000000000003"]
    assert "at least three corners" in told[0].reason
    assert steps[-1] == (3, 3)
    samples = open_dataset("coco", root=coco).samples
    first, second = (read_mask(sample.mask) for sample in samples[:2])
    expected = np.zeros((24, 32), np.uint8)
    expected[1:9, 1:9] = 1
    expected[4:6, 4:6] = 2
    assert np.array_equal(first, expected)
    assert np.array_equal(np.unique(second[:, 0]), [80])
    assert second[:, 1:].max() == 0
    assert samples[2].mask is None
    assert draw_all()[1].skipped == 2


def test_masks_need_an_instances_file(coco):
    (coco / "annotations/instances_train2014.json").unlink()
    (coco / "labels.txt").write_text("1 0\n")
    with pytest.raises(DatasetError, match="no instances file in"):
        masks.draw_coco_masks(coco, None, progress=lambda *_: None, report=lambda _: None)


def test_an_image_of_unknown_size_is_a_failure(coco):
    images = [{"id": 1, "file_name": "1.jpg"}, {**picture(2), "height": 10**6, "width": 10**6}]
    objects = [annotation(1, 1), annotation(2, 1), annotation(2, 99)]
    path = write_instances(coco / "i.json", images, objects)
    data = open_dataset("coco", root=coco, labels=path)
    summary = masks.draw_masks(
        [path], data.samples, COCO_CLASSES, coco / "out", lambda *_: None, lambda _: None
    )
    assert [failure.reason for failure in summary.failures] == [
        f"{path} does not say how large it is"
    ]
