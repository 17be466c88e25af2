"""What the README tells people to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

import clipes
from clipes.cli import app
from clipes.formats import FORMATS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "clipes"
PAPERS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text("utf-8")
FORMATS_PAGE = (ROOT / "docs" / "formats.md").read_text("utf-8")
PAGES = "".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def commands(text: str) -> list[list[str]]:
    """Indented lines that start with ``clipes``, comments removed."""
    found = re.findall(r"^    (clipes .*?)(?:\s+#.*)?$", text, re.MULTILINE)
    return [shlex.split(line)[1:] for line in found]


def check(arguments: list[str]) -> None:
    """Fail unless the command and all its options are known."""
    command = typer.main.get_command(app)
    words = list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word not in options]
    assert not unknown, f"{arguments}: {unknown}"


@pytest.mark.parametrize("arguments", commands(README + PAGES), ids=" ".join)
def test_commands_of_the_documentation_exist(arguments: list[str]) -> None:
    check(arguments)


def test_benchmarks_of_the_documentation_exist_and_have_its_options() -> None:
    pages = "".join(paper.read_text("utf-8") for paper in PAPERS).replace("\\\n", " ")
    found = re.findall(r"python benchmarks/(\w+\.py)([^`\n#]*)", pages)
    assert len(found) > 50
    shared = (ROOT / "benchmarks" / "common.py").read_text("utf-8")
    for file, line in found:
        source = (ROOT / "benchmarks" / file).read_text("utf-8")
        for option in re.findall(r"--[a-z-]+", line.split(" -- ")[0]):
            own = shared if "stage_options" in source else ""
            assert option in source + own, f"{file} has no {option}"


def test_no_page_has_a_gap_to_be_filled() -> None:
    for paper in PAPERS:
        assert not re.search(r"^(TODO|[A-Z]{4,})$", paper.read_text("utf-8"), re.MULTILINE), paper


def test_an_unknown_option_would_be_found() -> None:
    with pytest.raises(AssertionError, match="--nonsense"):
        check(["cam", "--nonsense"])


def test_the_page_of_formats_knows_every_format_and_its_options() -> None:
    rows = re.findall(r"^\| `(\w[\w-]*)` \| .* \| (.*) \|$", FORMATS_PAGE, re.MULTILINE)
    documented = {name: set(re.findall(r"--(\w+)", options)) for name, options in rows}
    assert documented == {name: set(form.options) for name, form in FORMATS.items()}
    assert re.findall(r"^### (.*)", FORMATS_PAGE, re.MULTILINE) == list(documented)


def test_make_targets_of_the_readme_exist() -> None:
    wanted = set(re.findall(r"^    make (\w+)", README, re.MULTILINE))
    assert wanted >= {"demo", "test", "eval"}
    assert wanted <= set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))


def test_every_command_is_documented_with_an_example() -> None:
    root = typer.main.get_command(app)
    for name, command in root.commands.items():
        for sub in getattr(command, "commands", {name: command}).values():
            assert "Example: clipes" in (sub.help or ""), sub.name


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_files_that_are_named_exist(paper: Path) -> None:
    """By their path in the repository, or in the package."""
    named = r"`((?:clipes|tests|benchmarks|examples|docs)/[\w./-]+|[\w./-]+/\w+\.py)`"
    for name in re.findall(named, paper.read_text("utf-8")):
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name


def test_the_tree_has_all_rooms_and_modules_they_are_said_to_have() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = set(re.findall(r"^      (\w+/|\w+\.py) ", page, re.MULTILINE))
    there = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__main__.py"}
    assert rooms == there | files
    for room, module in re.findall(r"\b([a-z]+)/([a-z_]+)\b(?![/.])", page):
        if f"{room}/" in there:
            assert (PACKAGE / room / f"{module}.py").is_file(), f"{room}/{module}"


def test_the_api_reference_has_all_public_names() -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    names = re.findall(r"^::: clipes\.(\w+)$", page, re.MULTILINE)
    assert sorted([*names, "__version__"]) == sorted(clipes.__all__)


def test_the_version_is_one() -> None:
    cited = re.search(r"^version: (.*)", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert cited is not None
    assert cited[1] == clipes.__version__
    assert f"\n## {clipes.__version__} - " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def headings(paper: Path) -> set[str]:
    """Return the anchors of a page, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)", paper.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_links_lead_somewhere(paper: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", paper.read_text("utf-8"))
    for file, anchor in links:
        target = paper.parent / file if file else paper
        assert target.is_file(), file
        assert not anchor or anchor in headings(target), f"{file}#{anchor}"


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(README.encode()) <= 6000
