from __future__ import annotations

import gc
import json
import os
import re
import stat
import sys

import numpy as np
import pytest

from clipes.disk import files as files_module
from clipes.disk.files import (
    atomic_write,
    check_id,
    list_files,
    walk_files,
    write_arrays,
    write_json,
    write_text,
)
from clipes.errors import ArtifactError, DatasetError, WriteError


def test_the_name_appears_only_when_the_block_is_done(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("all")
        assert temporary.parent == path.parent
        assert temporary.suffix == path.suffix
        assert not path.exists()
        assert list_files(path.parent) == []
    assert path.read_text() == "all"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_system_refuses_is_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"cannot write .*a\.txt.*check the folder") as caught:
        write_text(tmp_path / "file" / "a.txt", "x")
    assert "\n" not in str(caught.value)


def test_arrays_that_cannot_be_written_are_said_once(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource", reason="file size limits are POSIX")
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot write .*a\.npz: File too large"):
            write_arrays(tmp_path / "a.npz", {"a": np.zeros(1000)}, compress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    gc.collect()
    assert complaints == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_results_get_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "atomic", "x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_json_is_readable_and_strict(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None], "a": "\u00e9"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [1, 2.5, None], "a": "\u00e9"}
    assert "\u00e9" in path.read_text(encoding="utf-8")
    for value in (float("nan"), {"a": object()}):
        with pytest.raises((TypeError, ValueError)):
            write_json(path, value)
    assert list(tmp_path.iterdir()) == [path]


def test_listing_is_sorted_and_leaves_out_what_is_hidden_or_no_file(tmp_path):
    for name in ("b.png", "a.PNG", "c.jpg", ".d-12.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_files(tmp_path, ".png")] == ["a.PNG", "b.png"]
    assert [path.name for path in list_files(tmp_path)] == ["a.PNG", "b.png", "c.jpg"]
    assert list_files(tmp_path / "none") == list_files(tmp_path / "b.png") == []


def test_a_walk_goes_down_but_not_in_circles(tmp_path, monkeypatch):
    for name in ("b.png", "a/c.png", "a/d/e.png", "a/.f/g.png", "masks/h.png", "run/run.json"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    root = tmp_path / "root"
    (root / "run/i.png").touch()
    (root / "elsewhere").symlink_to(root / "a")
    (root / "a/up").symlink_to("..")
    (root / "a/gone.png").symlink_to("nowhere")
    files, links = walk_files(root, skip=["masks"], made=["run.json"])
    below = ["c.png", "gone.png", "d/e.png"]
    assert files == ["b.png", *(f"a/{name}" for name in below), *(f"elsewhere/{x}" for x in below)]
    assert links == ["a/up", "elsewhere/up"]
    assert walk_files(root / "a", deepest=0) == (["c.png", "gone.png"], ["up"])
    assert walk_files(root / "none") == ([], [])
    monkeypatch.setattr(files_module, "MAX_WALKED", 6)
    with pytest.raises(ArtifactError, match="more than 6 files"):
        walk_files(root, skip=["masks"], made=["run.json"])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_folder_that_may_not_be_listed(tmp_path):
    tmp_path.chmod(0)
    try:
        with pytest.raises(ArtifactError, match="cannot list"):
            list_files(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", ["2007_000032", "my cat (1)", "v1.5", "caf\u00e9", "x" * 200])
def test_plain_names_are_ids(name):
    assert check_id(name) == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "is blank"),
        (" ", "is blank"),
        (".", "starts with a dot"),
        ("..", "starts with a dot"),
        ("a/b", "holds a separator or a drive"),
        ("a\\b", "holds a separator or a drive"),
        ("/a", "holds a separator or a drive"),
        ("C:a", "holds a separator or a drive"),
        ("a..b", "holds '..'"),
        (".a", "starts with a dot"),
        ("a\nb", r"holds '\n' as character 2, which cannot be printed"),
        ("a\0", r"holds '\x00' as character 2"),
        ("x" * 99 + "\x07", r"holds '\x07' as character 100"),
        ("\udcff", r"holds '\udcff' as character 1"),
        ("x" * 201, "is longer than 200 bytes"),
        ("\u00e9" * 101, "is longer than 200 bytes"),
    ],
)
def test_other_names_are_not_and_it_says_why(name, why):
    told = re.escape(f"cannot be an image id: it {why}") + ".*; an id is a plain file name"
    with pytest.raises(DatasetError, match=told):
        check_id(name)
