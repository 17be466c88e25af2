"""A small run to export, and who keeps what an export says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from clipes.formats import Options
from clipes.run.folder import Run
from clipes.stages.export import ExportRequest, export
from clipes.types import IGNORE, CamMaps, PseudoLabel
from tests.heard import Heard

CLASSES = ("cat, black", "dog & <b> \"x\" 'y'", "Käse 猫", "bus")
LABELS = (CLASSES[3], CLASSES[0])
SIZES = {"one": (1, 1), "odd": (7, 5), "row": (1, 9), "holes": (23, 31), "empty": (6, 8)}
MU = 0.95

some = settings(max_examples=60, deadline=None)
small_masks = hnp.arrays(
    np.uint8,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.sampled_from([0, 0, 1, 2, IGNORE]),
)
binary_masks = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)).map(
    lambda values: values % 2
)


def holes(size: tuple[int, int]) -> np.ndarray:
    """A region with a hole, in the hole another with a hole, and a diagonal."""
    mask = np.zeros(size, np.uint8)
    mask[2:20, 2:24] = 1
    mask[5:17, 6:20] = 0
    mask[7:15, 8:18] = 3
    mask[9:12, 10:14] = 1
    mask[10, 11] = 0
    mask[np.arange(8), np.arange(23, 31)] = 4
    return mask


def make_masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {name: rng.integers(0, 5, size).astype(np.uint8) for name, size in SIZES.items()}
    found["one"][:] = 4
    found["holes"] = holes(SIZES["holes"])
    found["empty"][:] = 0
    return found


def make_confidence() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.choice([0.5, 0.99], size).astype(np.float32) for name, size in SIZES.items()}


def only_sure(masks: dict, confidence: dict) -> dict[str, np.ndarray]:
    return {name: np.where(confidence[name] < MU, IGNORE, masks[name]) for name in masks}


def make_export_run(tmp_path: Path, masks: dict, confidence: dict) -> Run:
    """A run on a small folder; every image is labelled with two classes."""
    root = tmp_path / "photos"
    root.mkdir()
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), "utf-8")
    labels = {f"{name}.png": LABELS for name in SIZES}
    (root / "labels.json").write_text(json.dumps(labels))
    run = Run(tmp_path / "runs" / "voc-like")
    settings = {"dataset": "folder", "split": None, "labels": None, "classes": CLASSES}
    run.begin("cam", settings, "clipes cam", {"root": str(root)})
    rng = np.random.default_rng(2)
    for name, size in SIZES.items():
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
        run.save_pseudo(name, PseudoLabel(masks[name], confidence[name]))
        maps = rng.random((2, 2, 3)).astype(np.float32)
        run.save_cams(name, CamMaps(np.array([3, 0]), maps, size))
    return run


class Exporter:
    """Exports and keeps what was said."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.heard = Heard()
        self.said, self.failures = self.heard.said, self.heard.failures

    @property
    def steps(self) -> list[tuple[int, int]]:
        return self.heard.steps["export"]

    def __call__(
        self, name: str, out: Path | None = None, first: int | None = None, **options: object
    ) -> Path:
        chosen = Options(**options)
        request = ExportRequest(name, None, out, chosen, "clipes export", first=first)
        folder, self.summary = export(request, self.run, self.heard.listener)
        assert not self.failures
        return folder


def rename(run: Run, name: str, other: str) -> None:
    """Call a class otherwise, in the run and in its data set."""
    manifest = json.loads(run.manifest_path.read_text("utf-8"))
    classes = manifest["stages"]["cam"]["settings"]["classes"]
    classes[classes.index(name)] = other
    run.manifest_path.write_text(json.dumps(manifest))
    labels = Path(run.stage("cam")["facts"]["root"]) / "labels.json"
    labels.write_text(labels.read_text().replace(json.dumps(name), json.dumps(other)))


def assert_masks(read: Callable[[str], np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, mask in expected.items():
        np.testing.assert_array_equal(read(name), mask, err_msg=name)
