"""What tools for training read, by the rules of their own code."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import cv2
import numpy as np
import pytest
import yaml
from defusedxml import ElementTree
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as tools

from clipes.disk.images import read_mask, voc_palette
from clipes.errors import UsageError
from clipes.formats.base import IGNORE_LABEL
from clipes.formats.label_studio import encode_brush
from clipes.formats.regions import regions
from clipes.formats.rings import rings
from clipes.formats.yolo_seg import part_line
from clipes.run.folder import Run
from clipes.types import IGNORE
from tests.export_support import (
    CLASSES,
    MU,
    SIZES,
    Exporter,
    assert_masks,
    binary_masks,
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
def run(tmp_path: Path, masks: dict) -> Run:
    return make_export_run(tmp_path, masks, make_confidence())


@pytest.fixture
def do(run: Run) -> Exporter:
    return Exporter(run)


def turn(run: Run, name: str) -> None:
    """Store an image on its side, with the EXIF orientation that says so."""
    root = Path(run.stage("cam")["facts"]["root"])
    with Image.open(root / f"{name}.png") as image:
        on_its_side = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    on_its_side.save(root / f"{name}.png", exif=exif)


def sizes_as_stored(folder: Path) -> dict[str, tuple[int, int]]:
    """(H, W) as a reader sees it that knows no EXIF."""
    found = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            found[path.stem] = image.size[::-1]
    return found


# Masks without a palette


@pytest.mark.parametrize(
    ("name", "folder"), [("voc", "SegmentationClassAug"), ("mmseg", "ann_dir")]
)
def test_grey_masks_are_labels_to_opencv(do: Exporter, masks: dict, name: str, folder: str) -> None:
    found = {path.stem: path for path in (do(name, grey=True) / folder).rglob("*.png")}
    assert_masks(lambda id_: cv2.imread(str(found[id_]), cv2.IMREAD_GRAYSCALE), masks)
    assert_masks(lambda id_: read_mask(found[id_]), masks)
    with Image.open(found["holes"]) as image:
        assert image.mode == "L"


def test_a_palette_is_luminance_to_opencv(do: Exporter, masks: dict) -> None:
    """What docs/formats.md warns of."""
    path = do("voc") / "SegmentationClassAug" / "holes.png"
    seen = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    luminance = np.rint(voc_palette() @ [0.299, 0.587, 0.114])
    assert np.abs(seen - luminance[masks["holes"]]).max() <= 1
    assert (seen != masks["holes"]).any()


# ultralytics


@pytest.mark.parametrize("mu", [None, MU])
def test_ultralytics(do: Exporter, run: Run, masks: dict, mu: float | None) -> None:
    """SemanticDataset of 8.4: an image below ``train``, its mask where ``images`` is ``masks``."""
    turn(run, "odd")
    folder = do("ultralytics", confidence=mu)
    data = yaml.safe_load((folder / "data.yaml").read_text("utf-8"))
    assert data["names"] == dict(enumerate(["background", *CLASSES]))
    assert (data["train"], data["val"], data["masks_dir"]) == ("images", "images", "masks")
    assert sizes_as_stored(folder / data["train"]) == SIZES

    def read(name: str) -> np.ndarray:
        mask = cv2.imread(str(folder / data["masks_dir"] / f"{name}.png"), cv2.IMREAD_ANYDEPTH)
        assert {*np.unique(mask)} <= {*data["names"], 255}
        return mask

    assert_masks(read, only_sure(masks, make_confidence()) if mu else masks)


# Rings


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools'
@some
@given(binary_masks)
def test_rings_along_edges_are_the_mask_to_pycocotools(mask: np.ndarray) -> None:
    polygons = [ring.ravel().tolist() for ring in rings(mask == 1, edges=True)]
    parts, _ = cv2.connectedComponents(mask)
    assert len(polygons) == parts - 1
    if polygons:
        runs = tools.merge(tools.frPyObjects(polygons, *mask.shape))
        np.testing.assert_array_equal(tools.decode(runs), mask)


def test_a_hole_is_bridged_within_the_region() -> None:
    mask = np.ones((5, 7), bool)
    mask[2, 2] = mask[2, 4] = False
    (ring,) = rings(mask, edges=True)
    steps = np.abs(np.roll(ring, -1, axis=0) - ring)
    assert (steps.min(1) == 0).all()
    # Around it all and each hole; from the first hole to the left, from the other to the first.
    assert steps.sum() == 24 + 4 + 4 + 2 * 2 + 2 * 1


# yolo-seg


def drawn_by_ultralytics(lines: list[str], size: tuple[int, int]) -> np.ndarray:
    """What verify_image_label, polygon2mask and PolygonSemanticDataset of 8.4 make of a file."""
    mask = np.zeros(size, np.uint8)
    for line in lines:
        number, *corners = line.split()
        points = np.array(corners, np.float32).reshape(-1, 2)
        assert len(points) >= 3
        assert 0 <= points.min() <= points.max() <= 1
        assert (np.ptp(points, axis=0) > 0).all()
        pixels = (points * np.array(size[::-1], np.float32)).astype(np.int32)
        part = np.zeros(size, np.uint8)
        cv2.fillPoly(part, [pixels], 1)
        assert not mask[part == 1].any()
        mask[part == 1] = int(number) + 1
    return mask


def without_lines(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The mask as YOLO can have it, and how many parts are no polygons: points and lines."""
    kept, lines = np.zeros_like(mask), 0
    for value in set(np.unique(mask)) - {0, IGNORE}:
        count, labels = cv2.connectedComponents((mask == value).astype(np.uint8))
        for index in range(1, count):
            pixels = np.argwhere(labels == index)
            if np.linalg.matrix_rank(pixels - pixels[0]) == 2:
                kept[labels == index] = value
            else:
                lines += 1
    return kept, lines


