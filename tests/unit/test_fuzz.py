"""Whatever the bytes, a parser of untrusted files returns a value or raises a ``ClipesError``.

Each parser meets damaged copies of a good file (bytes changed, cut, doubled, inserted), junk, and
files of the right form with the wrong content.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from clipes.datasets.base import read_split
from clipes.datasets.instances import instance_rows, is_instances
from clipes.datasets.labels import read_labels
from clipes.datasets.voc import read_annotation
from clipes.disk.images import read_confidence, read_image, read_mask, write_confidence, write_mask
from clipes.errors import ClipesError
from clipes.formats import READERS
from clipes.run.folder import Run
from clipes.run.reopen import preset_of, reopen
from clipes.seg.checkpoint import load_checkpoint
from clipes.types import CamMaps
from clipes.weights.read import read_state_dict
from clipes.words.features import load_text_features
from clipes.words.vocabulary import load_vocabulary
from tests.unit.weights_support import save_torchscript, small_clip

CLASSES = ("cat", "dog")
EXAMPLES = 40

a_few = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Parser:
    """A parser, the name its file needs, and a good file to damage."""

    read: Callable[[Path], object]
    name: str
    good: Callable[[Path], object]


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def npz(**arrays: Any) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **arrays)


def read_maps(path: Path) -> object:
    return Run(path.parents[1]).load_cams(path.stem)


def read_manifest(path: Path) -> object:
    run = Run(path.parent)
    preset_of(run)
    return reopen(run, None)


def write_maps(path: Path) -> None:
    maps = CamMaps(np.array([1]), np.ones((1, 2, 3), np.float32), (32, 48))
    Run(path.parents[1]).save_cams(path.stem, maps)


def write_manifest(path: Path) -> None:
    from clipes.config import get_preset

    settings = {"dataset": "folder", "split": None, "labels": None, "classes": list(CLASSES)}
    settings["preset"] = get_preset("default").to_dict()
    Run(path.parent).begin("cam", settings, "clipes cam", {"root": str(path.parent)})


INSTANCES = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 8, "width": 8}],
    "annotations": [{"image_id": 1, "category_id": 2, "bbox": [0.0, 1, 2, 3], "iscrowd": 0}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}
ANNOTATION = (
    '<?xml version="1.0" encoding="utf-8"?><annotation><object><name>cat</name>'
    "<difficult>0</difficult></object><object><name>dog</name></object></annotation>"
)
VOCABULARY = (
    'classes = ["cat", "dog"]\nbackground = ["sky"]\ntemplate = "a {}."\n'
    '[synonyms]\ncat = ["kitten", "cat"]\n'
)
WORDS = {
    "names": np.array(["cat", "dog", "sky"]),
    "features": np.ones((3, 4), np.float32),
    "background": np.array([False, False, True]),
    "model": np.array("x"),
}

OUTLINES = {
    **INSTANCES,
    "annotations": [
        {"image_id": 1, "category_id": 2, "segmentation": [[0, 0, 4, 0, 4, 5]], "iscrowd": 0},
        {"image_id": 1, "category_id": 1, "segmentation": {"size": [8, 8], "counts": [9, 3, 52]}},
    ],
}
LABELME = {
    "shapes": [{"label": "cat", "points": [[0, 0], [4.5, 0], [4, 5]], "shape_type": "polygon"}],
    "imageHeight": 8,
    "imageWidth": 8,
}
CVAT = (
    '<annotations><image name="a.jpg" width="8" height="8"><mask label="cat" rle="1, 2, 1" left="1"'
    ' top="2" width="2" height="2" z_order="0"/><polygon label="dog" points="0,0;4,0;4,5"/>'
    '<box label="dog" xtl="0" ytl="1" xbr="3" ybr="4"/></image></annotations>'
)


def read_corrected(name: str) -> Callable[[Path], object]:
    """Draw all that a tool's file holds."""
    return lambda path: [one.draw((8, 8)) for one in READERS[name](path, CLASSES)]


