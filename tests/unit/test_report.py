"""The page: complete, self-contained, bounded, and text from outside stays text."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from clipes.disk.images import write_mask
from clipes.errors import ArtifactError
from clipes.masks.scores import Scores
from clipes.report.charts import confidence_histogram, coverage_curve, training_curve
from clipes.report.measure import CurvePoint, Row, Tally
from clipes.report.overlays import CONFIDENCE, ramp
from clipes.report.page import Head, write_page, write_queue
from clipes.report.pictures import Figure, Pictures
from clipes.report.review import ClassSigns, Signs
from clipes.run.curve import CURVE, TrainingPoint, write_curve
from clipes.run.folder import Run
from clipes.run.record import TrainFacts, TrainSettings
from clipes.stages.report import ReportRequest, make_report
from clipes.types import Failure, PseudoLabel
from tests.heard import Heard
from tests.report_support import CLASSES, make_run

VOID = {"meta", "img", "br", "link", "input"}
EVIL = "\"><script>alert(1)</script><img src=x>'&amp;"
SCORES = {
    "CAM": Scores(0.7, 0.8, 1.0, (0.9, 0.5, None, None), 2),
    "CRF <0.95>": Scores(0.75, 0.85, 0.98, (0.95, 0.55, 0.25, None), 2),
}
IMAGES = {"a": (0,), "bb": (2, 0), "ccc": (1,)}


class Page(HTMLParser):
    """Collects what a test asks about, and fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.scripts: dict[str, str] = {}
        self._open: list[str] = []
        self._id = ""
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        self._id = dict(attrs).get("id") or ""
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("style", "script"):
            self.words.append(data)
        elif self._open[-1] == "script":
            self.scripts[self._id] = self.scripts.get(self._id, "") + data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def rows(self) -> list[list]:
        return json.loads(self.scripts["rows"])

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self) -> list[Image.Image]:
        found = []
        for attributes in self.all("img"):
            picture = decode(attributes["src"])
            assert picture.size == (int(attributes["width"]), int(attributes["height"]))
            found.append(picture)
        return found


def decode(uri: str) -> Image.Image:
    kind, _, data = uri.partition(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert kind == f"data:image/{str(picture.format).lower()}"
    return picture


def report_of(run: Run, **options: object) -> tuple[Page, list[Failure]]:
    heard = Heard()
    path, failures = make_report(ReportRequest(workers=1, **options), run, heard.listener)
    assert heard.failures == list(failures)
    assert path == run.root / "report" / "index.html"
    return Page(path.read_text("utf-8")), heard.failures


def written(tmp_path: Path, **options: object) -> Page:
    """A page of values that no run is needed for."""
    head = Head("T", CLASSES, {"images": "1"}, **options.pop("head", {}))
    rows = options.pop("rows", [Row("a", (0,), (4, 4), None, 1.0, ("cat: nothing labelled",))])
    scores = options.pop("scores", {})
    path = tmp_path / "page.html"
    write_page(path, head, rows, Tally(4), scores, options.pop("pictures", []))
    assert not options
    return Page(path.read_text("utf-8"))


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, IMAGES).run
    page, failures = report_of(run)
    assert failures == []
    for _, attributes in page.tags:
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
    assert not page.all("link")
    text = (run.root / "report" / "index.html").read_text("utf-8")
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert "innerHTML" not in text
    (policy,) = (a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    names = sorted(path.name for path in (run.root / "report").iterdir())
    assert names == ["index.html", "review.csv"]


def test_each_image_shows_itself_its_maps_mask_confidence_and_truth(tmp_path: Path) -> None:
    page, _ = report_of(make_run(tmp_path, IMAGES, (600, 180)).run)
    alts = {attributes["alt"] for attributes in page.all("img")}
    assert alts >= {
        "bb: image",
        "bb: map of bird",
        "bb: map of cat",
        "bb: mask",
        "bb: confidence",
        "bb: ground truth",
    }
    assert len(page.pictures()) == 5 + 6 + 5
    assert {picture.size for picture in page.pictures()} == {(120, 400)}
    templates = page.all("template")
    assert sorted(int(one["data-row"]) for one in templates) == [0, 1, 2]
    assert {decode(one["data-thumb"]).size for one in templates} == {(48, 160)}
    assert [row[0] for row in page.rows] == ["a", "bb", "ccc"]
    assert [row[1] for row in page.rows] == [[0], [2, 0], [1]]
    assert "confidence" in page.text


def test_an_unfinished_run_shows_its_maps(tmp_path: Path) -> None:
    run = make_run(tmp_path, IMAGES, refined=False, truth=False).run
    (run.root / "cams" / "a.npz").unlink()
    page, _ = report_of(run)
    assert "2 of 3 have maps" in page.text
    assert "2 of 2 images have no mask of the CRF yet" in page.text
    assert len(page.pictures()) == 4 + 3
    assert not page.all("svg")
    assert [row[4:6] for row in page.rows] == [[None, None]] * 2


def test_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"a": (0,)}).run
    (run.root / "cams" / "a.npz").unlink()
    with pytest.raises(ArtifactError, match="clipes cam"):
        report_of(run)