@pytest.mark.parametrize("mu", [None, MU])
def test_yolo_seg(do: Exporter, run: Run, masks: dict, mu: float | None) -> None:
    turn(run, "odd")
    folder = do("yolo-seg", confidence=mu)
    data = yaml.safe_load((folder / "data.yaml").read_text("utf-8"))
    assert data["names"] == dict(enumerate(CLASSES))
    assert sizes_as_stored(folder / data["train"]) == SIZES
    expected = only_sure(masks, make_confidence()) if mu else masks
    lines_left_out = 0
    for name, size in SIZES.items():
        lines = (folder / "labels" / f"{name}.txt").read_text().splitlines()
        kept, left_out = without_lines(expected[name])
        np.testing.assert_array_equal(drawn_by_ultralytics(lines, size), kept)
        lines_left_out += left_out
    unlabelled = sum(int((mask == IGNORE).sum()) for mask in expected.values())
    (lost,) = [line for line in do.said if line.startswith("lost in yolo-seg")]
    assert f"{lines_left_out} parts that are points or lines" in lost
    assert (f"{unlabelled} pixels without a label are background" in lost) == (mu is not None)


@some
@given(small_masks)
def test_any_part_is_drawn_by_ultralytics_as_it_was(mask: np.ndarray) -> None:
    lines = [part_line(part, mask.shape) for part in regions(mask, [1, 2], components=True)]
    kept, _ = without_lines(mask)
    np.testing.assert_array_equal(drawn_by_ultralytics([*filter(None, lines)], mask.shape), kept)


# cvat-mask