PARSERS = {
    "corrected COCO": Parser(read_corrected("coco"), "c.json", text(json.dumps(OUTLINES))),
    "corrected labelme": Parser(read_corrected("labelme"), "a.json", text(json.dumps(LABELME))),
    "corrected CVAT": Parser(read_corrected("cvat"), "a.xml", text(CVAT)),
    "VOC XML": Parser(lambda path: read_annotation(path, CLASSES), "a.xml", text(ANNOTATION)),
    "COCO JSON": Parser(
        lambda path: is_instances(path) and instance_rows(path, CLASSES),
        "i.json",
        text(json.dumps(INSTANCES)),
    ),
    "labels.csv": Parser(
        lambda path: read_labels(path, CLASSES), "l.csv", text("image,labels\na.jpg,cat;dog\nb,1\n")
    ),
    "labels.json": Parser(
        lambda path: read_labels(path, CLASSES), "l.json", text('{"a.jpg": ["cat", 1], "b": [0]}')
    ),
    "labels.txt": Parser(
        lambda path: read_labels(path, CLASSES), "l.txt", text("a.jpg cat dog\nb\t1\n")
    ),
    "labels.npy": Parser(
        lambda path: read_labels(path, CLASSES, ["a", "b"]),
        "l.npy",
        lambda path: np.save(path, np.eye(2, dtype=np.uint8)),
    ),
    "labels.npz": Parser(
        lambda path: read_labels(path, CLASSES),
        "l.npz",
        npz(ids=np.array(["a", "b"]), labels=np.eye(2)),
    ),
    "list of images": Parser(
        lambda path: read_split(path.parent, str(path)), "s.txt", text("a\n/J/b.jpg /S/b.png\n")
    ),
    "text features": Parser(load_text_features, "t.npz", npz(**WORDS)),
    "maps": Parser(read_maps, "cams/a.npz", write_maps),
    "mask": Parser(read_mask, "m.png", lambda path: write_mask(path, np.eye(9, 7, dtype=np.uint8))),
    "confidence": Parser(
        read_confidence, "c.png", lambda path: write_confidence(path, np.eye(9, 7))
    ),
    "photo, PNG": Parser(
        read_image, "p.png", lambda path: Image.new("RGBA", (9, 7), "red").save(path)
    ),
    "photo, JPEG": Parser(
        read_image, "p.jpg", lambda path: Image.new("CMYK", (9, 7), "red").save(path)
    ),
    "words": Parser(lambda path: load_vocabulary(str(path)), "w.toml", text(VOCABULARY)),
    "run.json": Parser(read_manifest, "run.json", write_manifest),
    "safetensors": Parser(
        read_state_dict, "w.safetensors", lambda path: path.write_bytes(save(small_clip()))
    ),
    "TorchScript": Parser(
        read_state_dict, "w.pt", lambda path: save_torchscript(small_clip(), path)
    ),
    "state dict": Parser(read_state_dict, "s.pt", lambda path: torch.save(small_clip(), path)),
    "checkpoint": Parser(
        load_checkpoint, "c.pt", lambda path: torch.save({"format": "clipes-segmenter-1"}, path)
    ),
}


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A few changes, at places given as shares of the length: headers are as likely as the rest."""
    place = st.one_of(st.floats(0, 1), st.floats(0, 0.02), st.floats(0.97, 1))
    change = st.tuples(
        st.sampled_from(["flip", "cut", "insert", "double", "zero"]), place, st.binary(max_size=12)
    )
    changes = draw(st.lists(change, min_size=1, max_size=4))

    def apply(content: bytes) -> bytes:
        for kind, share, extra in changes:
            at = int(share * len(content))
            if kind == "flip" and at < len(content):
                mask = (extra or b"\xff")[0] | 1
                content = content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]
            elif kind == "cut":
                content = content[:at] + content[at + len(extra) + 1 :] if extra else content[:at]
            elif kind == "insert":
                content = content[:at] + extra + content[at:]
            elif kind == "double":
                content = content + content[at : at + 10_000]
            else:
                content = content[:at] + bytes(len(extra)) + content[at + len(extra) :]
        return content

    return apply


def check(read: Callable[[Path], object], path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        read(path)
    except ClipesError as error:
        said = str(error)
    else:
        said = "fine"
    assert said.isprintable()


@pytest.fixture(params=PARSERS, scope="module")
def parser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = PARSERS[request.param]
    path = tmp_path_factory.mktemp("fuzz") / "data" / found.name
    path.parent.mkdir(parents=True)
    found.good(path)
    (path.parent / "a.jpg").touch()
    return found.read, path, path.read_bytes()


def test_the_good_file_is_read(parser: Any) -> None:
    read, path, good = parser
    path.write_bytes(good)
    if path.name != "c.pt":  # a small stand-in: fuzzing needs no model of megabytes
        (path.parent / "labels.csv").write_text("image,labels\na.jpg,cat\n")
        assert read(path) is not False


@a_few
@given(change=damage())
def test_a_damaged_file(parser: Any, change: Callable[[bytes], bytes]) -> None:
    read, path, good = parser
    check(read, path, change(good))


@a_few
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=60).map(str.encode)))
def test_junk(parser: Any, content: bytes) -> None:
    read, path, good = parser
    check(read, path, content)
    check(read, path, good[:16] + content)


PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**20), 10**20),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["a.jpg", "cat", "images", "file_name", "id", "../x"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    "images",
                    "annotations",
                    "categories",
                    "id",
                    "file_name",
                    "image_id",
                    "name",
                    "category_id",
                    "image",
                    "labels",
                    "a.jpg",
                    "schema",
                    "stages",
                    "cam",
                    "settings",
                    "facts",
                    "root",
                    "dataset",
                    "classes",
                    "split",
                    "preset",
                    "crf",
                    "width",
                ]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=15,
)


@a_few
@given(value=PLAIN, at=st.integers(0, 5))
def test_json_of_another_form(tmp_path: Path, value: object, at: int) -> None:
    content = dict(INSTANCES)
    keys = [*content]
    content[keys[at % 3]] = value if at < 3 else [value]
    for whole in (value, content):
        path = tmp_path / "x.json"
        check(lambda path: read_labels(path, CLASSES), path, json.dumps(whole).encode())
    manifest = {"schema": 1, "stages": {"cam": {"settings": value, "facts": {"root": "."}}}}
    settings = {"dataset": "folder", "split": None, "labels": None, "classes": ["cat"]}
    odd = {"schema": 1, "stages": {"cam": {"settings": {**settings, "preset": value}}}}
    other = {**settings, **{[*settings][at % 4]: value}}
    third = {"schema": 1, "stages": {"cam": {"settings": other, "facts": {"root": str(tmp_path)}}}}
    (tmp_path / "a.jpg").touch()
    for whole in (manifest, odd, third, value):
        path = tmp_path / "run.json"
        check(lambda path: reopen(Run(path.parent), None), path, json.dumps(whole).encode())
        check(lambda path: preset_of(Run(path.parent)), path, json.dumps(whole).encode())


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 10**6]), max_size=3).filter(
    lambda shape: int(np.prod(shape)) <= 10**6
)
ARRAYS = st.builds(
    lambda shape, dtype: np.ones(shape, dtype),
    SHAPES,
    st.sampled_from(["f2", "f8", "i8", "u1", "?", "U3", "S3", "c8", "M8[s]"]),
)


@a_few
@given(
    which=st.sampled_from(["maps", "text features", "labels.npz"]),
    key=st.sampled_from(["labels", "maps", "size", "names", "features", "background", "model"]),
    array=ARRAYS,
    fill=st.sampled_from([0, 1, -1, 2**62, np.nan, np.inf]),
)
def test_arrays_of_another_form(
    tmp_path: Path, which: str, key: str, array: np.ndarray, fill: float
) -> None:
    good = {
        "maps": {"labels": np.array([1]), "maps": np.ones((1, 2, 3)), "size": np.array([32, 48])},
        "text features": WORDS,
        "labels.npz": {"ids": np.array(["a", "b"]), "labels": np.eye(2)},
    }[which]
    found = PARSERS[which]
    path = tmp_path / "data" / found.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with np.errstate(all="ignore"):
        if array.dtype.kind in "fc" or (array.dtype.kind == "i" and np.isfinite(fill)):
            array = np.full_like(array, fill)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{**good, key: array})
    check(found.read, path, buffer.getvalue())


@a_few
@given(
    header=st.sampled_from(
        [
            "{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999,), }",
            "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,), }",
            "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
            "{'descr': [('a', '<f8'), ('a', '<f8')], 'fortran_order': False, 'shape': (2,), }",
            "{'descr': '<U99999999', 'fortran_order': False, 'shape': (9,), }",
            "(" * 300,
            "{'descr': __import__('os'), }",
            "\0",
        ]
    ),
    tail=st.binary(max_size=40),
    which=st.sampled_from(["maps", "text features", "labels.npz"]),
)
def test_archives_with_headers_that_lie(
    tmp_path: Path, header: str, tail: bytes, which: str
) -> None:
    found = PARSERS[which]
    path = tmp_path / "data" / found.name
    path.parent.mkdir(parents=True, exist_ok=True)
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + tail
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("labels", "maps", "size", "names", "features", "background", "model", "ids"):
            archive.writestr(f"{name}.npy", array)
    check(found.read, path, buffer.getvalue())


@a_few
@given(value=PLAIN)
def test_pickles_of_plain_data(tmp_path: Path, value: object) -> None:
    for name, read in (("w.pt", read_state_dict), ("c.pt", load_checkpoint)):
        check(read, tmp_path / name, pickle.dumps(value))
        torch.save({"format": "clipes-segmenter-1", "model": value}, tmp_path / name)
        check(read, tmp_path / name, (tmp_path / name).read_bytes())