def test_facts_and_the_note_stand_at_the_top(tmp_path: Path) -> None:
    page, _ = report_of(make_run(tmp_path, IMAGES, note="vectors are stand-ins").run)
    for words in ("data set folder", "images 3", "weights registry", "preset default"):
        assert words in page.text
    assert "Note. Vectors are stand-ins." in page.text
    assert "clipes cam <x>" in page.text
    assert "Note." not in written(tmp_path).text


@pytest.mark.parametrize(("asked", "told"), [(None, "text tower"), ("v.npz", "from a file")])
def test_vectors_from_a_file_are_told_whoever_made_the_run(
    tmp_path: Path, asked: str | None, told: str
) -> None:
    made = make_run(tmp_path, IMAGES)
    made.run.note_fact("cam", "asked", {"text_features": asked})
    page, _ = report_of(made.run)
    assert f"class vectors {told}" in page.text


def test_the_segmenter_is_told_with_where_its_words_come_from(tmp_path: Path) -> None:
    made = make_run(tmp_path, IMAGES)
    trained = TrainSettings(
        {"name": "weakclip-small"}, 0, None, "ce", "none", None, None, None, 3, "auto", None
    )
    facts = TrainFacts(note="words: <learnt>")
    made.run.begin("train-seg", trained.to_dict(), "clipes train-seg", facts.to_dict())
    page, _ = report_of(made.run)
    assert "segmenter weakclip-small; words: <learnt>" in page.text


def test_confidence_is_shown_in_exactly_the_colours_of_its_bar(tmp_path: Path) -> None:
    made = make_run(tmp_path, {"a": (0,)})
    page, _ = report_of(made.run)
    shown = np.array(page.pictures()[3].convert("RGB"))
    stored = made.run.load_pseudo("a").confidence
    np.testing.assert_array_equal(shown, ramp(CONFIDENCE, np.rint(stored * 255) / 255))


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    row = Row(EVIL, (1,), (4, 4), None, 1.0, (f"R {EVIL}",), None, f"X {EVIL}")
    page = written(
        tmp_path,
        rows=[row, Row("ü </script>\u2028", (0,), (4, 4))],
        scores={f"S {EVIL}": SCORES["CRF <0.95>"]},
        head={"commands": [f"C {EVIL}"], "note": f"N {EVIL}", "shown": f"W {EVIL}"},
    )
    assert len(page.all("script")) == 3
    assert not page.all("img")
    assert all("title" in attributes for attributes in page.all("b"))
    for letter in "CNWS":
        assert f"{letter} {EVIL}" in page.text
    assert page.rows[0][0] == EVIL
    assert page.rows[0][6:] == [[f"R {EVIL}"], f"X {EVIL}"]
    assert page.rows[1][0] == "ü </script>\u2028"
    assert json.loads(page.scripts["classes"])[1][0] == "dog & <b>wolf</b>"


