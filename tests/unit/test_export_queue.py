"""An export of the first images of the review queue."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipes.config import get_preset
from clipes.errors import ArtifactError, RunConflictError
from clipes.run.folder import Run
from clipes.stages.import_masks import ImportRequest, import_masks
from clipes.stages.report import ReportRequest, make_report
from clipes.types import CamMaps, PseudoLabel
from tests.export_support import Exporter
from tests.heard import Heard
from tests.report_support import make_run

IMAGES = {"a": (0,), "bb": (2, 0), "ccc": (1,), "d": (2,), "e": (1, 0)}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path, IMAGES).run


@pytest.fixture
def do(run: Run) -> Exporter:
    return Exporter(run)


def queue_of(run: Run) -> list[str]:
    page, failures = make_report(ReportRequest(workers=1), run, Heard().listener)
    assert not failures
    with page.with_name("review.csv").open(encoding="utf-8", newline="") as file:
        return [row["image"] for row in csv.DictReader(file)]


def images_of(folder: Path) -> list[str]:
    content = json.loads((folder / "instances.json").read_text("utf-8"))
    return [Path(image["file_name"]).stem for image in content["images"]]


def import_(run: Run, path: Path, name: str) -> None:
    import_masks(ImportRequest(name, path, "me"), run, Heard().listener)


def test_the_first_of_the_queue_alone_in_its_order(do: Exporter, run: Run, tmp_path: Path) -> None:
    queue = queue_of(run)
    assert queue != sorted(queue)
    folder = do("coco", first=2)
    assert folder == run.root / "export" / "coco-first-2"
    assert images_of(folder) == queue[:2]
    assert do.said == ["the first 2 of 5 images in the review queue"]
    import_(run, folder / "instances.json", "coco")
    assert queue_of(run) == queue[2:]
    assert images_of(do("coco", first=2)) == queue[2:4]
    assert do.said[-1] == "the first 2 of 3 images in the review queue"
    assert images_of(do("coco", first=99)) == queue[2:]
    assert set(images_of(do("coco", tmp_path / "all"))) == set(queue), "corrected ones, too"


def test_the_next_replace_what_nobody_edited(do: Exporter, run: Run) -> None:
    first, second, third, *_ = queue_of(run)
    folder = do("labelme", first=2)
    mended = folder / f"{first}.json"
    mended.write_text(mended.read_text("utf-8") + " ", "utf-8")
    import_(run, mended, "labelme")
    do("labelme", first=2)
    assert {path.stem for path in folder.glob("*.json")} == {first, second, third, "export"}
    assert "not in this export any more; they were edited" in do.said[-1]
    import_(run, folder / f"{second}.json", "labelme")
    do("labelme", first=2)
    assert not (folder / f"{second}.json").exists()
    assert do.said[-2].startswith("removed: the files of 1 image (the first is ")


def test_images_that_cannot_be_used_take_no_place(do: Exporter, run: Run) -> None:
    queue = queue_of(run)
    run.cams_path(queue[0]).write_bytes(b"no maps")
    assert images_of(do("coco", first=2)) == queue[1:3]


def test_a_queue_without_images_is_told(do: Exporter, run: Run) -> None:
    import_(run, do("coco") / "instances.json", "coco")
    with pytest.raises(ArtifactError, match=r"is in the review queue; see 'clipes report"):
        do("coco", first=1)


def test_another_number_needs_another_folder(do: Exporter, tmp_path: Path) -> None:
    do("coco", tmp_path / "some", first=2)
    with pytest.raises(RunConflictError, match="first = 2, not 3"):
        do("coco", tmp_path / "some", first=3)


def test_a_lone_image_is_called_as_among_all(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "photos" / name / "1.png")
    run, preset = Run(tmp_path / "run"), get_preset("default").to_dict()
    settings = {"dataset": "folder", "classes": ["cat", "dog"], "preset": preset}
    run.begin("cam", settings, "clipes cam", {"root": str(tmp_path / "photos")})
    for label, id_ in enumerate(("cat_1", "dog_1")):
        maps = np.full((1, 1, 1), label, np.float32)
        run.save_cams(id_, CamMaps(np.array([label]), maps, (2, 2)))
        mask = np.full((2, 2), 2 * label, np.uint8)
        run.save_pseudo(id_, PseudoLabel(mask, np.ones((2, 2), np.float32)))
    content = json.loads((Exporter(run)("coco", first=1) / "instances.json").read_text("utf-8"))
    assert [image["file_name"] for image in content["images"]] == ["cat/1.png"]
