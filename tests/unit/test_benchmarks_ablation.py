"""The ablation's rows are what the product makes, and its table and curves what was counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from clipes.config import CamParams, get_preset
from clipes.disk.images import read_image, read_mask, write_mask
from clipes.errors import ArtifactError
from clipes.maps.looks import Looks
from clipes.maps.maker import CamMaker, Sight
from clipes.masks.pseudo import cam_mask
from clipes.masks.scores import ConfusionMatrix
from clipes.run.folder import Run
from clipes.towers.clip import Backbone
from clipes.towers.load import load_visual
from clipes.types import IGNORE, CamMaps, Sample
from clipes.weights import read_state_dict
from clipes.words.features import TextFeatures, unit_rows
from tests.report_support import make_run
from tests.torch_threads import torch_threads

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CLASSES, WORDS = ("cat", "dog", "sofa"), ("grass", "wall")
LABELS = [(0,), (0, 2), (1,), (1, 2)]


@pytest.fixture(scope="module", autouse=True)
def _places() -> Iterator[None]:
    with torch_threads(1), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return import_module("ablation")


@pytest.fixture(scope="module")
def tapes() -> ModuleType:
    return import_module("tapes")


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    folder, made = tmp_path_factory.mktemp("photos"), []
    for number, labels in enumerate(LABELS):
        rng = np.random.default_rng(number)
        small = Image.fromarray(rng.integers(0, 256, (7, 6, 3), dtype=np.uint8))
        small.resize((96, 112), Image.Resampling.BILINEAR).save(folder / f"{number}.png")
        truth = rng.permutation([0, *(1 + label for label in labels)]).astype(np.uint8)
        write_mask(folder / f"{number}_truth.png", np.resize(np.repeat(truth, 40), (112, 96)))
        made.append(Sample(str(number), folder / f"{number}.png", labels,
                           folder / f"{number}_truth.png"))  # fmt: skip
    return made


@pytest.fixture(scope="module")
def text(towers_backbones) -> TextFeatures:
    width = towers_backbones[0].visual.proj.shape[1]
    rows = unit_rows(np.random.default_rng(9).standard_normal((5, width)))
    return TextFeatures(CLASSES, WORDS, rows[:3], rows[3:], "tiny")


@pytest.fixture(scope="module")
def towers_backbones(tiny_weights: Path) -> list[Backbone]:
    state = read_state_dict(tiny_weights)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    return [
        Backbone(load_visual(state), 100.0, mean, std, fp16_positions=rounded)
        for rounded in (True, False)
    ]


@pytest.fixture(scope="module")
def towers(tapes, towers_backbones, text):
    words = tapes.Words(*map(torch.from_numpy, (text.class_vectors, text.background_vectors)))
    return tapes.Towers(*towers_backbones, words)


@pytest.fixture(scope="module")
def taped(tapes, towers, samples):
    params = get_preset("reference").cam
    return [tapes.make_tape(towers, one, params, mirrored=True, alike=True) for one in samples]


def find(ablation, section: str, name: str):
    (row,) = (
        row
        for part in ablation.sections("voc")
        if part.title.startswith(section)
        for row in part.rows
        if row.name == name
    )
    return row


def look(maker: CamMaker, sample: Sample) -> Sight:
    (sight,) = maker.look([maker.prepare(read_image(sample.image), sample.labels)])
    return sight


def product(backbone: Backbone, text: TextFeatures, params: CamParams, samples, most: int):
    """What ``clipes cam`` makes of the samples if the first ``most`` say what classes look like."""
    maker = CamMaker(backbone, text, params)
    if params.patches is not None and most:
        total = maker.no_statistics()
        for one in samples[:most]:
            total.add(maker.statistics(look(maker, one), params.patches))
        looks = Looks.of(total, params.patches)
        assert looks is not None
        maker = maker.with_looks(looks)
    return [
        maker.maps(look(maker, one), seen=number < most).maps for number, one in enumerate(samples)
    ]


@pytest.mark.parametrize(
    ("section", "name", "most"),
    [
        ("Published", "published", 0),
        ("One image", "fast", 0),
        ("One image", "lambda 0.5", 0),
        ("With what", "default", 4),
        ("With what", "ridge 0.1", 4),
        ("Whose", "a sample of 10, and its own", 4),
    ],
)
def test_a_row_makes_the_products_maps(
    ablation, tapes, towers, taped, samples, text, section, name, most
):
    row = find(ablation, section, name)
    backbone = towers.published if name == "published" else towers.patches
    expected = product(backbone, text, row.cam, samples, most)
    got = tapes.RowMaps(row, taped, towers)
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)
    assert got.seconds > 0


def test_every_row_runs_and_stands_in_the_table(ablation, towers, taped):
    for kind in ("voc", "coco"):
        given = ablation.sections(kind)
        names = [(part.title, row.name) for part in given for row in part.rows]
        assert len(set(names)) == len(names) > 50
    given = ablation.sections("voc")
    found = ablation.run(given, taped, towers, crf="main")
    assert [(one.section, one.row) for one in found] == [
        (part.title, row.name) for part in given for row in part.rows
    ]
    rows = [row for part in given for row in part.rows]
    for one, row in zip(found, rows, strict=True):
        assert (one.crf is not None) == row.main
        assert all(0 < value <= 100 for value in (one.cam.half_a, one.cam.half_b, one.cam.full))
    assert len({round(one.cam.full, 6) for one in found}) > len(found) / 2, "rows do nothing"
    lines = ablation.table(found, found[0].cam.seconds).splitlines()
    assert len(lines) == 2 + len(given) + len(found)
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| published |")
    assert " 1.00 | " in lines[3]


def test_scores_are_those_of_the_halves(ablation, tapes, towers, taped, samples):
    row = find(ablation, "Published", "published")
    score, masks = tapes.score_row(row, taped, towers, crf=False)
    assert masks is None
    for got, chosen in ((score.half_a, (0, 2)), (score.half_b, (1, 3)), (score.full, range(4))):
        matrix = ConfusionMatrix(1 + len(CLASSES))
        for number in chosen:
            tape = taped[number]
            cams = CamMaps(np.array(tape.sample.labels), tape.published, tape.size)
            matrix.update(read_mask(samples[number].mask), cam_mask(cams, row.exponent))
        assert got == pytest.approx(100 * matrix.scores().miou)


def test_held_out_looks_are_those_of_the_others(ablation, tapes, towers, taped, samples, text):
    """Four images are four parts: each is left out alone."""
    row = find(ablation, "Whose", "other images only, 16 parts")
    patches = row.cam.patches
    for number, maps in enumerate(tapes.RowMaps(row, taped, towers)):
        maker = CamMaker(towers.patches, text, row.cam)
        total = maker.no_statistics()
        for one in (*samples[:number], *samples[number + 1 :]):
            total.add(maker.statistics(look(maker, one), patches))
        maker = maker.with_looks(Looks.of(total, patches))
        theirs = maker.maps(look(maker, samples[number]), seen=True).maps
        np.testing.assert_allclose(maps, theirs, atol=2e-5)


def test_rows_are_chosen_by_words(ablation):
    given = ablation.sections("voc")
    assert ablation.chosen(given, []) == given
    (only,) = ablation.chosen(given, ["Published: published"])
    assert [row.name for row in only.rows] == ["published"]
    left = ablation.chosen(given, ["Published"], ["published"])
    assert [row.name for part in left for row in part.rows] == [given[0].rows[1].name]


@pytest.fixture(scope="module")
def confidence() -> ModuleType:
    return import_module("confidence")


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