@pytest.mark.parametrize("mu", [None, MU])
def test_cvat_mask(do: Exporter, masks: dict, mu: float | None) -> None:
    """CVAT is a server; what it reads is documented: docs.cvat.ai, "Segmentation mask"."""
    folder = do("cvat-mask", confidence=mu)
    lines = (folder / "labelmap.txt").read_text("utf-8").splitlines()
    fields = [line.split(":") for line in lines if not line.startswith("#")]
    assert [name for name, *_ in fields] == ["background", *CLASSES, IGNORE_LABEL]
    assert all(rest == ["", ""] for _, _, *rest in fields)
    values = [0, 1, 2, 3, 4, IGNORE]
    by_colour = {
        tuple(map(int, colour.split(","))): value
        for value, (_, colour, *_) in zip(values, fields, strict=True)
    }
    assert by_colour[0, 0, 0] == 0
    listed = (folder / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    assert listed == list(SIZES)

    def read(name: str) -> np.ndarray:
        with Image.open(folder / "SegmentationClass" / f"{name}.png") as image:
            colours = np.asarray(image.convert("RGB"))
        with Image.open(folder / "SegmentationObject" / f"{name}.png") as image:
            objects = np.asarray(image)
        mask = np.array([by_colour[tuple(map(int, pixel))] for pixel in colours.reshape(-1, 3)])
        mask = mask.reshape(colours.shape[:2])
        # An object has one label, the background none.
        assert len({*zip(objects.flat, mask.flat, strict=True)}) == len(np.unique(objects))
        np.testing.assert_array_equal(objects == 0, mask == 0)
        return mask

    assert_masks(read, only_sure(masks, make_confidence()) if mu else masks)


def test_a_class_that_a_labelmap_cannot_hold_is_refused(do: Exporter, run: Run) -> None:
    rename(run, CLASSES[0], "a:b")
    with pytest.raises(UsageError, match="cannot hold the class 'a:b'"):
        do("cvat-mask")
    assert not list((run.root / "export").glob("**/*.png"))


# label-studio


def decoded_brush(code: list[int]) -> np.ndarray:
    """Decode a stroke bit by bit, as thi.ng's rle-pack is specified; (pixels, channels)."""
    bits = "".join(f"{byte:08b}" for byte in code)
    position = 0

    def read(count: int) -> int:
        nonlocal position
        position += count
        return int(bits[position - count : position], 2)

    count, width = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < count:
        repeated = read(1)
        length = read(sizes[read(2)]) + 1
        values += [read(width)] * length if repeated else [read(width) for _ in range(length)]
    assert len(values) == count
    assert len(bits) - position < 8
    return np.reshape(values, (-1, 4))


@pytest.mark.parametrize("components", [False, True])
@pytest.mark.parametrize("mu", [None, MU])
def test_label_studio(do: Exporter, masks: dict, mu: float | None, components: bool) -> None:
    """Label Studio is a server; labelstud.io says what it reads: "BrushLabels", "pre-annotated"."""
    folder = do("label-studio", confidence=mu, components=components)
    view = ElementTree.parse(folder / "labels.xml").getroot()
    brushes, image = view.find("BrushLabels"), view.find("Image")
    names = [label.get("value") for label in brushes]
    assert names == [*CLASSES, IGNORE_LABEL]
    values = dict(zip(names, [1, 2, 3, 4, IGNORE], strict=True))
    found = {}
    for task in json.loads((folder / "tasks.json").read_text("utf-8")):
        (prediction,) = task["predictions"]
        url = urlsplit(task["data"][image.get("value").removeprefix("$")])
        assert url.path == "/data/local-files/"
        name = Path(parse_qs(url.query)["d"][0])
        assert name.parent == Path("photos")
        mask = np.zeros(SIZES[name.stem], np.uint8)
        strokes = prediction["result"]
        assert len({stroke["id"] for stroke in strokes}) == len(strokes)
        for stroke in strokes:
            assert (stroke["from_name"], stroke["to_name"]) == (brushes.get("name"), "image")
            assert (stroke["original_height"], stroke["original_width"]) == mask.shape
            (label,) = stroke["value"]["brushlabels"]
            channels = decoded_brush(stroke["value"]["rle"])
            assert (channels == channels[:, :1]).all()
            mask[channels[:, 3].reshape(mask.shape) == 255] = values[label]
        labels = len(np.unique(mask[mask > 0]))
        assert len(strokes) >= labels if components else len(strokes) == labels
        found[name.stem] = mask
    assert_masks(found.__getitem__, only_sure(masks, make_confidence()) if mu else masks)


@some
@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=6), st.booleans())
def test_a_stroke_of_any_length_is_read_again(lengths: list[int], inside: bool) -> None:
    runs = np.array([0] * inside + lengths)
    expected = np.repeat(np.arange(len(runs)) % 2 * 255, runs)
    code = encode_brush(runs, int(runs.sum()))
    np.testing.assert_array_equal(decoded_brush(code)[:, 0], expected)


# Images placed upright


@pytest.mark.parametrize("name", ["coco", "labelme", "cvat"])
def test_upright_images_fit_for_readers_that_know_no_exif(
    do: Exporter, run: Run, name: str
) -> None:
    turn(run, "odd")
    folder = do(name, upright=True)
    images = folder if name == "labelme" else folder / "images"
    placed = {path.stem: path for path in images.glob("*.png")}
    stored = {}
    for id_, path in placed.items():
        with Image.open(path) as image:
            stored[id_] = image.size[::-1]
    assert stored == SIZES
    assert [id_ for id_, path in placed.items() if not path.is_symlink()] == ["odd"]
    if name == "labelme":
        content = json.loads((folder / "odd.json").read_text("utf-8"))
        assert folder / content["imagePath"] == placed["odd"]
        assert (content["imageHeight"], content["imageWidth"]) == SIZES["odd"]
    else:
        assert '"odd.png"' in "".join(path.read_text("utf-8") for path in folder.glob("*.*"))


def test_an_image_is_drawn_anew_only_if_it_has_to_be(do: Exporter, run: Run, masks: dict) -> None:
    turn(run, "odd")
    folder = do("coco", upright=True)
    placed = folder / "images" / "odd.png"
    before = placed.stat().st_mtime_ns, placed.stat().st_ino
    do("coco", upright=True)
    assert do.summary.done == 5
    assert (placed.stat().st_mtime_ns, placed.stat().st_ino) == before
    placed.unlink()
    do("coco", upright=True)
    assert sizes_as_stored(folder / "images") == SIZES
