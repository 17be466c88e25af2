"""Every format is read back, by its own reader where there is one, and gives the masks again."""

from __future__ import annotations

import io
import json
import os
import pickletools
import xml.sax.saxutils
from pathlib import Path

import numpy as np
import pytest
from defusedxml import ElementTree
from hypothesis import given
from PIL import Image, ImageDraw
from pycocotools import mask as tools

from clipes.datasets import open_dataset
from clipes.datasets.outlines import decode_runs, draw, encode_runs, parse_outline
from clipes.disk.claim import temporary_sibling
from clipes.disk.images import read_image, read_mask, voc_palette
from clipes.errors import ArtifactError, RunConflictError, UsageError
from clipes.formats import FORMATS
from clipes.formats.base import IGNORE_LABEL, Item
from clipes.formats.labelme import LabelmeWriter
from clipes.formats.regions import paint_order, regions, simplify
from clipes.formats.written import Written
from clipes.masks.pseudo import upsample
from clipes.run.folder import Run
from clipes.types import IGNORE, CamMaps, PseudoLabel
from tests.export_support import (
    CLASSES,
    LABELS,
    MU,
    SIZES,
    Exporter,
    assert_masks,
    binary_masks,
    holes,
    make_confidence,
    make_export_run,
    make_masks,
    only_sure,
    rename,
    small_masks,
    some,
)


@pytest.fixture
def masks() -> dict[str, np.ndarray]:
    return make_masks()


@pytest.fixture
def confidence() -> dict[str, np.ndarray]:
    return make_confidence()


@pytest.fixture
def run(tmp_path: Path, masks: dict, confidence: dict) -> Run:
    return make_export_run(tmp_path, masks, confidence)


@pytest.fixture
def do(run: Run) -> Exporter:
    return Exporter(run)


@pytest.fixture
def sure(masks: dict, confidence: dict) -> dict[str, np.ndarray]:
    return only_sure(masks, confidence)


# Regions


def runs_literally(inside: np.ndarray) -> list[int]:
    counts, last, run = [], False, 0
    for value in inside.T.ravel():
        if bool(value) != last:
            counts.append(run)
            last, run = bool(value), 0
        run += 1
    return [*counts, run]


@some
@given(binary_masks)
def test_run_lengths_are_those_of_counting(mask: np.ndarray) -> None:
    for region in regions(mask, [1], components=False):
        runs = region.runs(mask.shape)
        assert runs.tolist() == runs_literally(mask)
        assert decode_runs(encode_runs(runs, mask.shape)).tolist() == runs.tolist()


@some
@given(small_masks)
def test_regions_together_are_the_mask(mask: np.ndarray) -> None:
    for components in (False, True):
        again = np.zeros_like(mask)
        found = list(regions(mask, [1, 2, IGNORE], components=components))
        for region in found:
            height, width = region.inside.shape
            box = again[region.top : region.top + height, region.left : region.left + width]
            assert not box[region.inside].any()
            box[region.inside] = region.value
            assert region.inside[[0, -1]].any(1).all()
            assert region.inside[:, [0, -1]].any(0).all()
        np.testing.assert_array_equal(again, mask)


def painted(mask: np.ndarray) -> np.ndarray:
    """Paint polygons as labelme does: with Pillow, outline included."""
    again = np.zeros_like(mask)
    for value, outline in paint_order(mask):
        corners = outline.tolist()
        corners += corners[-1:] * (3 - len(corners))
        canvas = Image.new("L", mask.shape[::-1])
        points = [tuple(map(float, corner)) for corner in corners]
        ImageDraw.Draw(canvas).polygon(points, outline=1, fill=1)
        again[np.asarray(canvas) == 1] = value
    return again


