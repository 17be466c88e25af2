"""Dependencies point one way, as docs/architecture.md says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "clipes"

# Each room (a folder, or a file at the top) may import rooms of its own floor and further down.
LAYERS = (
    {"cli", "__main__", "__init__"},
    {"api"},
    {"stages"},
    {"bench", "standin", "seg"},
    {"maps", "report", "formats"},
    {"words", "run"},
    {"towers", "masks", "datasets", "weights"},
    {"kernels", "disk", "device", "config"},
    {"types", "errors", "choices", "listener", "names", "processes"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
CONSOLE_LIBRARIES = {"typer", "rich", "click"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    level = LEVEL[part(path)]
    for name in imports(path):
        words = name.split(".")
        if words[0] == "clipes" and words[1] in LEVEL:
            assert LEVEL[words[1]] >= level, f"{path.name} imports {name}, which is above it"


def test_no_two_rooms_import_each_other() -> None:
    rooms: dict[str, set[str]] = {}
    for path in modules():
        for name in imports(path):
            words = name.split(".")
            if words[0] == "clipes" and words[1] in LEVEL.keys() - {part(path)}:
                rooms.setdefault(part(path), set()).add(words[1])
    circles = [(a, b) for a, others in rooms.items() for b in others if a in rooms.get(b, ())]
    assert not circles


def test_towers_and_weights_do_not_know_each_other() -> None:
    """``words`` and ``stages`` join them."""
    for path in modules():
        other = {"towers": "clipes.weights", "weights": "clipes.towers"}.get(part(path))
        assert other is None or not any(name.startswith(other) for name in imports(path)), path


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_console_knows_terminals(path: Path) -> None:
    libraries = {name.split(".")[0] for name in imports(path)}
    if LEVEL[part(path)] > 0:
        assert not libraries & CONSOLE_LIBRARIES


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("clipes.cli", "torch"),
        ("clipes.cli", "numpy"),
        ("clipes.stages.cam", "torch"),
        ("clipes.stages.refine", "torch"),
        ("clipes.stages.evaluate", "torch"),
        ("clipes.stages.run", "torch"),
    ],
)
def test_importing_is_light(module: str, unwanted: str) -> None:
    code = f"import sys, {module}; print({unwanted!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
