"""The curve of corrections is what replacing masks on disk gives, and the queue's order counts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from clipes.listener import Listener
from clipes.run.folder import Run
from clipes.stages.evaluate import evaluate_run
from clipes.stages.export import ExportRequest, export
from clipes.stages.import_masks import ImportRequest, import_masks
from clipes.types import PseudoLabel
from tests.report_support import make_run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
IMAGES = {f"i{number:02}": (number % 3,) for number in range(20)}
WRONG = {"i03", "i04", "i11", "i17"}


@pytest.fixture(scope="module")
def loop() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield import_module("loop")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Masks that are right and sure, but for some that are noise and unsure."""
    made = make_run(tmp_path, IMAGES)
    for id_, truth in made.truth.items():
        if id_ not in WRONG:
            right = np.where(truth == 255, 0, truth).astype(np.uint8)
            sure = np.full(truth.shape, 0.999, np.float32)
            made.run.save_pseudo(id_, PseudoLabel(right, sure))
    return made.run


def miou(run: Run) -> float:
    stages = evaluate_run(run, None, None, [1.0], Listener()).stages
    return stages.get("CRF, corrected", stages["CRF"]).miou


def test_the_queue_beats_all_random_orders_where_it_can_tell(loop: ModuleType, run: Run) -> None:
    points = loop.curve(run, 50)
    assert [point.images for point in points] == [0, 1, 2, 4]
    assert points[0].queue == points[0].random == points[0].best_random == points[0].known
    assert points[0].queue == pytest.approx(miou(run))
    for point in points[1:]:
        assert point.best_random <= point.queue
    assert points[-1].queue == 1.0 == points[-1].known
    assert loop.table(points).splitlines()[-1].startswith("| 20 % | 4 | 100.00 | ")


def test_a_person_who_goes_the_way_of_the_loop_gets_what_the_curve_says(
    loop: ModuleType, run: Run, tmp_path: Path
) -> None:
    """Export the first of the queue, mend them in the files, import: eval, and the next queue."""
    points = {point.images: point.queue for point in loop.curve(run, 1)}
    corrected: set[str] = set()
    for first, total in ((1, 1), (1, 2), (2, 4)):
        request = ExportRequest("voc", out=tmp_path / f"batch-{total}", first=first)
        folder, summary = export(request, run, Listener())
        assert summary.done == first
        masks = sorted((folder / "SegmentationClassAug").glob("*.png"))
        assert len(masks) == first
        for mask in masks:
            truth = tmp_path / "photos" / "masks" / mask.name
            mask.unlink()
            shutil.copy(truth, mask)
        import_masks(ImportRequest("voc", folder, "me"), run, Listener())
        corrected |= {mask.stem for mask in masks}
        assert len(corrected) == total
        assert miou(run) == pytest.approx(points[total])
    assert corrected == WRONG
