"""What tools for training read, by the rules of their own code."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from clipes.disk.images import read_mask, voc_palette
from clipes.run.folder import Run
from tests.export_support import (
    CLASSES,
    MU,
    SIZES,
    Exporter,
    assert_masks,
    make_confidence,
    make_export_run,
    make_masks,
    only_sure,
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
