"""The bundled examples: what they hold was checked by eye, so the tests probe known places."""

from __future__ import annotations

import json
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from clipes.datasets import VOC_CLASSES
from clipes.datasets import examples as module
from clipes.datasets.base import Dataset
from clipes.datasets.examples import draw, open_examples, write_examples
from clipes.datasets.labels import read_labels
from clipes.disk.images import read_image, read_mask, voc_palette
from clipes.errors import DatasetError
from clipes.types import IGNORE

if find_spec("skimage") is None:
    pytest.skip("scikit-image, whose photos these are, is not installed", allow_module_level=True)

# (id, x, y, what a person sees there), in pixels of the image as written.
PROBES = [
    ("cat", 260, 240, "cat"),  # nose
    ("cat", 100, 10, "cat"),  # left ear
    ("cat", 10, 290, "cat"),  # shoulder
    ("cat", 5, 60, "background"),
    ("cat", 420, 100, "background"),
    ("astronaut", 225, 120, "person"),  # face
    ("astronaut", 260, 260, "person"),  # collar of the suit
    ("astronaut", 40, 420, "person"),  # sleeve
    ("astronaut", 400, 440, "background"),  # helmet on the table
    ("astronaut", 20, 60, "background"),  # flag
    ("astronaut", 415, 50, "ignore"),  # model of a rocket: no class, and yet not background
    ("photographer", 200, 90, "person"),  # hair
    ("photographer", 325, 190, "person"),  # hand behind the camera
    ("photographer", 110, 490, "person"),  # trousers
    ("photographer", 300, 165, "background"),  # camera
    ("photographer", 249, 228, "background"),  # gap between the arms
    ("motorcycle", 260, 185, "motorbike"),  # tank
    ("motorcycle", 125, 265, "motorbike"),  # rear wheel
    ("motorcycle", 500, 340, "motorbike"),  # front wheel
    ("motorcycle", 412, 206, "background"),  # between the forks
    ("motorcycle", 45, 140, "ignore"),  # a bicycle behind a bench, of which little is seen
    ("motorcycle", 470, 60, "background"),
    ("motorcycle", 200, 80, "background"),
    ("photographer-motorcycle", 50, 150, "person"),
    ("photographer-motorcycle", 240, 240, "background"),
    ("photographer-motorcycle", 256 + 155, 110, "motorbike"),
    ("photographer-motorcycle", 340, 40, "background"),
]
# Share of the pixels that carry each label, as measured when the outlines were last checked by eye.
SHARES = {
    "cat": {"cat": 0.725},
    "astronaut": {"person": 0.402},
    "photographer": {"person": 0.2985},
    "motorcycle": {"motorbike": 0.298},
    "photographer-motorcycle": {"person": 0.122, "motorbike": 0.164},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_examples(root=tmp_path_factory.mktemp("data"))


def test_masks_say_what_a_person_sees(dataset: Dataset) -> None:
    values = {"background": 0, "ignore": IGNORE}
    masks = {sample.id: read_mask(sample.mask) for sample in dataset.samples if sample.mask}
    for id_, x, y, name in PROBES:
        expected = values.get(name, VOC_CLASSES.index(name) + 1 if name in VOC_CLASSES else None)
        assert masks[id_][y, x] == expected, (id_, x, y, name)


def test_shares_of_the_labels(dataset: Dataset) -> None:
    assert {sample.id for sample in dataset.samples} == set(SHARES)
    for sample in dataset.samples:
        mask = read_mask(sample.mask)
        for name, share in SHARES[sample.id].items():
            assert (mask == VOC_CLASSES.index(name) + 1).mean() == pytest.approx(share, rel=0.01)


def test_images_masks_and_labels_fit_together(dataset: Dataset) -> None:
    assert dataset.name == "examples"
    assert dataset.classes == VOC_CLASSES
    assert not dataset.failures
    for sample in dataset.samples:
        image, mask = read_image(sample.image), read_mask(sample.mask)
        assert image.shape[:2] == mask.shape
        assert max(mask.shape) <= 640
        present = set(np.unique(mask)) - {0, IGNORE}
        assert present == {label + 1 for label in sample.labels}


def test_a_label_never_touches_another(dataset: Dataset) -> None:
    for sample in dataset.samples:
        mask = read_mask(sample.mask).astype(int)
        if sample.id == "photographer-motorcycle":
            continue  # its halves meet without a band
        for first, second in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            edge = first != second
            assert ((first == IGNORE) | (second == IGNORE))[edge].all()


def test_masks_are_palette_pngs_with_the_colours_of_voc(dataset: Dataset) -> None:
    for sample in dataset.samples:
        with Image.open(sample.mask) as image:
            assert (image.mode, image.format) == ("P", "PNG")
            np.testing.assert_array_equal(np.reshape(image.getpalette(), (-1, 3)), voc_palette())


def test_the_label_file_says_the_same(dataset: Dataset) -> None:
    table = read_labels(dataset.root / "labels.csv")
    assert table.names() == ("cat", "motorbike", "person")
    assert [table.indices(s.id, VOC_CLASSES) for s in dataset.samples] == [
        s.labels for s in dataset.samples
    ]


def test_writing_again_changes_nothing_and_repairs_what_is_gone(tmp_path: Path) -> None:
    write_examples(tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    write_examples(tmp_path)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before

    for gone in ("SegmentationClass/cat.png", "JPEGImages/motorcycle.png", "labels.csv"):
        (tmp_path / gone).unlink()
        write_examples(tmp_path)
        assert {path: path.read_bytes() for path in files} == {
            path: content for path, (_, content) in before.items()
        }


def test_the_folder_itself_can_be_named_too(tmp_path: Path) -> None:
    made = open_examples(root=tmp_path)
    assert open_examples(root=made.root) == made
    assert [path.name for path in tmp_path.iterdir()] == ["examples"]


def test_outlines_of_another_version_are_drawn_anew(tmp_path: Path) -> None:
    write_examples(tmp_path)
    mask = tmp_path / "SegmentationClass" / "cat.png"
    good = mask.read_bytes()
    mask.write_bytes(b"old")
    (tmp_path / "examples.json").write_text('{"photos": []}')
    write_examples(tmp_path)
    assert mask.read_bytes() == good


def test_without_scikit_image_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match=r'pip install "clipes\[examples\]"'):
        open_examples(root=tmp_path)


def test_missing_and_changed_photos_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(submodule_search_locations=[str(tmp_path / "skimage")])
    monkeypatch.setattr(module, "find_spec", lambda name: fake)
    with pytest.raises(DatasetError, match=r"without .*chelsea"):
        write_examples(tmp_path / "out")
    (tmp_path / "skimage" / "data").mkdir(parents=True)
    Image.new("RGB", (451, 300)).save(tmp_path / "skimage" / "data" / "chelsea.png")
    with pytest.raises(DatasetError, match="not the photo that the outlines were drawn on"):
        write_examples(tmp_path / "out")


def test_other_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="20 classes of Pascal VOC"):
        open_examples(root=tmp_path, classes=("cat", "person"))