def test_names_of_files_stay_text_in_captions(tmp_path: Path) -> None:
    id_ = "ü <b>'x'&amp;"
    page, failures = report_of(make_run(tmp_path, {id_: (1,)}).run)
    assert failures == []
    assert f"{id_}: map of dog & <b>wolf</b>" in {one["alt"] for one in page.all("img")}
    assert page.rows[0][0] == id_


def test_names_of_classes_stay_text_wherever_they_stand(tmp_path: Path) -> None:
    name = "<b>&\"'"
    figures = [
        Figure("data:,", (4, 4), f"map of {name}", "Map", label=1),
        Figure("data:,", (4, 4), "mask", name, areas={1: 0.25}),
    ]
    signs = Signs((ClassSigns(0, 0.5, 0.25),), 0.1, 0.01)
    path = tmp_path / "page.html"
    write_page(
        path,
        Head(name, [name], {name: name}),
        [Row("a", (0,), (4, 4), signs, 1.0, (f"{name}: nothing labelled",))],
        Tally(2),
        {name: Scores(0.7, 0.8, 1.0, (0.9, 0.5), 2)},
        [Pictures(0, "data:,", tuple(figures))],
    )
    page = Page(path.read_text("utf-8"))
    assert [one["alt"] for one in page.all("img")] == [f"map of {name}", "mask"]
    assert [one["title"] for one in page.all("b")] == ["background", name]
    assert name in [one.get("title") for one in page.all("span")]
    # Headline twice, fact twice, stage and legend, class, class table, caption of map and mask.
    assert page.text.count(name) == 10
    assert json.loads(page.scripts["classes"])[0][0] == name


def test_scores_are_told_for_every_stage_and_class(tmp_path: Path) -> None:
    page = written(tmp_path, scores=SCORES)
    assert "CAM 70.0 % mIoU pixel accuracy 80.0 %" in page.text
    assert "CRF <0.95> 75.0 % mIoU pixel accuracy 85.0 % pixels covered 98.0 %" in page.text
    assert "background 90.0 95.0" in page.text
    assert "cat 50.0 55.0" in page.text
    assert "dog & <b>wolf</b> – 25.0" in page.text
    assert "bird" not in page.text, "neither stage nor truth holds it"
    widths = [attributes["style"] for attributes in page.all("i")]
    assert widths == [f"width:{w:.1f}%" for w in (90, 95, 50, 55, 0, 25)]


def test_a_segmenter_is_scored_beside_the_masks(tmp_path: Path) -> None:
    made = make_run(tmp_path, IMAGES)
    for id_, truth in made.truth.items():
        write_mask(made.run.root / "predictions" / f"{id_}.png", truth)
    page, _ = report_of(made.run)
    assert "segmenter, train 100.0 % mIoU" in page.text
    for id_, truth in made.truth.items():
        shown = PseudoLabel(np.where(truth == 255, 0, truth), np.ones(truth.shape, np.float32))
        made.run.relabelled.save_pseudo(id_, shown)
    write_mask(made.run.root / "predictions" / "a.png", np.zeros((1, 2), np.uint8))
    page, _ = report_of(made.run)
    assert "segmenter, train" not in page.text
    assert "relabelled 100.0 % mIoU" in page.text
    assert "CRF >= 0.95" in page.text


def test_classes_are_told_the_most_doubtful_first(tmp_path: Path) -> None:
    def seen(id_: str, value: float, *classes: ClassSigns) -> Row:
        labels = tuple(one.label for one in classes)
        return Row(id_, labels, (4, 4), Signs(classes, 0.1, 0.01), value)

    rows = [
        seen("a", 1.0, ClassSigns(0, 0.5, 0.25)),
        seen("b", 4.0, ClassSigns(0, 0.0, 1.0), ClassSigns(1, 0.2, 0.5)),
        Row("c", (2,), (4, 4), failure="gone"),
    ]
    words = written(tmp_path, rows=rows).text
    assert "dog & <b>wolf</b> 1 rare 0 50.0 4.00 cat 2 rare 1 37.5 2.50" in words
    assert "bird" not in words


