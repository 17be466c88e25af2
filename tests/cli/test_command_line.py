"""What the command line says in one line: options that mean nothing, paths that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import clipes.stages.doctor
from clipes.cli import main
from tests.cli.inline import exit_code

Told = Callable[..., tuple[int, str]]


@pytest.fixture
def told(here: Path, capfd: pytest.CaptureFixture[str]) -> Told:
    """Run a command in this process; return its exit code and the line it ends with."""
    (here / "masks").mkdir()
    (here / "run").mkdir()
    (here / "run" / "run.json").write_text(json.dumps({}))

    def run(*arguments: str) -> tuple[int, str]:
        return exit_code(*arguments), capfd.readouterr().err.strip()

    return run


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            "eval run --prompts coco",
            "--prompts means nothing to the run run, which has",
        ),
        ("eval masks --gt masks --root x", "--root means nothing to masks, which is no run folder"),
        ("eval masks --gt masks --exponents 1,2", "--exponents means nothing to masks, which is"),
        ("eval masks --gt masks --no-use-corrected", "--no-use-corrected means nothing to masks"),
        ("bench --without linear --threads 1", "--threads means nothing to --without"),
        ("weights fetch dinov2 --model ViT-L-14", "--model ViT-L-14 means nothing to dinov2"),
        ("weights path dinov2 --model ViT-L-14", "--model ViT-L-14 means nothing to dinov2"),
        ("prompts check --model ViT-L-14", "--model ViT-L-14 means nothing without --weights"),
    ],
)
def test_options_that_would_be_ignored_are_refused(told: Told, command: str, line: str) -> None:
    code, said = told(*command.split())
    assert (code, said.splitlines()) == (2, [said])
    assert said.startswith(f"clipes: {line}")


def test_a_path_that_the_system_refuses_is_one_line(told: Told) -> None:
    name = "a" * 300
    code, said = told("eval", name)
    assert (code, said.splitlines()) == (1, [said])
    assert said.startswith("clipes: ")
    assert name in said


def test_an_error_of_the_system_without_a_path_stays_what_it_is(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(clipes.stages.doctor, "diagnose", fail)
    with pytest.raises(OSError, match="Input/output error"):
        main(["doctor"])
