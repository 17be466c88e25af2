"""The curves of confidence are what was counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from clipes.disk.images import read_image, write_mask
from clipes.errors import ArtifactError
from clipes.run.folder import Run
from clipes.types import IGNORE
from tests.report_support import make_run

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def confidence() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield import_module("confidence")


def test_a_curve_is_what_a_loop_over_pixels_counts(confidence, tmp_path):
    made = make_run(tmp_path, {"a": (0,), "b": (0, 2)})
    truths = tmp_path / "truths"
    truths.mkdir()
    kept, right, gap = 0, 0, {}
    known = 0
    for id_, pseudo in made.pseudo.items():
        truth = np.random.default_rng(5).integers(0, 4, pseudo.mask.shape).astype(np.uint8)
        truth[0] = IGNORE
        write_mask(truths / f"{id_}.png", truth)
        stored = made.run.load_pseudo(id_)
        for true, label, sure in zip(
            truth.ravel(), stored.mask.ravel(), stored.confidence.ravel(), strict=True
        ):
            if true == IGNORE:
                continue
            known += 1
            kept += sure >= 0.9
            right += sure >= 0.9 and true == label
            step = min(math.floor(sure * 15), 14)
            gap[step] = gap.get(step, 0.0) + (true == label) - float(sure)
    curve = confidence.measure("mine", made.run, truths, (0.0, 0.9))
    assert curve.points[0.9].coverage == kept / known
    assert curve.points[0.9].pixel_accuracy == right / kept
    assert curve.calibration_error == pytest.approx(sum(map(abs, gap.values())) / known, rel=1e-5)
    assert confidence.table([curve]).splitlines()[2].startswith("| mine | all | 100.00 | ")


def test_without_ground_truth_there_is_no_curve(confidence, tmp_path):
    made = make_run(tmp_path, {"a": (0,)})
    with pytest.raises(ArtifactError, match="has ground truth in"):
        confidence.measure("mine", Run(made.run.root), tmp_path / "none")


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="only the picture needs matplotlib")
def test_the_picture(confidence, tmp_path):
    made = make_run(tmp_path, {"a": (0,), "b": (1,)})
    truths = tmp_path / "truths"
    truths.mkdir()
    for id_, pseudo in made.pseudo.items():
        write_mask(truths / f"{id_}.png", pseudo.mask)
    curve = confidence.measure("mine", made.run, truths)
    confidence.draw([curve, curve], tmp_path / "curve.png")
    assert read_image(tmp_path / "curve.png").std() > 1
