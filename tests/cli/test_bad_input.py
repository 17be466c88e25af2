"""Every bad input of ``bad_input.py`` meets the command line; the page of the docs says how."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from clipes.run.folder import Run
from tests.cli.bad_input import CASES, Case
from tests.cli.forked import ROOT, Starter

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "bad-input.md").read_text("utf-8")
ROWS = {
    what: (said, int(code))
    for what, said, code in re.findall(r"^\| (.+?) \| (.+?) \| (\d+) \|$", PAGE, re.MULTILINE)
}
WORKED = "it works"


def test_the_page_has_every_case_once() -> None:
    assert list(ROWS) == [case.what for case in CASES]
    assert PAGE.count("\n| ") == len(CASES) + PAGE.count("\n| what | said | exit |")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_the_page_says_what_the_program_says(case: Case, start: Starter, tmp_path: Path) -> None:
    said, code = ROWS[case.what]
    command = case.make(tmp_path)
    done = start(*command)
    text = f"{done.stderr}\n{done.stdout}".replace(f"{tmp_path}/", "")
    assert done.returncode == code, text
    assert "Traceback" not in text
    assert not (tmp_path / "pwned").exists()
    if said == WORKED:
        assert "skipping" not in text
    else:
        pattern = ".*".join(map(re.escape, said.strip("`").split("…")))
        assert re.search(f"^{pattern}$", text, re.MULTILINE), text
    run = Run(tmp_path / "run")
    if code == 0 and command[0] == "cam":
        done = start("refine", "run", "--workers", "1")
        assert done.returncode == 0, done.stderr
        for id_ in run.ids("cams"):
            height, width = run.load_cams(id_).size
            pseudo = run.load_pseudo(id_)
            assert pseudo.mask.shape == (height, width)
            assert np.isfinite(pseudo.confidence).all()


def test_a_photo_that_exif_turns_has_upright_maps(start: Starter, tmp_path: Path) -> None:
    (case,) = [case for case in CASES if "EXIF" in case.what]
    assert start(*case.make(tmp_path)).returncode == 0
    assert Run(tmp_path / "run").load_cams("bad").size == (64, 48)
