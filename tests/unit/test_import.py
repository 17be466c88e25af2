"""Masks that come back from a tool: the same masks, one line for each image that cannot be read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from clipes.disk.images import read_mask, write_mask
from clipes.errors import ClipesError, DatasetError
from clipes.formats import READERS, Options
from clipes.run.folder import Run
from clipes.run.origin import CorrectionOrigin
from clipes.run.reopen import reopen
from clipes.stages.evaluate import evaluate_run
from clipes.stages.export import ExportRequest, export
from clipes.stages.import_masks import AS_IT_WAS, ImportRequest, import_masks
from clipes.stages.report import ReportRequest, make_report
from clipes.stages.train_examples import training_pairs
from clipes.stages.train_request import Sources
from clipes.types import IGNORE, PseudoLabel
from tests.export_support import (
    CLASSES,
    MU,
    SIZES,
    Exporter,
    make_confidence,
    make_export_run,
    make_masks,
    only_sure,
)
from tests.heard import Heard
from tests.report_support import make_run

ROUND_TRIPS = [
    ("coco", {}),
    ("coco", {"components": True}),
    ("coco", {"polygons": True}),
    ("labelme", {}),
    ("cvat", {}),
    ("cvat", {"components": True}),
    ("voc", {}),
    ("voc", {"grey": True}),
]


@pytest.fixture
def masks() -> dict[str, np.ndarray]:
    return make_masks()


@pytest.fixture
def run(tmp_path: Path, masks: dict) -> Run:
    return make_export_run(tmp_path, masks, make_confidence())


@pytest.fixture
def do(run: Run) -> Exporter:
    return Exporter(run)


def bring(run: Run, name: str, path: Path, by: str = "ann") -> tuple[Heard, int]:
    heard = Heard()
    _, summary = import_masks(ImportRequest(name, path, by), run, heard.listener)
    return heard, summary.done


@pytest.mark.parametrize(("name", "options"), ROUND_TRIPS, ids=str)
@pytest.mark.parametrize("mu", [None, MU])
def test_export_and_import_change_nothing(
    do: Exporter, run: Run, masks: dict, name: str, options: dict, mu: float | None
) -> None:
    folder = do(name, confidence=mu, **options)
    heard, done = bring(run, name, folder)
    assert (heard.failures, done) == ([], len(SIZES))
    expected = only_sure(masks, make_confidence()) if mu else masks
    for id_, mask in expected.items():
        pseudo = run.corrected.load_pseudo(id_)
        np.testing.assert_array_equal(pseudo.mask, mask)
        assert (pseudo.confidence == 1).all()
        origin = CorrectionOrigin.of_file(run.corrected.pseudo_path(id_))
        assert origin is not None
        assert (origin.by, origin.tool) == ("ann", name)


@pytest.mark.parametrize(("name", "options"), ROUND_TRIPS, ids=str)
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mask=hnp.arrays(np.uint8, SIZES["odd"], elements=st.sampled_from([0, 0, 1, 2, 4, IGNORE])))
def test_any_mask_comes_back(
    do: Exporter, run: Run, name: str, options: dict, mask: np.ndarray
) -> None:
    run.save_pseudo("odd", PseudoLabel(mask, np.ones(mask.shape, np.float32)))
    folder = do(name, **options)
    found = {Path(one.name).stem: one for one in READERS[name](folder, CLASSES)}
    np.testing.assert_array_equal(found["odd"].draw(SIZES["odd"]), mask)


def edit_coco(folder: Path, change: Callable[[dict], None]) -> Path:
    path = folder / "instances.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content))
    return path


def edit_labelme(folder: Path, name: str, change: Callable[[dict], None]) -> None:
    path = folder / f"{name}.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content))


def test_what_is_wrong_in_coco_is_told_and_the_rest_read(do: Exporter, run: Run) -> None:
    def change(content: dict) -> None:
        images = {Path(image["file_name"]).stem: image for image in content["images"]}
        images["one"]["file_name"] = "elsewhere.png"
        images["row"]["height"] = 2
        odd = [e for e in content["annotations"] if e["image_id"] == images["odd"]["id"]]
        odd[0]["segmentation"] = [[0, 0, 70, 0, 70, 5]]

    path = edit_coco(do("coco"), change)
    heard, done = bring(run, "coco", path)
    assert done == 2
    reasons = {failure.id: failure.reason for failure in heard.failures}
    assert "no image of the run is called that" in reasons["elsewhere.png"]
    assert "it is 2 x 9 in the file, the picture 1 x 9" in reasons["row"]
    assert "a corner at 70, 0, outside the picture of 7 x 5" in reasons["odd"]


def test_an_unknown_class_is_told(do: Exporter, run: Run) -> None:
    def change(content: dict) -> None:
        content["categories"][1]["name"] = "wolf"

    heard, _ = bring(run, "coco", edit_coco(do("coco"), change))
    assert {failure.reason.split(";")[0] for failure in heard.failures} == {
        "the label 'wolf' is none of the run's classes"
    }


def test_what_is_wrong_in_labelme_is_told(do: Exporter, run: Run) -> None:
    folder = do("labelme")
    edit_labelme(folder, "odd", lambda it: it["shapes"][0].update(shape_type="circle"))
    edit_labelme(folder, "row", lambda it: it["shapes"][0].update(points=[[0, 0], [99, 0], [0, 1]]))
    (folder / "one.json").write_text("{")
    heard, done = bring(run, "labelme", folder)
    reasons = {failure.id: failure.reason for failure in heard.failures}
    assert "cannot read the labelme file" in reasons["one"]
    assert "has a circle of" in reasons["odd"]
    assert "a corner at 99, 0, outside the picture" in reasons["row"]
    assert done == 2


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('label="bus"', 'label="tram"', "the label 'tram' is none"),
        ('rle="', 'rle="9, ', "do not fill its box"),
        ('left="0"', 'left="90"', "reaches out of the picture"),
        ("<mask ", '<polyline points="1,1;2,2" ', "a shape is a polyline"),
    ],
)
def test_what_is_wrong_in_cvat_is_told(
    do: Exporter, run: Run, old: str, new: str, reason: str
) -> None:
    path = do("cvat") / "annotations.xml"
    lines = path.read_text("utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if 'name="odd.png"' in line)
    assert old in lines[at]
    lines[at] = lines[at].replace(old, new, 1)
    path.write_text("\n".join(lines), "utf-8")
    heard, done = bring(run, "cvat", path)
    (failure,) = heard.failures
    assert failure.id == "odd"
    assert reason in failure.reason
    assert done == len(SIZES) - 1


def test_cvat_polygons_and_boxes_are_painted_by_z_order(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "annotations.xml"
    path.write_text(
        '<annotations><image name="holes.png" width="31" height="23">'
        '<box label="bus" xtl="2" ytl="3" xbr="6" ybr="5" z_order="1"/>'
        '<polygon label="Käse 猫" points="0,0;10,0;10,10;0,10" z_order="0"/>'
        "<tag label='bus'/></image></annotations>",
        "utf-8",
    )
    heard, done = bring(run, "cvat", path)
    assert (heard.failures, done) == ([], 1)
    mask = run.corrected.load_pseudo("holes").mask
    expected = np.zeros(SIZES["holes"], np.uint8)
    expected[:10, :10] = 3
    expected[3:5, 2:6] = 4
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("angle", "rows", "columns"), [(0, (8, 12), (2, 20)), (90, (1, 19), (9, 13))]
)
def test_a_box_of_cvat_is_painted_as_it_is_turned(
    run: Run, tmp_path: Path, angle: int, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    path = tmp_path / "annotations.xml"
    path.write_text(
        '<annotations><image name="holes.png" width="31" height="23">'
        f'<box label="bus" xtl="2" ytl="8" xbr="20" ybr="12" rotation="{angle}.0"/>'
        "</image></annotations>"
    )
    heard, done = bring(run, "cvat", path)
    assert (heard.failures, done) == ([], 1)
    expected = np.zeros(SIZES["holes"], np.uint8)
    expected[slice(*rows), slice(*columns)] = 4
    np.testing.assert_array_equal(run.corrected.load_pseudo("holes").mask, expected)


def test_an_entity_in_xml_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "annotations.xml"
    path.write_text('<!DOCTYPE a [<!ENTITY b "c">]><annotations>&b;</annotations>')
    with pytest.raises(DatasetError, match="cannot read"):
        bring(run, "cvat", path)


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_such_file_is_one_error(run: Run, tmp_path: Path, name: str) -> None:
    junk = tmp_path / "junk"
    junk.mkdir()
    with pytest.raises(ClipesError):
        bring(run, name, junk)
    assert not run.corrected.root.exists()


def test_a_box_of_cvat_is_turned_clockwise(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "annotations.xml"
    path.write_text(
        '<annotations><image name="holes.png" width="31" height="23">'
        '<box label="bus" xtl="2" ytl="9" xbr="20" ybr="11" rotation="45.0"/></image></annotations>'
    )
    bring(run, "cvat", path)
    mask = run.corrected.load_pseudo("holes").mask
    assert (mask[14, 15], mask[5, 15]) == (4, 0)


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        ("cat/1.png", "cat_1"),
        ("cat\\1.png", "cat_1"),
        ("task 7/photos/dog/1.png", "dog_1"),
        ("dog/1", "dog_1"),
        ("dog_1", "dog_1"),
        ("2.png", "cat_2"),
        ("2.jpg", "cat_2"),
        ("photos/cat/2.jpg", "cat_2"),
        ("JPEGImages/cat_2.jpg", "cat_2"),
        ("elsewhere/2.jpg", None),  # maybe a folder of images that are not in the run
        ("dog/2.png", None),  # an image that is not there, not its namesake
        ("task 7/dog/2", None),
        ("1.png", None),
        ("../..", None),
        ("", None),
    ],
)
def test_an_image_is_known_by_what_tools_call_it(
    tmp_path: Path, name: str, id_: str | None
) -> None:
    run = photo_run(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png")
    heard, _ = bring(run, "cvat", boxed(tmp_path, {name: "dog"}))
    assert run.corrected.ids("pseudo") == ([id_] if id_ else [])
    assert bool(heard.failures) == (id_ is None)


def photo_run(tmp_path: Path, *paths: str) -> Run:
    """A run on photos of 3 x 2 in folders called after their class."""
    root = tmp_path / "photos"
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(root / path)
    (root / "labels.json").write_text(json.dumps({path: ["cat"] for path in paths}))
    run = Run(tmp_path / "run")
    known = {"dataset": "folder", "split": None, "labels": None, "classes": ["cat", "dog"]}
    run.begin("cam", known, "clipes cam", {"root": str(root)})
    return run


def boxed(tmp_path: Path, names: dict[str, str]) -> Path:
    """An annotations.xml that says of each picture what the whole of it shows."""
    path = tmp_path / "annotations.xml"
    box = '<box label="{}" xtl="0" ytl="0" xbr="3" ybr="2"/>'
    images = (f'<image name="{name}">{box.format(label)}</image>' for name, label in names.items())
    path.write_text(f"<annotations>{''.join(images)}</annotations>")
    return path


@pytest.mark.parametrize(
    ("photos", "stranger", "whole", "id_"),
    [
        (("cat/my 2.png",), "dog/my 2.jpg", "cat/my 2.png", "cat_my 2"),
        (("cat/my 2.png",), "dog/my 2.jpg", "my 2.png", "cat_my 2"),
        (("cat/1.png", "bird/2.png"), "1.png", "task 7/cat/1.png", "cat_1"),
        (("1.png", "2.png"), "dog/1.png", "1.png", "1"),
        (("day1/cam/1.png", "day1/side/2.png"), "day2/cam/1.png", "cam/1.png", "day1_cam_1"),
        (("1.png", "cat/2.png"), "cat/1.png", "1.png", "1"),
    ],
)
def test_a_namesake_in_another_folder_is_another_image(
    tmp_path: Path, photos: tuple[str, ...], stranger: str, whole: str, id_: str
) -> None:
    run = photo_run(tmp_path, *photos)
    heard, done = bring(run, "cvat", boxed(tmp_path, {stranger: "dog", whole: "cat"}))
    assert ([failure.id for failure in heard.failures], done) == ([stranger], 1)
    assert (run.corrected.load_pseudo(id_).mask == 1).all()


def test_an_export_is_read_back_where_folders_have_namesakes(tmp_path: Path) -> None:
    run = photo_run(tmp_path, "a/1.png", "a/b/1.png", "a/a/1.png")
    for sample in reopen(run, None).samples:
        run.save_pseudo(sample.id, PseudoLabel(np.ones((2, 3), np.uint8), np.ones((2, 3), "f4")))
    _, done = bring(run, "cvat", Exporter(run)("cvat"))
    assert (run.corrected.ids("pseudo"), done) == (["a_1", "a_a_1", "a_b_1"], 3)


# What uses them


def test_export_prefers_them(do: Exporter, run: Run, masks: dict) -> None:
    folder = do("voc")
    mine = np.full(SIZES["odd"], 2, np.uint8)
    write_mask(folder / "SegmentationClassAug" / "odd.png", mine)
    bring(run, "voc", folder)
    out = do("voc", folder.with_name("again"))
    np.testing.assert_array_equal(read_mask(out / "SegmentationClassAug" / "odd.png"), mine)
    request = ExportRequest("voc", None, folder.with_name("own"), Options(), "", False)
    own, _ = export(request, run, Heard().listener)
    np.testing.assert_array_equal(read_mask(own / "SegmentationClassAug" / "odd.png"), masks["odd"])


def test_what_came_back_as_it_was_is_corrected_and_counted(do: Exporter, run: Run) -> None:
    folder = do("voc")
    mended = folder / "SegmentationClassAug" / "odd.png"
    write_mask(mended, np.full(SIZES["odd"], 2, np.uint8))
    request = ImportRequest("voc", folder, "ann")
    _, summary = import_masks(request, run, Heard().listener)
    assert summary.done == len(SIZES)
    assert summary.remarks == {AS_IT_WAS: len(SIZES) - 1}
    assert set(run.corrected.ids("pseudo")) == set(SIZES)
    # The mask that counts now is the corrected one.
    _, again = import_masks(request, run, Heard().listener)
    assert again.remarks == {AS_IT_WAS: len(SIZES)}
    write_mask(mended, run.load_pseudo("odd").mask)
    _, back = import_masks(request, run, Heard().listener)
    assert back.remarks == {AS_IT_WAS: len(SIZES) - 1}


def test_a_mask_that_cannot_be_read_is_not_what_came_back(do: Exporter, run: Run) -> None:
    folder = do("voc")
    run.pseudo_path("odd").write_bytes(b"no picture")
    run.pseudo_path("row").unlink()
    _, summary = import_masks(ImportRequest("voc", folder, "ann"), run, Heard().listener)
    assert (summary.done, summary.remarks) == (len(SIZES), {AS_IT_WAS: len(SIZES) - 2})


def test_a_picture_that_was_replaced_is_told(do: Exporter, run: Run) -> None:
    bring(run, "voc", do("voc"))
    picture = Path(run.stage("cam")["facts"]["root"]) / "odd.png"
    picture.write_bytes(picture.read_bytes() + b" ")
    with pytest.raises(AssertionError):
        do("coco")
    assert "corrected on another picture of that name" in do.failures[0].reason


def test_training_report_and_eval_prefer_them(tmp_path: Path) -> None:
    made = make_run(tmp_path, {"a": (0,), "b": (1,), "c": (2,)})
    run, heard = made.run, Heard()
    folder = tmp_path / "mended"
    write_mask(folder / "b.png", made.truth["b"])
    write_mask(folder / "c.png", made.pseudo["c"].mask)
    bring(run, "voc", folder, by="bea")
    data = reopen(run, None)
    pairs = {
        pair.id: pair for pair in training_pairs(Sources(run, run), data, guided=True, say=print)
    }
    assert pairs["b"].mask == run.corrected.pseudo_path("b")
    assert pairs["b"].confidence == run.corrected.confidence_path("b")
    assert pairs["a"].mask == run.pseudo_path("a")
    own = training_pairs(Sources(run, run, use_corrected=False), data, guided=True, say=print)
    assert {pair.mask for pair in own} == {run.pseudo_path(id_) for id_ in "abc"}
    stages = evaluate_run(run, None, None, [1.0], heard.listener).stages
    assert stages["CRF, corrected"].miou > stages["CRF"].miou
    page, failures = make_report(ReportRequest(workers=1), run, heard.listener)
    assert not failures
    queue = (page.parent / "review.csv").read_text("utf-8")
    assert [line.split(",")[1] for line in queue.splitlines()[1:]].count("b") == 0
    assert len(queue.splitlines()) == 2
    text = page.read_text("utf-8")
    assert "corrected by bea, 20" in text
    kept = 100 * (made.truth["b"] == made.pseudo["b"].mask).mean()
    assert f"{kept:.1f} % of the pixels are as before" in text
    assert re.search("seen by bea, [-0-9]{10}, and left as it was", text)
    assert "Corrected mask" in text
    make_report(ReportRequest(workers=1, use_corrected=False), run, heard.listener)
    assert len((page.parent / "review.csv").read_text("utf-8").splitlines()) == 4