@some
@given(small_masks)
def test_polygons_painted_in_order_are_the_mask(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(painted(mask), mask)


def test_nothing_is_painted_for_background_outside() -> None:
    values = [value for value, _ in paint_order(holes(SIZES["holes"]))]
    assert values.count(0) == 2  # the hole of the outer ring, and the pixel inside
    assert not list(paint_order(np.zeros((5, 5), np.uint8)))


def test_simpler_polygons_stay_near() -> None:
    rows, columns = np.indices((60, 60))
    mask = ((rows - 30) ** 2 + (columns - 30) ** 2 < 400).astype(np.uint8)
    ((_, outline),) = paint_order(mask)
    simple = simplify(outline, 1.0)
    assert len(simple) < len(outline) / 2
    distances = np.hypot(*(outline[:, None] - simple[None]).transpose(2, 0, 1))
    assert distances.min(0).max() == 0  # its corners are corners of the outline
    canvas = Image.new("L", (60, 60))
    ImageDraw.Draw(canvas).polygon([tuple(map(float, p)) for p in simple], outline=1, fill=1)
    assert (np.asarray(canvas) != mask).sum() < 0.05 * mask.sum()
    assert simplify(outline, 0) is outline


# voc, mmseg


@pytest.mark.parametrize("mu", [None, MU])
def test_voc(do: Exporter, masks: dict, sure: dict, mu: float | None) -> None:
    folder = do("voc", confidence=mu)
    assert_masks(
        lambda name: read_mask(folder / "SegmentationClassAug" / f"{name}.png"),
        sure if mu else masks,
    )
    with Image.open(folder / "SegmentationClassAug" / "holes.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.reshape(image.getpalette(), (-1, 3)), voc_palette())
    ids = (folder / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    assert ids == list(SIZES)
    assert (folder / "classes.txt").read_text("utf-8").splitlines() == list(CLASSES)
    linked = folder / "JPEGImages" / "odd.png"
    assert linked.is_symlink()
    np.testing.assert_array_equal(read_image(linked), read_image(linked.resolve()))


def test_voc_is_a_data_set_again(do: Exporter, tmp_path: Path) -> None:
    folder = do("voc", tmp_path / "out", copy=True)
    labels = dict.fromkeys(SIZES, (3, 0))
    for kind, options in (
        ("folder", {}),
        ("voc", {"labels": folder / "labels.csv", "classes": CLASSES}),
    ):
        data = open_dataset(kind, root=folder, **options)
        assert data.classes == CLASSES
        assert {sample.id: sample.labels for sample in data.samples} == labels
        assert (data.failures, data.remarks) == ((), ())
        assert all(sample.mask and not sample.image.is_symlink() for sample in data.samples)


@pytest.mark.parametrize("mu", [None, MU])
def test_mmseg(do: Exporter, masks: dict, sure: dict, mu: float | None) -> None:
    # BaseSegDataset needs mmcv, which has to be compiled; so its documented rule is followed here.
    folder = do("mmseg", confidence=mu)
    config: dict = {}
    exec((folder / "dataset.py").read_text("utf-8"), config)
    assert config["metainfo"]["classes"] == ("background", *CLASSES)
    assert config["metainfo"]["palette"] == voc_palette()[:5].tolist()
    data = config["train_dataloader"]["dataset"]
    assert (data["type"], data["reduce_zero_label"], data["ignore_index"]) == (
        "BaseSegDataset",
        False,
        255,
    )
    root = Path(data["data_root"])
    stems = (root / data["ann_file"]).read_text().splitlines()
    assert stems == list(SIZES)

    def read(stem: str) -> np.ndarray:
        image = root / data["data_prefix"]["img_path"] / (stem + data["img_suffix"])
        truth = root / data["data_prefix"]["seg_map_path"] / (stem + data["seg_map_suffix"])
        assert read_image(image).shape[:2] == SIZES[stem]
        return np.array(Image.open(truth))

    assert_masks(read, sure if mu else masks)


def test_mmseg_with_images_of_two_kinds(do: Exporter, run: Run) -> None:
    root = Path(run.stage("cam")["facts"]["root"])
    (root / "odd.png").unlink()
    Image.new("RGB", SIZES["odd"][::-1]).save(root / "odd.JPEG")
    labels = json.loads((root / "labels.json").read_text())
    labels = {("odd.JPEG" if name == "odd.png" else name): value for name, value in labels.items()}
    (root / "labels.json").write_text(json.dumps(labels))
    folder = do("mmseg")
    config: dict = {}
    exec((folder / "dataset.py").read_text("utf-8"), config)
    parts = config["train_dataset"]["datasets"]
    assert config["train_dataset"]["type"] == "ConcatDataset"
    found = {part["img_suffix"]: (folder / part["ann_file"]).read_text().split() for part in parts}
    assert found == {".jpg": ["odd"], ".png": ["one", "row", "holes", "empty"]}
    assert (folder / "img_dir" / "train" / "odd.jpg").exists()


def test_a_turned_photo_is_placed_upright(do: Exporter, run: Run) -> None:
    root = Path(run.stage("cam")["facts"]["root"])
    (root / "odd.png").unlink()
    height, width = SIZES["odd"]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (height, width), (200, 30, 40)).save(root / "odd.jpg", exif=exif)
    labels = (root / "labels.json").read_text().replace("odd.png", "odd.jpg")
    (root / "labels.json").write_text(labels)
    folder = do("voc")
    with Image.open(folder / "JPEGImages" / "odd.jpg") as image:
        assert image.size == (width, height)
        assert 0x0112 not in image.getexif()
    assert not (folder / "JPEGImages" / "odd.jpg").is_symlink()


# coco


def coco_masks(path: Path) -> dict[str, np.ndarray]:
    """Draw the file with the project's own reader of instances files."""
    content = json.loads(path.read_text("utf-8"))
    found = {}
    for image in content["images"]:
        outlines = [
            parse_outline(entry, entry["category_id"], (image["height"], image["width"]))
            for entry in content["annotations"]
            if entry["image_id"] == image["id"]
        ]
        found[Path(image["file_name"]).stem] = draw(outlines, (image["height"], image["width"]))
    return found


@pytest.mark.parametrize("components", [False, True])
@pytest.mark.parametrize("mu", [None, MU])
def test_coco(do: Exporter, masks: dict, sure: dict, mu: float | None, components: bool) -> None:
    path = do("coco", confidence=mu, components=components) / "instances.json"
    expected = sure if mu else masks
    assert_masks(coco_masks(path).__getitem__, expected)
    content = json.loads(path.read_text("utf-8"))
    assert {entry["id"]: entry["name"] for entry in content["categories"]} == dict(
        enumerate(CLASSES, start=1)
    )
    assert [image["id"] for image in content["images"]] == [1, 2, 3, 4, 5]
    ids = [entry["id"] for entry in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    objects = [entry for entry in content["annotations"] if not entry["iscrowd"]]
    pairs = {(entry["image_id"], entry["category_id"]) for entry in objects}
    assert (len(pairs) < len(objects)) == components
    crowds = [entry for entry in content["annotations"] if entry["iscrowd"]]
    unsure = sum((mask == IGNORE).any() for mask in expected.values())
    assert len(crowds) == unsure * len(LABELS)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # its own
@pytest.mark.parametrize("polygons", [False, True])
@pytest.mark.parametrize("components", [False, True])
@pytest.mark.parametrize("mu", [None, MU])
def test_coco_as_pycocotools_reads_it(
    do: Exporter,
    masks: dict,
    sure: dict,
    mu: float | None,
    components: bool,
    polygons: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pycocotools.coco import COCO  # it imports matplotlib

    folder = do("coco", confidence=mu, components=components, polygons=polygons)
    coco = COCO(str(folder / "instances.json"))
    assert [entry["name"] for entry in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for image in coco.loadImgs(coco.getImgIds()):
        expected = (sure if mu else masks)[Path(image["file_name"]).stem]
        again = np.zeros((image["height"], image["width"]), np.uint8)
        entries = coco.loadAnns(coco.getAnnIds(imgIds=image["id"], iscrowd=None))
        for entry in sorted(entries, key=lambda entry: -entry["iscrowd"]):
            inside = coco.annToMask(entry)
            again[inside == 1] = IGNORE if entry["iscrowd"] else entry["category_id"]
            assert isinstance(entry["segmentation"], list) == (polygons and not entry["iscrowd"])
            rle = coco.annToRLE(entry)
            assert entry["area"] == tools.area(rle)
            assert entry["bbox"] == tools.toBbox(rle).tolist()
        np.testing.assert_array_equal(again, expected)
    capsys.readouterr()


def test_a_picture_too_large_for_compression_has_a_list(
    do: Exporter, masks: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipes.formats.coco.MOST_PIXELS", 40)
    path = do("coco") / "instances.json"
    assert_masks(coco_masks(path).__getitem__, masks)
    kinds = {
        (entry["segmentation"]["size"] == [23, 31], type(entry["segmentation"]["counts"]))
        for entry in json.loads(path.read_text("utf-8"))["annotations"]
    }
    assert kinds == {(True, list), (False, str)}


@some
@given(binary_masks)
def test_the_text_is_the_one_pycocotools_writes(mask: np.ndarray) -> None:
    for region in regions(mask, [1], components=False):
        text = encode_runs(region.runs(mask.shape), mask.shape)
        assert text.encode() == tools.encode(np.asfortranarray(mask))["counts"]


def test_coco_keeps_the_numbers_of_coco(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    (root / "train2014").mkdir(parents=True)
    ids = ["COCO_train2014_000000000030", "COCO_train2014_000000000009"]
    for id_ in ids:
        Image.new("RGB", (4, 3)).save(root / "train2014" / f"{id_}.jpg")
    (root / "labels.json").write_text(json.dumps({f"{id_}.jpg": ["b a"] for id_ in ids}))
    run = Run(tmp_path / "runs" / "coco")
    settings = {"dataset": "coco", "split": None, "classes": ["b a"]}
    settings["labels"] = str(root / "labels.json")
    run.begin("cam", settings, "clipes cam", {"root": str(root)})
    run.save_pseudo(ids[1], PseudoLabel(np.ones((3, 4), np.uint8), np.ones((3, 4), np.float32)))
    do = Exporter(run)
    content = json.loads((do("coco") / "instances.json").read_text("utf-8"))
    (image,) = content["images"]
    assert image == {"id": 9, "file_name": f"{ids[1]}.jpg", "height": 3, "width": 4}
    assert "1 of 2 images have no pseudo-mask yet" in do.said[0]
    assert f"clipes refine {run.root}" in do.said[0]


# labelme


@pytest.mark.parametrize("mu", [None, MU])
def test_labelme(do: Exporter, masks: dict, sure: dict, mu: float | None) -> None:
    folder = do("labelme", confidence=mu)
    names = (folder / "labels.txt").read_text("utf-8").splitlines()
    assert names == [IGNORE_LABEL, "_background_", *CLASSES]
    values = {name: (value - 1) % 256 for value, name in enumerate(names)}

    def read(name: str) -> np.ndarray:
        content = json.loads((folder / f"{name}.json").read_text("utf-8"))
        image = folder / content["imagePath"]
        assert not Path(content["imagePath"]).is_absolute()
        assert read_image(image).shape[:2] == (content["imageHeight"], content["imageWidth"])
        mask = np.zeros(SIZES[name], np.uint8)
        for shape in content["shapes"]:
            assert shape["shape_type"] == "polygon"
            assert len(shape["points"]) >= 3
            canvas = Image.new("L", mask.shape[::-1])
            points = [tuple(point) for point in shape["points"]]
            ImageDraw.Draw(canvas).polygon(points, outline=1, fill=1)
            mask[np.asarray(canvas) == 1] = values[shape["label"]]
        return mask

    assert_masks(read, sure if mu else masks)


def test_labelme_as_labelme_reads_it(do: Exporter, sure: dict) -> None:
    reason = "labelme brings Qt and is tried where someone installed it"
    labelme = pytest.importorskip("labelme._label_file", reason=reason)
    shapes = pytest.importorskip("labelme.utils.shape", reason=reason)
    folder = do("labelme", confidence=MU)
    names = (folder / "labels.txt").read_text("utf-8").splitlines()
    values = {name: value - 1 for value, name in enumerate(names)}  # as labelme2voc counts

    def read(name: str) -> np.ndarray:
        data = labelme.read_label_file(str(folder / f"{name}.json"))
        mask, _ = shapes.shapes_to_label(SIZES[name], data.shapes, values)
        return mask.astype(np.uint8)

    assert_masks(read, sure)


# cvat


@pytest.mark.parametrize("components", [False, True])
@pytest.mark.parametrize("mu", [None, MU])
def test_cvat(do: Exporter, masks: dict, sure: dict, mu: float | None, components: bool) -> None:
    # CVAT is a server; what it reads is documented: docs.cvat.ai, "XML annotation format".
    folder = do("cvat", confidence=mu, components=components)
    tree = ElementTree.parse(folder / "annotations.xml").getroot()
    assert tree.findtext("version") == "1.1"
    labels = [(label.findtext("name"), label.findtext("color")) for label in tree.iter("label")]
    assert [name for name, _ in labels] == [*CLASSES, IGNORE_LABEL]
    assert labels[0][1] == "#800000"
    assert labels[-1][1] == "#e0e0c0"
    shown = json.loads((folder / "labels.json").read_text("utf-8"))
    assert [(label["name"], label["color"]) for label in shown] == labels
    values = {name: value for value, (name, _) in enumerate(labels, start=1)}
    values[IGNORE_LABEL] = IGNORE
    found = {}
    for image in tree.findall("image"):
        mask = np.zeros((int(image.get("height")), int(image.get("width"))), np.uint8)
        for part in image.findall("mask"):
            top, left, height, width = (
                int(part.get(key)) for key in ("top", "left", "height", "width")
            )
            runs = [int(run) for run in part.get("rle").split(",")]
            inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
            mask[top : top + height, left : left + width][inside] = values[part.get("label")]
        found[Path(image.get("name")).stem] = mask
    assert_masks(found.__getitem__, sure if mu else masks)
    order = sorted(tree.findall("image"), key=lambda image: int(image.get("id")))
    assert [image.get("name") for image in order] == sorted(f"{name}.png" for name in SIZES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, and pycocotools'
def test_cvat_as_datumaro_reads_it(do: Exporter, sure: dict, run: Run) -> None:
    reason = "datumaro asks for an older OpenCV and is tried where someone installed it"
    base = pytest.importorskip("datumaro.plugins.data_formats.cvat.base", reason=reason)
    folder = do("cvat", confidence=MU)
    (folder / "images").symlink_to(run.stage("cam")["facts"]["root"])
    reader = base.CvatBase(str(folder / "annotations.xml"))
    names = [label.name for label in reader.categories()[base.AnnotationType.label]]
    found = {}
    for item in reader:
        mask = np.zeros(SIZES[item.id], np.uint8)
        for part in item.annotations:
            name = names[part.label]
            mask[np.asarray(part.image) == 1] = (
                IGNORE if name == IGNORE_LABEL else names.index(name) + 1
            )
        found[item.id] = mask
    assert_masks(found.__getitem__, sure)


def test_xml_of_cvat_is_escaped(do: Exporter) -> None:
    text = (do("cvat") / "annotations.xml").read_text("utf-8")
    assert f"<name>{xml.sax.saxutils.escape(CLASSES[1])}</name>" in text
    assert "<b>" not in text


# clip-es


def test_clip_es(do: Exporter, run: Run) -> None:
    folder = do("clip-es")
    assert (folder / "images.txt").read_text().split() == list(SIZES)
    for name, size in SIZES.items():
        saved = np.load(folder / f"{name}.npy", allow_pickle=True).item()
        cams = run.load_cams(name)
        assert saved["keys"].tolist() == [3, 0]
        assert saved["keys"].dtype == np.int64
        assert saved["attn_highres"].dtype == np.float16
        assert saved["attn_highres"].shape == (2, *size)
        expected = upsample(cams.maps, size)
        np.testing.assert_allclose(saved["attn_highres"], expected, atol=5e-4)


def test_the_pickle_of_clip_es_names_nothing_of_a_newer_numpy(do: Exporter) -> None:
    data = (do("clip-es") / "odd.npy").read_bytes()
    file = io.BytesIO(data)
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == ((), False, np.dtype(object))
    names = {
        argument for opcode, argument, _ in pickletools.genops(file) if opcode.name == "GLOBAL"
    }
    assert names == {"numpy array", "numpy ndarray", "builtins bytearray"}


def test_scripts_of_clip_es_label_as_we_do(do: Exporter, run: Run) -> None:
    """What eval_cam.py does with a file, with exponent 1."""
    from clipes.masks.pseudo import cam_mask

    folder = do("clip-es")
    saved = np.load(folder / "holes.npy", allow_pickle=True).item()
    cams = saved["attn_highres"]
    background = np.power(1 - np.max(cams, axis=0, keepdims=True), 1)
    keys = np.pad(saved["keys"] + 1, (1, 0))
    labels = keys[np.argmax(np.concatenate((background, cams)), axis=0)]
    assert (labels == cam_mask(run.load_cams("holes"), 1.0)).mean() > 0.99


# Running it

WHOLE = ("coco", "cvat", "label-studio")  # one file holds all images
FILES = [name for name in FORMATS if name not in WHOLE]


@pytest.mark.parametrize("name", FORMATS)
def test_again_changes_nothing(do: Exporter, name: str) -> None:
    folder = do(name)
    assert do.summary.done == 5
    assert do.steps[0] == (0, 5)
    assert do.steps[-1] == (5, 5)
    files = [path for path in folder.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    do(name)
    one_file = name in WHOLE
    assert do.summary.done == (5 if one_file else 0)
    assert do.summary.skipped == (0 if one_file else 5)
    assert {path: path.read_bytes() for path in files} == before


def change(run: Run, name: str) -> None:
    """Make mask, confidence and maps of an image otherwise, and date them in the past."""
    size = SIZES[name]
    run.save_pseudo(name, PseudoLabel(np.full(size, 2, np.uint8), np.ones(size, np.float32)))
    run.save_cams(name, CamMaps(np.array([3, 0]), np.ones((2, 2, 3), np.float32), size))
    for path in (run.pseudo_path(name), run.confidence_path(name), run.cams_path(name)):
        os.utime(path, (0, 0))


def contents(folder: Path) -> dict[Path, bytes]:
    """What the files of an export hold, its record and its own path apart."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "export.json")
    here = str(folder).encode()
    return {path.relative_to(folder): path.read_bytes().replace(here, b".") for path in files}


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_made_anew_is_written_anew(do: Exporter, run: Run, name: str) -> None:
    folder = do(name)
    before = contents(folder)
    change(run, "odd")
    do(name)
    assert do.summary.done == (5 if name in WHOLE else 1)
    after = contents(folder)
    assert after != before
    assert after == contents(do(name, folder.with_name("anew")))


def test_a_date_alone_writes_nothing(do: Exporter, run: Run) -> None:
    folder = do("labelme")
    later = folder.stat().st_mtime + 10
    os.utime(run.pseudo_path("odd"), (later, later))
    do("labelme")
    assert do.summary.done == 0


def test_confidence_counts_where_it_decides(do: Exporter, run: Run, masks: dict) -> None:
    sure, all_ = do("voc", confidence=MU), do("voc", Path(run.root, "all"))
    unsure = np.zeros(SIZES["odd"], np.float32)
    run.save_pseudo("odd", PseudoLabel(masks["odd"], unsure))
    do("voc", all_)
    assert do.summary.done == 0
    do("voc", sure, confidence=MU)
    assert do.summary.done == 1
    assert (read_mask(sure / "SegmentationClassAug" / "odd.png") == IGNORE).all()


@pytest.mark.parametrize("name", FORMATS)
def test_images_that_fall_out_leave_nothing(do: Exporter, run: Run, name: str) -> None:
    folder = do(name)
    root = Path(run.stage("cam")["facts"]["root"])
    labels = json.loads((root / "labels.json").read_text())
    del labels["odd.png"]
    (root / "labels.json").write_text(json.dumps(labels))
    (root / "odd.png").unlink()
    do(name)
    assert any("1 files in" in line and "belong to no image" in line for line in do.said)
    one_file = name in WHOLE
    assert any("removed: the files of 1 image (the first is odd)" in s for s in do.said) != one_file
    assert not list(folder.rglob("odd.*"))
    assert contents(folder) == contents(do(name, folder.with_name("anew")))


@pytest.mark.parametrize("name", FILES)
def test_an_image_that_fails_later_leaves_nothing(run: Run, name: str) -> None:
    do = Exporter(run)
    folder = do(name)
    run.pseudo_path("odd").write_bytes(b"no mask")
    run.cams_path("odd").write_bytes(b"no maps")
    with pytest.raises(AssertionError):
        do(name)
    assert [failure.id for failure in do.failures] == ["odd"]
    assert not list(folder.rglob("odd.*"))


@pytest.mark.parametrize("name", FILES)
def test_what_a_person_edited_is_neither_written_over_nor_removed(run: Run, name: str) -> None:
    do = Exporter(run)
    folder = do(name)
    # Of what is linked to, the mask is what can be edited.
    edited = next(path for path in folder.rglob("odd.*") if not path.is_symlink())
    edited.write_bytes(b"mine")
    do(name)
    assert do.summary.done == 0
    change(run, "odd")
    with pytest.raises(AssertionError):
        do(name)
    assert f"{edited} was edited since it was written" in do.failures.pop().reason
    (run.pseudo_path("odd") if FORMATS[name].source == "pseudo" else run.cams_path("odd")).unlink()
    do(name)
    assert edited.read_bytes() == b"mine"
    assert any("kept: the files of 1 image" in line and str(edited) in line for line in do.said)


def test_labelme_finds_pictures_from_behind_a_link(run: Run, tmp_path: Path) -> None:
    root, deep = Path(run.stage("cam")["facts"]["root"]), tmp_path / "a" / "disk" / "far" / "away"
    deep.mkdir(parents=True)
    (tmp_path / "link").symlink_to(deep)
    picture = (root / "odd.png").rename(tmp_path / "original.png")
    (root / "odd.png").symlink_to(picture)
    folder = Exporter(run)("labelme", tmp_path / "link" / "out")
    named = json.loads((folder / "odd.json").read_text())["imagePath"]
    assert named.endswith("photos/odd.png")
    assert (folder / named).samefile(picture)


def test_links_follow_a_data_set_that_moved(do: Exporter, run: Run, tmp_path: Path) -> None:
    folders = {name: do(name) for name in ("voc", "mmseg", "labelme")}
    moved = tmp_path / "elsewhere"
    Path(run.stage("cam")["facts"]["root"]).rename(moved)
    run.note_fact("cam", "root", str(moved))
    for name, folder in folders.items():
        do(name)
        assert do.summary.done == 5
        assert all(path.exists() for path in folder.rglob("*"))
    path = folders["labelme"] / "odd.json"
    assert (path.parent / json.loads(path.read_text())["imagePath"]).exists()


def test_a_picture_of_another_suffix_replaces_the_old_one(do: Exporter, run: Run) -> None:
    folder = do("mmseg")
    root = Path(run.stage("cam")["facts"]["root"])
    (root / "odd.png").unlink()
    Image.new("RGB", SIZES["odd"][::-1]).save(root / "odd.jpg")
    labels = (root / "labels.json").read_text().replace("odd.png", "odd.jpg")
    (root / "labels.json").write_text(labels)
    do("mmseg")
    found = sorted(path.name for path in (folder / "img_dir" / "train").glob("odd.*"))
    assert found == ["odd.jpg"]
    assert not (folder / "train.txt").exists()  # it named odd, whose suffix is another one now
    assert (folder / "train-jpg.txt").read_text() == "odd\n"


def test_an_export_that_was_killed_is_written_again(
    do: Exporter, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = do("labelme")
    change(run, "odd")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        # Right after the file is written, and before the record says so; as SIGKILL, it is final.
        patched.setattr(Written, "keep", die)
        save, begun = Written.save, []
        patched.setattr(Written, "save", lambda self: begun or begun.append(save(self)))
        with pytest.raises(KeyboardInterrupt):
            do("labelme")
    do("labelme")
    assert do.summary.done == 1
    assert contents(folder) == contents(do("labelme", folder.with_name("anew")))


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("place", [0, 2])  # what was written again, and what was not
def test_what_a_person_edits_between_a_stopped_export_and_the_next_stays(
    do: Exporter, run: Run, monkeypatch: pytest.MonkeyPatch, final: bool, place: int
) -> None:
    folder = do("labelme")
    ids = list(SIZES)
    for id_ in ids:
        change(run, id_)
    add, save, begun, added = LabelmeWriter.add, Written.save, [], []

    def stop(writer: LabelmeWriter, item: Item) -> None:
        if len(added) == 1:
            raise KeyboardInterrupt
        added.append(item.sample.id)
        add(writer, item)

    with monkeypatch.context() as patched:
        patched.setattr(LabelmeWriter, "add", stop)
        if final:  # as SIGKILL: nothing is recorded any more
            patched.setattr(Written, "save", lambda self: begun or begun.append(save(self)))
        with pytest.raises(KeyboardInterrupt):
            do("labelme")
    id_ = [*added, *(one for one in ids if one not in added)][place]
    edited = folder / f"{id_}.json"
    edited.write_text("mine")
    size = SIZES[id_]
    run.save_pseudo(id_, PseudoLabel(np.ones(size, np.uint8), np.ones(size, np.float32)))
    with pytest.raises(AssertionError):
        do("labelme")
    assert f"{edited} was edited since it was written" in do.failures.pop().reason
    assert edited.read_text() == "mine"


def test_an_export_that_broke_off_as_it_took_notes_goes_on(
    do: Exporter, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = do("labelme")
    notes = folder / ".export.jsonl"
    assert not notes.exists()
    notes.write_text('{"odd": {"made_from": "", "files": {"odd.json": ""}}}\n{"row": {"ma')
    (folder / "odd.json").write_text("half")
    do("labelme")
    assert (do.summary.done, notes.exists()) == (1, False)
    notes.write_text("[]")
    with pytest.raises(ArtifactError, match=r"export\.jsonl"):
        do("labelme")


@pytest.mark.parametrize("name", ["coco", "labelme"])
def test_hidden_files_are_nothing_that_an_export_would_write_over(
    do: Exporter, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / ".DS_Store").touch()
    mine = temporary_sibling(folder / "instances.json")
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}-", "-999999999-"))
    dead.touch()
    do(name, folder)
    assert (folder / ".DS_Store").exists()
    assert not dead.exists()


def test_no_record_makes_an_export_remove_what_lies_outside(
    do: Exporter, run: Run, tmp_path: Path
) -> None:
    folder = do("labelme")
    other = tmp_path / "mine.txt"
    other.write_text("mine")
    record = json.loads((folder / "export.json").read_text())
    for name in (os.path.relpath(other, folder), str(other)):
        record["made"]["gone"] = {"made_from": "", "files": {name: ""}}
        (folder / "export.json").write_text(json.dumps(record))
        do("labelme")
        assert other.read_text() == "mine"


def test_other_options_need_another_folder(do: Exporter) -> None:
    do("voc", confidence=0.9)
    with pytest.raises(RunConflictError, match=r"confidence = 0\.9, not 0\.5"):
        do("voc", confidence=0.5)


def test_an_export_of_an_older_clipes_is_gone_on_with(do: Exporter) -> None:
    record = do("labelme") / "export.json"
    content = json.loads(record.read_text("utf-8"))
    del content["settings"]["upright"]  # which came later
    record.write_text(json.dumps(content))
    do("labelme")
    assert do.summary.skipped == 5
    record.write_text(json.dumps(content))
    with pytest.raises(RunConflictError, match="upright = false, not true"):
        do("labelme", upright=True)


def test_where_links_cannot_be_made_images_are_copied(
    do: Exporter, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    image = do("voc") / "JPEGImages" / "odd.png"
    assert not image.is_symlink()
    source = Path(run.stage("cam")["facts"]["root"]) / "odd.png"
    assert image.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"settings": 3}', "[" * 10**6, '{"settings": {}}' + " " * 2**26],
    ids=["empty", "list", "nothing", "number", "deep", "large"],
)
def test_a_damaged_record_is_named(do: Exporter, text: str) -> None:
    folder = do("voc")
    (folder / "export.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"cannot read the record of an export .*export\.json"):
        do("voc")


def test_a_record_that_names_no_files_is_of_another_version(do: Exporter) -> None:
    path = do("voc") / "export.json"
    record = json.loads(path.read_text())
    del record["made"]
    path.write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="does not say which files the export wrote; delete"):
        do("voc")


def test_a_folder_of_something_else_is_left_alone(do: Exporter, tmp_path: Path) -> None:
    truth = tmp_path / "VOC2012" / "SegmentationClassAug" / "odd.png"
    truth.parent.mkdir(parents=True)
    truth.write_bytes(b"ground truth")
    os.utime(truth, (0, 0))
    with pytest.raises(ArtifactError, match="choose an empty --out"):
        do("voc", tmp_path / "VOC2012")
    assert truth.read_bytes() == b"ground truth"


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("clip-es", {"confidence": 0.9}),
        ("voc", {"components": True}),
        ("coco", {"tolerance": 1.0}),
        ("labelme", {"copy": True}),
    ],
)
def test_an_option_that_means_nothing_is_refused(do: Exporter, name: str, option: dict) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(option))} means nothing to the format"):
        do(name, **option)


def test_without_masks_the_remedy_is_named(do: Exporter, run: Run) -> None:
    for name in SIZES:
        run.pseudo_path(name).unlink()
    with pytest.raises(ArtifactError, match=f"run 'clipes refine {run.root}' first"):
        do("coco")
    assert not (run.root / "export").exists()
    do("clip-es")


def test_a_bad_mask_is_named_and_the_others_are_written(run: Run, masks: dict) -> None:
    wrong = np.full(SIZES["odd"], 9, np.uint8)
    run.save_pseudo("odd", PseudoLabel(wrong, np.ones(SIZES["odd"], np.float32)))
    other = np.zeros((3, 3), np.uint8)
    run.save_pseudo("row", PseudoLabel(other, np.ones((3, 3), np.float32)))
    do = Exporter(run)
    for name in ("coco", "cvat", "voc", "labelme", "mmseg"):
        with pytest.raises(AssertionError):
            do(name)
        assert [failure.id for failure in do.failures] == ["odd", "row"]
        assert "holds label 9, but there are 4 classes" in do.failures[0].reason
        assert "is 3 x 3, the image 1 x 9" in do.failures[1].reason
        assert do.summary.done == 3
        do.failures.clear()
    found = coco_masks(run.root / "export" / "coco" / "instances.json")
    assert set(found) == {"one", "holes", "empty"}
    np.testing.assert_array_equal(found["holes"], masks["holes"])


def test_a_class_called_like_what_is_ignored_is_refused(do: Exporter, run: Run) -> None:
    rename(run, CLASSES[0], IGNORE_LABEL)
    for name in ("labelme", "cvat", "cvat-mask", "label-studio"):
        with pytest.raises(UsageError, match="rename the class"):
            do(name)


def test_images_in_sub_folders_keep_them_in_their_names(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in ("cat/1.png", "dog/1.png"):
        (root / name).parent.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(root / name)
    run = Run(tmp_path / "runs" / "sub")
    settings = {"dataset": "folder", "split": None, "labels": None, "classes": ["cat", "dog"]}
    run.begin("cam", settings, "clipes cam", {"root": str(root)})
    for id_ in ("cat_1", "dog_1"):
        run.save_pseudo(id_, PseudoLabel(np.ones((2, 2), np.uint8), np.ones((2, 2), np.float32)))
    content = json.loads((Exporter(run)("coco") / "instances.json").read_text("utf-8"))
    assert [image["file_name"] for image in content["images"]] == ["cat/1.png", "dog/1.png"]
