"""Plain data is read as a dataclass says, or named; what nobody would write is named too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipes.config import PRESETS, Preset
from clipes.disk.files import write_json
from clipes.disk.records import parse_record, read_record
from clipes.errors import ArtifactError


@dataclass(frozen=True)
class Part:
    width: int
    mean: tuple[float, float, float] = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Whole:
    name: str
    part: Part
    parts: tuple[Part, ...] = ()
    maybe: Part | None = None
    ratio: float = 0.25
    flag: bool = False
    kind: Literal["one", "two"] = "one"
    size: int | str | None = None
    table: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    path: Path | None = None
    rest: Any = None


SMALL: dict[str, Any] = {"name": "n", "part": {"width": 3}}


def parse(value: object) -> Whole:
    return parse_record(value, Whole, "cannot read it", "make it again")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    part = Part(4, (0.1, 1e-30, -3.0))
    whole = Whole("ü\n", part, (part, Part(-(2**60))), part, 1.5, True, "two", 7, {"a": ("b",)})
    path = tmp_path / "record.json"
    write_json(path, asdict(whole))
    assert read_record(path, Whole, "the record", "") == whole
    write_json(path, SMALL)
    assert read_record(path, Whole, "the record", "") == Whole("n", Part(3))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_read_back(name: str) -> None:
    preset = PRESETS[name]
    plain = json.loads(json.dumps(asdict(preset)))
    assert parse_record(plain, Preset, "", "") == preset


def test_missing_keys_get_defaults_and_unknown_ones_are_passed_over() -> None:
    assert parse(SMALL) == Whole("n", Part(3))
    assert parse({**SMALL, "later": [{}], "part": {"width": 3, "depth": 1}}) == Whole("n", Part(3))


def test_a_whole_number_is_a_float_and_stays_one_where_both_are() -> None:
    ratio = parse({**SMALL, "ratio": 2}).ratio
    assert (ratio, type(ratio)) == (2.0, float)
    assert parse({**SMALL, "size": 2}).size == 2
    assert parse({**SMALL, "size": "2"}).size == "2"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": 3}, r"got 'int' - at '\$.name'"),
        ({"name": None}, r"got 'null' - at '\$.name'"),
        ({"part": None}, r"got 'null' - at '\$.part'"),
        ({"part": []}, r"got 'array' - at '\$.part'"),
        ({"part": {}}, r"missing required field 'width' - at '\$.part'"),
        ({"part": {"width": True}}, r"Expected 'int', got 'bool' - at '\$.part.width'"),
        ({"part": {"width": 3.0}}, r"Expected 'int', got 'float' - at '\$.part.width'"),
        ({"part": {"width": "3"}}, r"Expected 'int', got 'str' - at '\$.part.width'"),
        ({"part": {"width": 3, "mean": [1, 2]}}, r"length 3, got 2 - at '\$.part.mean'"),
        ({"part": {"width": 3, "mean": [1, 2, "3"]}}, r"at '\$.part.mean\[2\]'"),
        ({"parts": [{"width": 3}, 4]}, r"at '\$.parts\[1\]'"),
        ({"maybe": {"width": None}}, r"at '\$.maybe.width'"),
        ({"ratio": True}, r"Expected 'float', got 'bool' - at '\$.ratio'"),
        ({"ratio": "0.5"}, r"Expected 'float', got 'str' - at '\$.ratio'"),
        ({"ratio": 10**400}, r"out of range - at '\$.ratio'"),
        ({"flag": 1}, r"Expected 'bool', got 'int' - at '\$.flag'"),
        ({"kind": "three"}, r"at '\$.kind'"),
        ({"size": 2.5}, r"at '\$.size'"),
        ({"table": {"a": ["b", 3]}}, r"at '\$.table\[...\]\[1\]'"),
        ({"path": "a"}, r"Expected 'Path', got 'str' - at '\$.path'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ArtifactError, match=f"^cannot read it: .*{told}; make it again$"):
        parse({**SMALL, **change})


@pytest.mark.parametrize("value", [None, [], "text", 3, {}])
def test_what_is_no_record_at_all_is_named(value: object) -> None:
    with pytest.raises(ArtifactError, match=r"^cannot read it: "):
        parse(value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "Expecting value"),
        (b'{"name": "n", "part"', "Expecting"),
        (b"\xff", "can't decode byte 0xff"),
        (b"[" * 1_000_000, "it nests too deeply"),
        (b'{"rest":' * 1_000_000, "it nests too deeply"),
        (b'{"name": "n", "part": {"width": 3}, "ratio": NaN}', "NaN is no finite number"),
        (b'{"name": "n", "part": {"width": 3}, "ratio": 1e999}', "1e999 is no finite number"),
        (b'{"name": "n", "part": {"width": ' + b"1" * 5000 + b"}}", "Exceeds the limit"),
        (b'{"name": "' + b"n" * 5000 + b'", "part": {"width": 3}}', "larger than 5000 bytes"),
    ],
    ids=[
        "empty",
        "broken",
        "binary",
        "deep lists",
        "deep objects",
        "nan",
        "inf",
        "digits",
        "large",
    ],
)
def test_hostile_files_are_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    largest = 5000 if "larger" in told else 1 << 24
    with pytest.raises(ArtifactError, match=told) as error:
        read_record(path, Whole, "the record", "make it again", largest=largest)
    assert str(error.value).startswith(f"cannot read the record {path}: ")
    assert str(error.value).endswith("; make it again")
    assert "\n" not in str(error.value)


def test_a_file_that_is_absent_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(ArtifactError, match=r"cannot read the record .*; make it again"):
            read_record(path, Whole, "the record", "make it again")


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*SMALL, "parts", "maybe", "ratio", "table"]), JSONS))
def test_no_data_raises_anything_else(change: dict[str, Any]) -> None:
    try:
        whole = parse({**SMALL, **change})
    except ArtifactError:
        return
    assert isinstance(whole.part, Part)
    assert type(whole.ratio) is float
    assert all(isinstance(part, Part) for part in whole.parts)
