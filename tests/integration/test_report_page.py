"""The report's page in a real browser: what its script shows for each state of the address."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import pytest
from PIL import Image

from clipes.listener import Listener
from clipes.stages.report import ReportRequest, make_report
from tests.report_support import CLASSES, make_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")

EVIL = "<b>ü&'"
COUNT = 150


class Shown(HTMLParser):
    """What a person sees of the images: cards in order, the pager, the dialog."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.cards: list[int] = []
        self.headings: list[str] = []
        self.options: list[str] = []
        self.text = ""
        self.dialog_open = False
        self.pictures = 0
        self._inert = 0
        self._tag = ""
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self._inert += tag in ("template", "script", "style")
        self._tag = tag
        if self._inert:
            return
        if tag == "article":
            self.cards.append(int(attributes["data-row"] or 0))
        self.dialog_open |= tag == "dialog" and "open" in attributes
        self.pictures += tag == "img"

    def handle_endtag(self, tag: str) -> None:
        self._inert -= tag in ("template", "script", "style")
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._inert:
            return
        self.text += data
        if self._tag == "h3":
            self.headings.append(data)
        if self._tag == "option":
            self.options.append(data)


Look = Callable[..., Shown]


def browse(page: Path, *arguments: str, state: dict[str, object]) -> str:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu"]
        command += [f"--user-data-dir={profile}", "--virtual-time-budget=5000", *arguments]
        address = f"{page.as_uri()}#{urlencode(state)}"
        done = subprocess.run(
            [*command, address], capture_output=True, text=True, check=True, timeout=120
        )
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = {f"i{number:03}": (number % 3,) for number in range(COUNT)}
    made = make_run(tmp_path_factory.mktemp("page"), images | {EVIL: (0, 1)}, (24, 32))
    request = ReportRequest(large=6, thumbnails=20, workers=1)
    path, failures = make_report(request, made.run, Listener())
    assert not failures
    return path


@pytest.fixture(scope="module")
def look(page: Path) -> Look:
    return lambda **state: Shown(browse(page, "--dump-dom", state=state))


@pytest.fixture(scope="module")
def rows(page: Path) -> list[list]:
    found = re.search(r'id="rows">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_first_page_is_the_head_of_the_queue(look: Look, rows: list[list]) -> None:
    shown = look()
    queue = sorted(range(len(rows)), key=lambda index: -rows[index][3])
    assert shown.cards == queue[:60]
    assert "1–60 of 151, page 1 of 3" in shown.text
    assert "picture not in this page" in shown.text, "thumbnails are bounded"
    assert not shown.dialog_open
    assert set(CLASSES) < set(shown.options)


def test_a_class_the_words_and_the_page_are_taken_from_the_address(
    look: Look, rows: list[list]
) -> None:
    shown = look(**{"class": CLASSES[1], "sort": "name", "view": "list", "page": 2})
    names = sorted(row[0] for row in rows if 1 in row[1] and row[0] != EVIL)
    # The name in brackets comes first by any collation that puts signs before letters.
    assert [rows[card][0] for card in shown.cards] == names[11:23]
    assert "13–24 of 51 (151 in all), page 2 of 5" in shown.text


def test_searching_and_names_that_look_like_markup(look: Look, rows: list[list]) -> None:
    shown = look(q="<B>ü", sort="worst")
    assert [rows[card][0] for card in shown.cards] == [EVIL]
    assert EVIL in shown.headings
    nothing = look(q="no such image", page="7", sort="nonsense", view="nonsense")
    assert nothing.cards == []
    assert "no image fits" in nothing.text


def test_one_image_is_opened_with_its_pictures(look: Look, rows: list[list], page: Path) -> None:
    queue = sorted(rows, key=lambda row: -row[3])
    shown = look(open=queue[0][0], q=queue[0][0])
    assert shown.dialog_open
    assert shown.pictures == 1 + 4 + len(queue[0][1]), "its thumbnail, and the large ones"
    assert "Ground truth" in shown.text


def press(page: Path, *keys: str) -> Shown:
    """Show a copy of the page in which these keys were pressed."""
    script = "".join(
        f"document.activeElement.dispatchEvent(new KeyboardEvent('keydown',"
        f"{{key: {json.dumps(key)}, bubbles: true}}));"
        for key in keys
    )
    typed = page.with_name("typed.html")
    text = page.read_text("utf-8").replace("</body>", f"<script>{script}</script></body>")
    typed.write_text(text, encoding="utf-8")
    return Shown(browse(typed, "--dump-dom", state={}))


def test_keys_turn_pages_and_open_images(page: Path, rows: list[list]) -> None:
    queue = sorted(range(len(rows)), key=lambda index: -rows[index][3])
    turned = press(page, "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft")
    assert turned.cards == queue[60:120]
    opened = press(page, "j", "j", "k", "j", "Enter", "ArrowRight")
    assert opened.dialog_open
    assert opened.headings[-1] == rows[queue[2]][0], "the second image, then the next"
    searching = press(page, "/", "ArrowRight")
    assert searching.cards == queue[:60], "arrows belong to the search box"


def test_it_is_a_picture_on_a_phone_too(page: Path, tmp_path: Path) -> None:
    target = tmp_path / "phone.png"
    browse(page, f"--screenshot={target}", "--window-size=500,1400", state={})
    with Image.open(target) as picture:
        assert picture.size == (500, 1400)
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 1000, "thumbnails of noise have many colours"