def test_without_ground_truth_there_are_no_scores(tmp_path: Path) -> None:
    page, _ = report_of(make_run(tmp_path, IMAGES, truth=False).run)
    assert "against the ground truth" not in page.text
    assert "% mIoU" not in page.text
    assert len(page.all("svg")) == 1, "the histogram needs none"


def test_pictures_are_bounded_and_the_page_says_so(tmp_path: Path) -> None:
    images = {f"i{number:02}": (number % 3,) for number in range(30)}
    run = make_run(tmp_path, images, (40, 40)).run
    page, _ = report_of(run, large=2, thumbnails=9)
    assert len(page.all("template")) == 9
    assert len(page.pictures()) == 2 * 5
    assert len(page.rows) == 30
    assert "large pictures are in it for 2 images and thumbnails for 9" in page.text
    everything, _ = report_of(run)
    assert "pictures are in it" not in everything.text


def test_an_image_that_cannot_be_shown_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    made = make_run(tmp_path, {"gone": (0,), "cut": (0,), "fine": (1,)})
    (made.photos / "images" / "gone.png").write_bytes(b"")
    cut = made.photos / "images" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:2000])  # its header is whole
    page, failures = report_of(made.run)
    assert {failure.id for failure in failures} == {"gone", "cut"}
    assert len(page.pictures()) == 5
    assert [row[7] != "" for row in page.rows] == [row[0] != "fine" for row in page.rows]
    with (made.run.root / "report" / "review.csv").open(encoding="utf-8") as file:
        first, second, third = csv.DictReader(file)
    assert {first["image"], second["image"]} == {"gone", "cut"}
    assert first["reasons"].startswith("cannot be shown: ")
    assert third["image"] == "fine"


def test_the_queue_is_a_table_for_scripts(tmp_path: Path) -> None:
    rows = [
        Row("calm", (0,), (4, 4), None, 0.5, (), 0.75),
        Row('"x", y', (0, 1), (4, 4), None, 2.5, ("cat: nothing labelled", "two")),
    ]
    write_queue(tmp_path / "review.csv", rows, CLASSES)
    with (tmp_path / "review.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "place": "1",
        "image": '"x", y',
        "score": "2.5000",
        "reasons": "cat: nothing labelled; two",
        "labels": "cat;dog & <b>wolf</b>",
        "confident": "",
        "agreement": "",
        "miou": "",
    }
    assert (second["place"], second["image"], second["miou"]) == ("2", "calm", "0.7500")


def test_images_are_written_one_by_one(tmp_path: Path) -> None:
    sizes = []

    def pictures() -> Iterator[Pictures]:
        for _ in range(3):
            sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
            yield Pictures(0, "data:," + "x" * 100_000)

    written(tmp_path, pictures=pictures())
    assert sizes[2] - sizes[1] > 50_000, "the page grows while the images are still coming"


def test_what_a_killed_report_left_is_removed(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"a": (0,)}).run
    code = (
        "import os, sys, pathlib; from clipes.disk.files import atomic_write;"
        "context = atomic_write(pathlib.Path(sys.argv[1])); context.__enter__(); os._exit(1)"
    )
    page = run.root / "report" / "index.html"
    subprocess.run([sys.executable, "-c", code, page], check=False)
    assert [path.name[:7] for path in page.parent.iterdir()] == [".index-"]
    report_of(run)
    assert sorted(path.name for path in page.parent.iterdir()) == ["index.html", "review.csv"]


def test_a_page_that_breaks_off_leaves_the_old_one(tmp_path: Path) -> None:
    written(tmp_path, head={"note": "old"})

    def pictures() -> Iterator[Pictures]:
        yield Pictures(0, "data:,")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, pictures=pictures(), head={"note": "new"})
    (page,) = tmp_path.iterdir()
    assert "old" in page.read_text("utf-8")


POINTS = [CurvePoint(0.0, 1.0, 0.8, 0.6), CurvePoint(0.95, 0.98, 0.85, 0.7)]
POINTS += [CurvePoint(0.999, 0.02, 1.0, 1.0)]


