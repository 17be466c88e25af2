from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipes.images import write_mask
from clipes.metrics import Scores
from clipes.overlays import CONFIDENCE, ramp
from clipes.report import ReportItem, write_report
from clipes.types import IGNORE, CamMaps, Failure, PseudoLabel

CLASSES = ("cat", "dog & <b>wolf</b>", "bird")
VOID = {"meta", "img", "br", "link", "input"}
SCORES = {
    "CAM": Scores(0.7, 0.8, 1.0, (0.9, 0.5, None, None), 2),
    "CRF <0.95>": Scores(0.75, 0.85, 0.98, (0.95, 0.55, 0.25, None), 2),
}


class Page(HTMLParser):
    """Collects what a test asks about, and fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self) -> list[Image.Image]:
        found = []
        for attributes in self.all("img"):
            kind, _, data = attributes["src"].partition(";base64,")
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            assert kind == f"data:image/{str(picture.format).lower()}"
            assert picture.size == (int(attributes["width"]), int(attributes["height"]))
            found.append(picture)
        return found


def make_item(
    folder: Path,
    id_: str,
    labels: tuple[int, ...] = (0,),
    size: tuple[int, int] = (48, 64),
    *,
    refined: bool = True,
    truth: bool = True,
) -> ReportItem:
    rng = np.random.default_rng(len(id_))
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / f"{id_}.png"
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(image)
    values = np.array([0, *(label + 1 for label in labels)], np.uint8)
    true = rng.choice(values, size)
    true[0, 0] = IGNORE
    pseudo = PseudoLabel(rng.choice(values, size), rng.random(size, dtype=np.float32))
    if truth:
        write_mask(folder / "truth" / f"{id_}.png", true)
    return ReportItem(
        id_,
        image,
        CamMaps(np.array(labels), rng.random((len(labels), 3, 4), dtype=np.float32), size),
        pseudo if refined else None,
        folder / "truth" / f"{id_}.png" if truth else None,
    )


def make_page(tmp_path: Path, items: list[ReportItem], **options) -> Page:
    options = {"title": "A run", "classes": CLASSES, "facts": {"images": "2"}} | options
    scores = options.pop("scores", SCORES)
    path = write_report(tmp_path / "run", items, scores, **options)
    assert path == tmp_path / "run" / "report" / "index.html"
    return Page(path.read_text("utf-8"))


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    page = make_page(tmp_path, [make_item(tmp_path, "a"), make_item(tmp_path, "bb", (0, 2))])
    for _, attributes in page.tags:
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
    assert not page.all("link")
    text = (tmp_path / "run" / "report" / "index.html").read_text("utf-8")
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    (policy,) = (a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert [path.name for path in (tmp_path / "run" / "report").iterdir()] == ["index.html"]


def test_each_image_shows_itself_its_maps_mask_confidence_and_truth(tmp_path: Path) -> None:
    items = [
        make_item(tmp_path, "a", (1,), (48, 64)),
        make_item(tmp_path, "bb", (2, 0), (300, 90)),
        make_item(tmp_path, "ccc", (0,), (20, 30), refined=False, truth=False),
    ]
    page = make_page(tmp_path, items, side=100)
    expected = [(64, 48)] * 5 + [(30, 100)] * 6 + [(30, 20)] * 2
    assert [picture.size for picture in page.pictures()] == expected
    alts = [attributes["alt"] for attributes in page.all("img")]
    assert alts[5:11] == [
        "bb: image",
        "bb: map of bird",
        "bb: map of cat",
        "bb: mask",
        "bb: confidence",
        "bb: ground truth",
    ]


def test_confidence_is_shown_in_exactly_the_colours_of_its_bar(tmp_path: Path) -> None:
    item = make_item(tmp_path, "a")
    page = make_page(tmp_path, [item])
    shown = np.array(page.pictures()[3].convert("RGB"))
    steps = np.rint(item.pseudo.confidence * 255)
    np.testing.assert_array_equal(shown, ramp(CONFIDENCE, steps / 255))


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=x>'
    page = make_page(
        tmp_path,
        [
            make_item(tmp_path, "a", (1,)),
            ReportItem(evil, Path("gone.png"), make_item(tmp_path, "b").maps),
        ],
        title=f"T {evil}",
        facts={f"F {evil}": f"V {evil}"},
        note=f"N {evil}",
        scores={f"S {evil}": SCORES["CRF <0.95>"]},
    )
    assert len(page.all("script")) == 1
    assert len(page.all("img")) == 5
    assert not page.all("b") or all("title" in attributes for attributes in page.all("b"))
    for letter in "TFVNS":
        assert f"{letter} {evil}" in page.text
    assert evil in page.text
    assert "dog & <b>wolf</b>" in page.text


def test_scores_are_told_for_every_stage_and_class(tmp_path: Path) -> None:
    page = make_page(tmp_path, [])
    assert "CAM 70.0 % mIoU pixel accuracy 80.0 %" in page.text
    assert "CRF <0.95> 75.0 % mIoU pixel accuracy 85.0 % pixels covered 98.0 %" in page.text
    assert "background 90.0 95.0" in page.text
    assert "cat 50.0 55.0" in page.text
    assert "dog & <b>wolf</b> – 25.0" in page.text
    assert "bird" not in page.text, "neither stage nor truth holds it"
    widths = [attributes["style"] for attributes in page.all("i")]
    assert widths == [f"width:{w:.1f}%" for w in (90, 95, 50, 55, 0, 25)]


@pytest.mark.parametrize("scores", [None, {}])
def test_without_ground_truth_there_are_no_scores(tmp_path: Path, scores) -> None:
    page = make_page(tmp_path, [make_item(tmp_path, "a", truth=False)], scores=scores)
    assert "ground truth" not in page.text.lower()
    assert "mIoU" not in page.text


def test_the_note_is_there_only_if_there_is_one(tmp_path: Path) -> None:
    assert "stand-in" in make_page(tmp_path, [], note="stand-in text vectors").text
    assert "Note." not in make_page(tmp_path, []).text


def test_the_score_of_an_image_is_the_mean_over_its_labels(tmp_path: Path) -> None:
    item = make_item(tmp_path, "a", (0, 2))
    truth = np.array(Image.open(item.truth))
    ious = []
    for label in (0, 1, 3):
        both = union = 0
        for t, p in zip(truth.ravel(), item.pseudo.mask.ravel(), strict=True):
            if t != IGNORE:
                both += t == label and p == label
                union += t == label or p == label
        ious.append(both / union)
    (article,) = make_page(tmp_path, [item]).all("article")
    assert float(article["data-iou"]) == pytest.approx(np.mean(ious), abs=1e-4)


def test_a_truth_that_is_all_ignored_gives_no_score(tmp_path: Path) -> None:
    item = make_item(tmp_path, "a")
    write_mask(item.truth, np.full((48, 64), IGNORE, np.uint8))
    (article,) = make_page(tmp_path, [item]).all("article")
    assert "data-iou" not in article


def test_an_image_that_cannot_be_shown_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    gone = make_item(tmp_path, "gone")
    gone.image.unlink()
    resized = make_item(tmp_path, "resized")
    Image.new("RGB", (10, 10)).save(resized.image)
    other = make_item(tmp_path, "other")
    other = ReportItem("other", other.image, CamMaps(np.array([7]), other.maps.maps, (48, 64)))
    wrong = make_item(tmp_path, "wrong")
    write_mask(wrong.truth, np.zeros((9, 9), np.uint8))
    failures: list[Failure] = []
    page = make_page(
        tmp_path,
        [gone, resized, other, wrong, make_item(tmp_path, "fine")],
        report=failures.append,
    )
    assert [failure.id for failure in failures] == ["gone", "resized", "other", "wrong"]
    assert len(page.pictures()) == 5
    assert "its maps are for 48 x 64" in page.text
    assert "there are 3 classes" in page.text
    assert page.text.count("Cannot be shown") == 4


def test_images_are_written_one_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "report"
    sizes = []

    def items() -> Iterator[ReportItem]:
        for index in range(3):
            sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
            yield make_item(tmp_path, f"image{index}", size=(200, 200))

    write_report(tmp_path / "run", items(), None, title="t", classes=CLASSES, facts={})
    assert sizes[2] - sizes[1] > 50_000, "the page grows while the images are still coming"


def test_a_page_that_breaks_off_leaves_the_old_one(tmp_path: Path) -> None:
    make_page(tmp_path, [], title="old")

    def items() -> Iterator[ReportItem]:
        yield make_item(tmp_path, "a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "run", items(), None, title="new", classes=CLASSES, facts={})
    (page,) = (tmp_path / "run" / "report").iterdir()
    assert "old" in page.read_text("utf-8")
