from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as tools

from clipes.datasets import COCO_CLASSES, open_dataset
from clipes.datasets.outlines import MOST_PIXELS, decode_runs, draw, encode_runs, parse_outline
from clipes.disk.images import read_mask, write_mask
from clipes.errors import ClipesError, DatasetError
from clipes.listener import Listener
from clipes.stages import coco_masks as masks
from tests.heard import Heard
from tests.unit.coco_support import (
    CATEGORY_IDS,
    annotation,
    picture,
    write_image,
    write_instances,
)

some = settings(max_examples=80, deadline=None)


def drawn(outline: object, size: tuple[int, int]) -> np.ndarray:
    """Where one object is."""
    return draw([parse_outline({"segmentation": outline}, 1, size)], size) == 1


def distance_to_sides(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """For each pixel's centre, how far the nearest side of a polygon is."""
    nearest = np.full(size, np.inf)
    for row, column in np.ndindex(size):
        centre = np.array([column + 0.5, row + 0.5])
        for start, end in zip(points, np.roll(points, -1, 0), strict=True):
            way = end - start
            part = np.clip((centre - start) @ way / max(way @ way, 1e-9), 0, 1)
            nearest[row, column] = min(
                nearest[row, column], np.linalg.norm(start + part * way - centre)
            )
    return nearest


def inside_literally(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Count, for each pixel's centre, the sides that a ray to its left crosses."""
    mask = np.zeros(size, bool)
    for row, column in np.ndindex(size):
        x, y = column + 0.5, row + 0.5
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
            if (y0 <= y) != (y1 <= y) and x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x:
                mask[row, column] ^= True
    return mask


corners = st.lists(st.tuples(st.integers(-20, 90), st.integers(-20, 70)), min_size=3, max_size=12)


@some
@given(corners.map(lambda corners: np.array(corners, np.float64) / 8))
def test_polygons_are_filled_by_pixel_centres_but_for_those_on_the_outline(points):
    # pycocotools moves corners to fifths of a pixel and rounds where sides cross a column.
    size = (7, 9)
    differs = drawn([points.ravel().tolist()], size) != inside_literally(points, size)
    assert (distance_to_sides(points, size)[differs] < 1).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # its own
@some
@given(st.lists(corners, min_size=1, max_size=3), st.floats(-2, 2))
def test_polygons_are_those_of_pycocotools(shapes, shift):
    size = (7, 9)
    polygons = [(np.array(shape) / 8 + shift).ravel().tolist() for shape in shapes]
    encoded = tools.merge(tools.frPyObjects(polygons, *size))
    expected = tools.decode(encoded) == 1
    assert np.array_equal(drawn(polygons, size), expected)
    assert np.array_equal(drawn({"counts": encoded["counts"].decode()}, size), expected)


def test_a_square_covers_its_pixels_and_no_more():
    expected = np.zeros((6, 9), bool)
    expected[1:4, 2:6] = True
    assert np.array_equal(drawn([[2, 1, 6, 1, 6, 4, 2, 4]], (6, 9)), expected)
    both = drawn([[2, 1, 6, 1, 6, 4, 2, 4], [3.0, 2, 8, 2, 8, 3, 3, 3]], (6, 9))
    expected[2, 3:8] = True
    assert np.array_equal(both, expected), "an object of several polygons is their union"


@pytest.mark.parametrize("far", [-(10**5), 10**5])
def test_what_lies_outside_the_picture_is_cut_off(far):
    assert not drawn([[far, far, far + 9, far, far + 9, far + 9]], (6, 9)).any()
    wide = drawn([[-3.0, 2.0, far, 2, far, 4, -3.0, 4]], (6, 9))
    assert wide[2:4].all() == (far > 0)
    assert wide.sum() in (0, 18)


def runs_literally(mask: np.ndarray) -> tuple[list[int], str]:
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
    runs, text = runs_literally(mask)
    assert decode_runs(text).tolist() == runs
    assert encode_runs(np.array(runs), mask.shape) == text
    for counts in (runs, text, [0, 0, *runs]):
        assert np.array_equal(drawn({"size": [9, 9], "counts": counts}, mask.shape), mask)


def test_run_lengths_of_a_large_picture_come_back():
    mask = np.zeros((4000, 5000), bool)
    mask[:, 4000:4900] = True
    mask[7, 4100] = False
    runs, text = runs_literally(mask)
    assert decode_runs(text).tolist() == runs
    for counts in (runs, text):
        assert np.array_equal(drawn({"counts": counts}, mask.shape), mask)


@pytest.mark.parametrize(
    ("outline", "reason"),
    [
        (None, "neither a list of polygons nor run lengths"),
        ("text", "neither a list of polygons nor run lengths"),
        ([], "neither a list of polygons nor run lengths"),
        ([[1, 2, 3, 4]], "at least three corners"),
        ([[1, 2, 3, 4, 5, 6, 7]], "at least three corners"),
        ([[1, 2, 3, 4, 5, float("nan")]], "at least three corners"),
        ([[1, 2, 3, 4, 5, float("inf")]], "at least three corners"),
        ([[1, 2, 3, 4, 5, 1e9]], "at least three corners"),
        ([[1, 2, 3, 4, 5, 10**400]], "at least three corners"),
        ([[1, 2, 3, 4, 5, True]], "at least three corners"),
        ([[1, 2, 9, 4, 5, 8], [1, 2]], "at least three corners"),
        ([3], "at least three corners"),
        ([{"counts": [6]}], "at least three corners"),
        ([[-9e5, -9e5, 9e5, 9e5] * 2], "a polygon is 7200000 pixels long"),
        ([[1, 1] * 2_000_001], "a polygon is 2000001 pixels long"),
        ({}, "damaged run lengths"),
        ({"counts": None}, "damaged run lengths"),
        ({"counts": [1.5, 4.5]}, "damaged run lengths"),
        ({"counts": [True, 5]}, "damaged run lengths"),
        ({"counts": [2**64, 6 - 2**64]}, "damaged run lengths"),
        ({"counts": ""}, "damaged run lengths"),
        ({"counts": "\x00"}, "damaged run lengths"),
        ({"counts": "6\n"}, "damaged run lengths"),
        ({"counts": "6é"}, "damaged run lengths"),
        ({"counts": "\udc80"}, "damaged run lengths"),
        ({"counts": "PPPPPPPPPPPPPPPPPP"}, "damaged run lengths"),
        ({"counts": "PPPPPP0"}, "damaged run lengths"),
        ({"counts": "6P"}, "damaged run lengths"),
        ({"counts": [7, -1]}, "negative run lengths"),
        ({"counts": "7O"}, "negative run lengths"),
        ({"counts": [2, 3]}, "run lengths of 5 pixels for 2 x 3"),
        ({"counts": [2, 5]}, "run lengths of 7 pixels for 2 x 3"),
        ({"counts": []}, "run lengths of 0 pixels for 2 x 3"),
        ({"counts": "5"}, "run lengths of 5 pixels for 2 x 3"),
        ({"counts": "7"}, "run lengths of 7 pixels for 2 x 3"),
        ({"counts": "PPPPP?"}, "run lengths of 503316480 pixels for 2 x 3"),
        ({"counts": [0] * 50}, "more run lengths than pixels"),
        ({"counts": "0" * 50}, "more run lengths than pixels"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_malformed_outlines_are_named_before_they_are_drawn(outline, reason):
    with pytest.raises(DatasetError, match=f"an outline cannot be drawn: .*{reason}"):
        parse_outline({"segmentation": outline}, 1, (2, 3))


def test_polygons_in_a_picture_too_large_for_pycocotools_are_refused():
    size = (MOST_PIXELS + 1, 1)
    with pytest.raises(DatasetError, match="83886080 x 1 pixels are more than 83886079"):
        parse_outline({"segmentation": [[1, 1, 9, 1, 9, 9]]}, 1, size)
    assert parse_outline({"segmentation": {"counts": [size[0]]}}, 1, size).runs.tolist() == [
        size[0]
    ]


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
        assert draw([parse_outline(entry, 7, (5, 6))], (5, 6)).shape == (5, 6)


def test_small_objects_lie_above_and_crowds_below():
    table = {"segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]], "area": 100}
    book = {"segmentation": [[2, 2, 5, 2, 5, 5, 2, 5]], "area": 9.0}
    crowd = {"segmentation": {"counts": [0, 200]}, "area": 1, "iscrowd": 1}
    for order in ((table, book, crowd), (crowd, book, table)):
        values = {id(table): 3, id(book): 2, id(crowd): 1}
        size = (10, 20)
        mask = draw([parse_outline(entry, values[id(entry)], size) for entry in order], size)
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
    heard = Heard()
    folder, summary = masks.draw_coco_masks(coco, None, heard.listener)
    told = heard.failures
    assert folder == coco / "SegmentationClass"
    assert (summary.done, summary.skipped, len(summary.failures)) == (2, 0, 1)
    assert [failure.id for failure in told] == ["COCO_train2014_000000000003"]
    assert "at least three corners" in told[0].reason
    assert heard.steps["masks"][-1] == (3, 3)
    samples = open_dataset("coco", root=coco).samples
    first, second = (read_mask(sample.mask) for sample in samples[:2])
    expected = np.zeros((24, 32), np.uint8)
    expected[1:9, 1:9] = 1
    expected[4:6, 4:6] = 2
    assert np.array_equal(first, expected)
    assert np.array_equal(np.unique(second[:, 0]), [80])
    assert second[:, 1:].max() == 0
    assert samples[2].mask is None
    assert masks.draw_coco_masks(coco, None, heard.listener)[1].skipped == 2
    assert heard.said == []


def again(coco: Path) -> tuple[masks.Summary, list[str]]:
    heard = Heard()
    _, summary = masks.draw_coco_masks(coco, None, heard.listener)
    return summary, heard.said


def test_masks_of_other_annotations_are_drawn_again(coco):
    again(coco)
    path = coco / "annotations/instances_train2014.json"
    first, second = (coco / f"SegmentationClass/COCO_train2014_{k:012d}.png" for k in (1, 2))
    images = [picture(k) for k in (1, 2, 3, 4)]
    objects = [annotation(1, CATEGORY_IDS[4]), annotation(2, 1, [[1, 2]]), annotation(3, 1)]
    write_instances(path, images, objects)
    summary, said = again(coco)
    assert (summary.done, summary.skipped, said) == (2, 0, [])
    assert [failure.id for failure in summary.failures] == [second.stem]
    assert np.unique(read_mask(first)).tolist() == [0, 5]
    assert not second.exists()  # what it showed is not in the annotations any more
    assert again(coco)[0].skipped == 2


def test_categories_are_the_classes_in_whatever_spelling(coco):
    path = coco / "annotations/instances_train2014.json"
    write_instances(path, [picture(1)], [annotation(1, CATEGORY_IDS[0])], ["Traffic_Light"])
    summary, _ = again(coco)
    assert (summary.done, summary.failures) == (1, ())
    (sample,) = open_dataset("coco", root=coco).samples
    assert [COCO_CLASSES[label] for label in sample.labels] == ["traffic light"]
    assert np.unique(read_mask(sample.mask)).tolist() == [0, sample.labels[0] + 1]


def test_masks_that_were_not_drawn_here_are_kept_and_said(coco):
    again(coco)
    first, third = (coco / f"SegmentationClass/COCO_train2014_{k:012d}.png" for k in (1, 3))
    mine = np.full((24, 32), 7, np.uint8)
    write_mask(first, mine)
    write_mask(third, mine, origin="made otherwise")
    path = coco / "annotations/instances_train2014.json"
    path.write_text(path.read_text() + " ")
    summary, said = again(coco)
    assert (summary.done, summary.skipped) == (1, 2)
    assert (read_mask(first) == 7).all()
    assert (read_mask(third) == 7).all()
    assert said[0].startswith("2 of 3 masks do not say what they were drawn from and are kept")


def test_masks_need_an_instances_file(coco):
    (coco / "annotations/instances_train2014.json").unlink()
    (coco / "labels.txt").write_text("1 0\n")
    with pytest.raises(DatasetError, match="no instances file in"):
        masks.draw_coco_masks(coco, None, Listener())


def test_an_image_of_unknown_size_is_a_failure(coco):
    images = [{"id": 1, "file_name": "1.jpg"}, {**picture(2), "height": 10**6, "width": 10**6}]
    objects = [annotation(1, 1), annotation(2, 1), annotation(2, 99)]
    path = write_instances(coco / "i.json", images, objects)
    data = open_dataset("coco", root=coco, labels=path)
    summary = masks.draw_masks([path], data.samples, COCO_CLASSES, coco / "out", Listener())
    assert [failure.reason for failure in summary.failures] == [
        f"{path} does not say how large it is"
    ]