def drawn(svg: str, kind: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg)  # also: it is well formed
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    found = [one for one in root.iter() if one.tag == kind]
    for one in found:
        for name, end in (("cx", width), ("cy", height), ("x", width), ("y", height)):
            assert 0 <= float(one.attrib.get(name, 0)) <= end
    return found


@pytest.mark.parametrize("points", [POINTS, POINTS[:1], [CurvePoint(0.0, 1.0, 0.0, 0.0)]])
def test_the_curve_goes_down_to_the_right_pixels(points: list[CurvePoint]) -> None:
    svg = coverage_curve(points)
    circles = [one for one in drawn(svg, "circle") if one.attrib["class"] == "miou"]
    assert len(circles) == len(points)
    xs = [float(one.attrib["cx"]) for one in circles]
    ys = [float(one.attrib["cy"]) for one in circles]
    assert xs == sorted(xs), "fewer pixels to the right"
    assert ys == sorted(ys, reverse=True), "a higher mIoU is higher"
    assert "coverage" in "".join(ElementTree.fromstring(svg).itertext())


@pytest.mark.parametrize("last", [2, 300, 30_000])
def test_the_curves_of_a_training_stay_in_their_frames(last: int) -> None:
    points = [TrainingPoint(1, 2.5, 1e-3, 0.9, 0.1), TrainingPoint(last, 0.02, 0.0, 0.9, 0.85)]
    for kind, name in (("loss", "loss"), ("miou", "mIoU with the labels that are learnt")):
        svg = training_curve(points, kind)
        first, second = drawn(svg, "circle")
        assert 58 <= float(first.attrib["cx"]) < float(second.attrib["cx"]) <= 624
        assert all(22 <= float(one.attrib["cy"]) <= 288 for one in (first, second))
        falls = float(first.attrib["cy"]) < float(second.attrib["cy"])
        assert falls == (kind == "loss")
        text = "".join(ElementTree.fromstring(svg).itertext())
        assert name in text
        assert f"update {last}" in text


def test_a_training_is_on_the_page_and_a_damaged_curve_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, IMAGES).run
    page, _ = report_of(run)
    assert "How the segmenter was trained" not in page.text
    write_curve(run.root, [TrainingPoint(n, 1 / n, 1e-3, 1.0, n / 9) for n in (1, 2, 3)])
    page, _ = report_of(run)
    assert "How the segmenter was trained" in page.text
    assert "update 3: 0.3333" in (run.root / "report" / "index.html").read_text("utf-8")
    (run.root / CURVE).write_text("nothing")
    heard = Heard()
    make_report(ReportRequest(), run, heard.listener)
    assert any("no curve of the training" in one and "damaged" in one for one in heard.said)


def test_the_numbers_of_the_curve_are_a_table(tmp_path: Path) -> None:
    run = make_run(tmp_path, IMAGES).run
    page, _ = report_of(run)
    dots = [one for one in page.all("circle") if one["class"] == "miou"]
    words = page.text.partition("mIoU, % 0 100.0 ")[2].partition(" Classes")[0].split()
    assert len(words) == 4 * len(dots) - 2
    text = (run.root / "report" / "index.html").read_text("utf-8")
    titles = re.findall(r"of at least ([\d.]+): ([\d.]+) % of the pixels, mIoU ([\d.]+) %", text)
    assert [f"{cut}, {kept}, {miou}" for cut, kept, miou in titles[1:]] == [
        f"{cut}, {kept}, {miou}"
        for cut, kept, miou in zip(words[2::4], words[3::4], words[5::4], strict=True)
    ]


def test_bars_are_as_high_as_their_share() -> None:
    bars = [(0.0, 0.5, 0.1), (0.5, 0.95, 0.0), (0.95, 0.99, 0.3), (0.99, 1.0, 0.6)]
    found = drawn(confidence_histogram(bars), "rect")
    heights = np.array([float(one.attrib["height"]) for one in found])
    np.testing.assert_allclose(heights / heights[3], [1 / 6, 0, 0.5, 1], atol=1e-2)
    assert [one.attrib["class"] for one in found] == ["unsure", "unsure", "sure", "sure"]
