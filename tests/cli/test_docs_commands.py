"""Every command of the documentation runs as it stands there, page by page, in order."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clipes.cli import app
from clipes.datasets import COCO_CLASSES
from clipes.disk.images import read_mask, write_mask
from clipes.weights import cache, read_state_dict
from clipes.weights.sources import get_model
from tests.dino_support import cache_dino

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    "bench": "takes minutes; tests/integration/test_bench.py runs one round",
    "train-seg": "takes minutes; tests/cli/test_train_seg.py runs it in small",
    "relabel": "needs what train-seg makes; tests/cli/test_relabel.py runs it",
    "predict": "needs what train-seg makes; tests/cli/test_train_seg.py runs it",
}
NEEDS_SHARED = "clipes prompts fit --data ../shared/"  # how the shipped vectors were made: minutes
_OBJECT = "<object><name>{}</name><difficult>0</difficult></object>"
_VOCABULARY = """
classes = ["cat", "sofa"]
background = ["wall", "floor"]
template = "a clean origami {}."
[synonyms]
sofa = ["sofa", "couch"]
"""


def commands(page: Path) -> list[str]:
    return re.findall(r"^    (clipes .*?)(?:\s+#.*)?$", page.read_text("utf-8"), re.MULTILINE)


def picture(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(rng.integers(0, 256, (8, 6, 3), dtype=np.uint8))
    small.resize((64, 80), Image.Resampling.BILINEAR).save(path)


def make_data(folder: Path) -> None:
    """A small VOC, COCO and folder of photos, where the documentation has its own."""
    voc, photos = folder / "datasets" / "voc" / "VOC2012", folder / "my-photos"
    coco = folder / "data" / "coco"
    (voc / "Annotations").mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    rows, images, annotations = ["image,labels"], [], []
    for number, names in enumerate((["cat"], ["sofa"], ["cat", "sofa"])):
        id_ = f"2007_{number:06}"
        picture(voc / "JPEGImages" / f"{id_}.jpg", number)
        (voc / "Annotations" / f"{id_}.xml").write_text(
            f"<annotation>{''.join(map(_OBJECT.format, names))}</annotation>"
        )
        truth = np.zeros((80, 64), np.uint8)
        truth[20:60, 10:50] = 8 if "cat" in names else 18
        write_mask(voc / "SegmentationClassAug" / f"{id_}.png", truth)
        picture(photos / "images" / f"IMG_{number}.jpg", number)
        rows.append(f"IMG_{number}.jpg,{';'.join(names)}")
        picture(coco / "val2014" / f"COCO_val2014_{number:012}.jpg", number)
        images.append({"id": number, "file_name": f"COCO_val2014_{number:012}.jpg",
                       "width": 64, "height": 80})  # fmt: skip
        outline = [[9, 9, 39, 9, 39, 39, 9, 39]]
        annotations.append({"id": number, "image_id": number, "category_id": 17, "iscrowd": 0,
                            "area": 900, "segmentation": outline})  # fmt: skip
    ids = sorted(path.stem for path in (voc / "JPEGImages").iterdir())
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(ids) + "\n")
    (photos / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "list.txt").write_text("IMG_0\nIMG_1\n")
    (folder / "my.toml").write_text(_VOCABULARY)
    (folder / "VOCdevkit").symlink_to(voc.parent, target_is_directory=True)
    ids_with_gaps = [1 + n for n in range(90) if 1 + n not in
                     (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # fmt: skip
    categories = [
        {"id": id_, "name": name} for id_, name in zip(ids_with_gaps, COCO_CLASSES, strict=True)
    ]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (coco / "annotations").mkdir()
    (coco / "annotations" / "instances_val2014.json").write_text(json.dumps(instances))


@pytest.fixture
def place(tiny_weights, tmp_path, monkeypatch):
    """A folder with data, two runs, and small weights in the cache under the name of the real."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPES_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    with cache.workspace(None) as work:
        weights = cache.Weights(
            name="openai",
            model="ViT-B-16",
            path=cache.path_of("ViT-B-16", "openai", None),
            sha256="0" * 64,
            has_text=True,
            recipe=get_model("ViT-B-16").recipe,
        )
        cache.save(read_state_dict(tiny_weights), weights, work)
    cache_dino()
    make_data(tmp_path)
    yield tmp_path
    torch.set_num_threads(threads)


def run(command: str) -> None:
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, f"{command}: {result.output}"


def run_here(page: Path) -> list[str]:
    return [
        line
        for line in commands(page)
        if shlex.split(line)[1] not in NOT_RUN and not line.startswith(NEEDS_SHARED)
    ]


@pytest.mark.parametrize("page", list(filter(run_here, PAGES)), ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, place):
    listed = run_here(page)
    if page.name in ("formats.md", "report.md"):
        listed = [*SETUP, *listed]
    for command in listed:
        words = shlex.split(command)
        if words[1] == "import" and not (place / words[3]).exists():
            correct(*words[2:6:3], place / words[3])
        run(command)


def correct(folder: str, kind: str, file: Path) -> None:
    """Write what a tool would return if nothing of a run's masks were to correct."""
    out = file.with_suffix("")
    run(f"clipes export {folder} --format {kind} --out {shlex.quote(str(out))}")
    (made,) = (path for path in out.rglob(f"*{file.suffix}") if path.name != "export.json")
    made.rename(file)


def test_the_python_of_the_readme_runs(place):
    readme = (ROOT / "README.md").read_text("utf-8")
    block = re.search(r"^    import clipes\n(?:    .*\n|\n)+", readme, re.MULTILINE)
    picture(place / "photo.jpg", 1)
    names = {}
    exec(textwrap.dedent(block.group()), names)
    assert names["pseudo"].mask.shape == (80, 64)
    assert read_mask(place / "mask.png").shape == (80, 64)
    assert len(list((place / "runs" / "mine" / "pseudo").glob("*.png"))) == 3


SETUP = [
    "clipes cam --dataset voc", "clipes refine runs/voc",
    "clipes cam --dataset folder --root my-photos", "clipes refine runs/folder",
]  # fmt: skip


def test_what_is_not_run_is_in_the_documentation():
    words = {shlex.split(line)[1] for page in PAGES for line in commands(page)}
    assert set(NOT_RUN) <= words