def test_every_photo_is_credited_and_its_outlines_lie_inside_it() -> None:
    text = (resources.files("clipes.datasets") / "examples.json").read_text("utf-8")
    for photo in json.loads(text)["photos"]:
        assert photo["credit"]
        assert photo["licence"]
        height, width = read_image(module._photo_folder() / photo["file"]).shape[:2]
        for region in photo["regions"]:
            outline = np.array(region["outline"])
            assert (outline >= 0).all()
            assert (outline <= [width, height]).all()


def test_a_photo_is_resized_together_with_its_outlines() -> None:
    text = (resources.files("clipes.datasets") / "examples.json").read_text("utf-8")
    (photo,) = (photo for photo in json.loads(text)["photos"] if "crop" in photo)
    small_image, small = draw(photo, module._photo_folder(), 250)
    large_image, large = draw(photo, module._photo_folder(), 500)
    assert small_image.shape == (250, 340, 3)
    assert large_image.shape == (500, 681, 3)
    halved = large[::2, :-1:2]
    decided = (halved != IGNORE) & (small != IGNORE)
    assert decided.mean() > 0.85
    np.testing.assert_array_equal(halved[decided], small[decided])


def test_a_collage_is_its_photos_side_by_side(dataset: Dataset) -> None:
    (collage,) = (sample for sample in dataset.samples if sample.id == "photographer-motorcycle")
    assert collage.labels == (VOC_CLASSES.index("person"), VOC_CLASSES.index("motorbike"))
    mask = read_mask(collage.mask)
    assert set(np.unique(mask[:, :256])) == {0, VOC_CLASSES.index("person") + 1, IGNORE}
    assert set(np.unique(mask[:, 256:])) == {0, VOC_CLASSES.index("motorbike") + 1, IGNORE}
