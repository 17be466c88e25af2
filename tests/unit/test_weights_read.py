from __future__ import annotations

import math
import pickle
import shutil
import zipfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clipes.errors import WeightsError
from clipes.weights import read_state_dict
from clipes.weights.layout import normalise
from clipes.weights.torchscript import is_torchscript
from tests.unit.weights_support import published, quantised_tower, save_torchscript, small_clip


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], value.float()), key


def to_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Spelled out key by key, against the renaming rules of the product."""
    out = {
        "logit_scale": state["logit_scale"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_projection.weight": state["text_projection"].T.contiguous(),
    }
    for kind in ("weight", "bias"):
        out[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        out[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        out[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for i in range(2):
            for ours, theirs in (("visual.", "vision_model"), ("", "text_model")):
                a, b = f"{ours}transformer.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
                stacked = state[f"{a}.attn.in_proj_{kind}"]
                out[f"{b}.self_attn.q_proj.{kind}"] = stacked[:16].clone()
                out[f"{b}.self_attn.k_proj.{kind}"] = stacked[16:32].clone()
                out[f"{b}.self_attn.v_proj.{kind}"] = stacked[32:].clone()
                out[f"{b}.self_attn.out_proj.{kind}"] = state[f"{a}.attn.out_proj.{kind}"]
                out[f"{b}.layer_norm1.{kind}"] = state[f"{a}.ln_1.{kind}"]
                out[f"{b}.layer_norm2.{kind}"] = state[f"{a}.ln_2.{kind}"]
                out[f"{b}.mlp.fc1.{kind}"] = state[f"{a}.mlp.c_fc.{kind}"]
                out[f"{b}.mlp.fc2.{kind}"] = state[f"{a}.mlp.c_proj.{kind}"]
    return out


class TestFormats:
    def test_state_dict(self, tmp_path: Path):
        torch.save(published(small_clip()), tmp_path / "w.pt")
        assert_same(read_state_dict(tmp_path / "w.pt"), published(small_clip()))

    def test_state_dict_of_old_torch(self, tmp_path: Path):
        torch.save(small_clip(), tmp_path / "w.bin", _use_new_zipfile_serialization=False)
        assert_same(read_state_dict(tmp_path / "w.bin"), small_clip())

    def test_training_checkpoint(self, tmp_path: Path):
        state = {f"module.{key}": value for key, value in small_clip().items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "w.pth")
        assert_same(read_state_dict(tmp_path / "w.pth"), small_clip())

    def test_safetensors(self, tmp_path: Path):
        save_file(small_clip(), tmp_path / "w.safetensors")
        assert_same(read_state_dict(tmp_path / "w.safetensors"), small_clip())

    def test_hugging_face(self, tmp_path: Path):
        save_file(to_hugging_face(small_clip()), tmp_path / "w.safetensors")
        assert_same(read_state_dict(tmp_path / "w.safetensors"), small_clip())

    def test_text_tower_of_its_own(self):
        state = {k if k.startswith(("visual", "logit")) else f"text.{k}": v
                 for k, v in small_clip().items()}  # fmt: skip
        assert_same(normalise(state, "file"), small_clip())

    def test_torchscript(self, tmp_path: Path):
        path = tmp_path / "w.pt"
        save_torchscript(published(small_clip()), path)
        assert is_torchscript(path)
        assert_same(read_state_dict(path), published(small_clip()))

    def test_onnx_export(self, tmp_path: Path):
        tower = quantised_tower()
        (tmp_path / "w.onnx").write_bytes(tower.model)
        state = read_state_dict(tmp_path / "w.onnx")
        layer = "vision_model.encoder.layers.1.mlp.fc2"
        codes, scale, zero = tower.matrices[layer]
        expected = ((codes.astype(np.float32) - zero) * scale).T
        found = state["visual.transformer.resblocks.1.mlp.c_proj.weight"]
        np.testing.assert_array_equal(found.numpy(), expected)

    def test_image_tower_alone_gets_the_scale_of_openai(self, tmp_path: Path):
        state = {k: v for k, v in small_clip().items() if k.startswith("visual.")}
        torch.save(state, tmp_path / "w.pt")
        expected = state | {"logit_scale": torch.tensor(math.log(100))}
        assert_same(read_state_dict(tmp_path / "w.pt"), expected)

    def test_a_whole_clip(self, tiny_weights: Path):
        expected = torch.load(tiny_weights, weights_only=True)
        found = read_state_dict(tiny_weights)
        assert_same(found, expected)
        assert len(found) == 302


class Touch:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def rewritten(source: Path, target: Path, entry: str, content: bytes, **how: int) -> Path:
    """A copy of a zip archive with one entry replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            replaced = info.filename.partition("/")[2] == entry
            new.writestr(info.filename, content if replaced else old.read(info), **how)
    return target


class TestHostileFiles:
    @pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"visual.proj": t}])
    def test_code_in_a_pickle_is_not_run(self, tmp_path: Path, wrap):
        marker = tmp_path / "marker"
        torch.save(wrap(Touch(marker)), tmp_path / "w.pt")
        with pytest.raises(WeightsError, match=r"w\.pt holds something other than tensors"):
            read_state_dict(tmp_path / "w.pt")
        assert not marker.exists()

    def test_code_in_a_bare_pickle_is_not_run(self, tmp_path: Path):
        marker = tmp_path / "marker"
        (tmp_path / "w.bin").write_bytes(pickle.dumps(Touch(marker)))
        with pytest.raises(WeightsError, match=r"w\.bin"):
            read_state_dict(tmp_path / "w.bin")
        assert not marker.exists()

    @pytest.fixture
    def archive(self, tmp_path: Path) -> Path:
        save_torchscript(small_clip(), tmp_path / "good.pt")
        return tmp_path / "good.pt"

    def test_code_in_torchscript_is_not_run(self, tmp_path: Path, archive: Path):
        marker = tmp_path / "marker"
        bad = rewritten(archive, tmp_path / "w.pt", "data.pkl", pickle.dumps(Touch(marker)))
        assert is_torchscript(bad)
        with pytest.raises(WeightsError, match=r"names (pathlib|builtins)"):
            read_state_dict(bad)
        assert not marker.exists()

    @pytest.mark.parametrize(
        "attack",
        [
            b"c__torch__\nA\n}X\x04\x00\x00\x00argsK\x01sb.",  # sets a class's dictionary
            b"c__torch__\nA\nN}X\x04\x00\x00\x00argsK\x01s\x86b.",  # sets a class's attributes
            b"ctorch\nHalfStorage\n}X\x01\x00\x00\x00aK\x01sb.",  # sets a dtype's
            b"ctorch\nHalfStorage\n)R.",  # calls a dtype
            b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
            b"ctorch.serialization\nload\nX\x01\x00\x00\x001\x85R.",
            b"\x80\x04\x95",
            b"",
            b"N.",  # an archive of nothing
        ],
    )
    def test_hostile_pickles_end_in_one_line(self, tmp_path: Path, archive: Path, attack: bytes):
        bad = rewritten(archive, tmp_path / "w.pt", "data.pkl", attack)
        with pytest.raises(WeightsError, match=r"w\.pt"):
            read_state_dict(bad)
        # Whatever the attack did to the reader's own classes would show here.
        assert_same(read_state_dict(archive), small_clip())

    def test_a_tensor_larger_than_its_bytes(self, tmp_path: Path, archive: Path):
        bad = rewritten(archive, tmp_path / "w.pt", "data/0", b"\0" * 4)
        with pytest.raises(WeightsError, match="has only 1 values"):
            read_state_dict(bad)

    def test_an_expanded_tensor_is_not_multiplied_in_memory(self, tmp_path: Path):
        state = small_clip() | {"visual.proj": torch.ones(1).expand(16, 8)}
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(WeightsError, match=r"visual\.proj claims more values than it has"):
            read_state_dict(tmp_path / "w.pt")

    def test_compressed_tensors_could_be_a_bomb(self, tmp_path: Path, archive: Path):
        bad = rewritten(archive, tmp_path / "w.pt", "-", b"", compress_type=zipfile.ZIP_DEFLATED)
        with pytest.raises(WeightsError, match="is compressed"):
            read_state_dict(bad)

    @pytest.mark.parametrize("kind", ["new.pt", "old.pt", "script.pt", "w.safetensors"])
    def test_random_damage_ends_in_one_line_or_not_at_all(self, tmp_path: Path, kind: str):
        path, random = tmp_path / kind, Random(0)
        if kind == "script.pt":
            save_torchscript(small_clip(), path)
        elif kind == "w.safetensors":
            save_file(small_clip(), path)
        else:
            torch.save(small_clip(), path, _use_new_zipfile_serialization=kind == "new.pt")
        good = path.read_bytes()
        messages = []
        for _ in range(60):
            bad = bytearray(good)
            for _ in range(random.choice((1, 10, 50))):
                bad[random.randrange(len(bad))] = random.randrange(256)
            path.write_bytes(bad)
            try:
                read_state_dict(path)
            except WeightsError as error:
                messages.append(str(error))
        assert len(messages) > 10
        assert all(kind in message and "\n" not in message for message in messages)


class TestUnusableFiles:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("w.pt", b"\n<!DOCTYPE html><html>not found</html>", "is a web page"),
            ("w.bin", b"<HTML><body>", "is a web page"),
            ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
            ("w.pt", b"", r"w\.pt"),
            ("w.pt", b"PK\x03\x04 and nothing more", r"w\.pt"),
            ("w.pt", b"\x80\x02.", r"w\.pt"),
            ("w.safetensors", b"", "not a usable safetensors file"),
            ("w.safetensors", b"\xff" * 64, "not a usable safetensors file"),
        ],
    )
    def test_other_content(self, tmp_path: Path, name: str, content: bytes, message: str):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=message) as caught:
            read_state_dict(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("kind", ["w.pt", "w.safetensors", "script.pt"])
    @pytest.mark.parametrize("share", [0.1, 0.6, 0.99])
    def test_cut_off(self, tmp_path: Path, kind: str, share: float):
        path = tmp_path / kind
        if kind == "script.pt":
            save_torchscript(small_clip(), path)
        elif kind == "w.pt":
            torch.save(small_clip(), path)
        else:
            save_file(small_clip(), path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(WeightsError, match=kind):
            read_state_dict(path)

    def test_damaged_torchscript(self, tmp_path: Path):
        path = tmp_path / "w.pt"
        save_torchscript(small_clip(), path)
        content = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data/0"))
            content[archive.getinfo(name).header_offset + 300] ^= 0xFF  # 64-byte aligned, small
        broken = tmp_path / "broken.pt"
        broken.write_bytes(content)
        assert_same(read_state_dict(path), small_clip())
        with pytest.raises(WeightsError, match="CRC"):
            read_state_dict(broken)

    def test_no_such_file(self, tmp_path: Path):
        with pytest.raises(WeightsError, match="there is no file"):
            read_state_dict(tmp_path / "w.pt")
        with pytest.raises(WeightsError, match="there is no file"):
            read_state_dict(tmp_path)

    def test_a_tensor_is_not_a_state_dict(self, tmp_path: Path):
        torch.save(torch.ones(3), tmp_path / "w.pt")
        with pytest.raises(WeightsError, match="holds a Tensor, not a state dict"):
            read_state_dict(tmp_path / "w.pt")

    def test_suffix_says_the_format_of_safetensors_only(self, tmp_path: Path):
        torch.save(small_clip(), tmp_path / "w.safetensors")
        with pytest.raises(WeightsError, match="not a usable safetensors file"):
            read_state_dict(tmp_path / "w.safetensors")
        shutil.copy(tmp_path / "w.safetensors", tmp_path / "w.anything")
        assert_same(read_state_dict(tmp_path / "w.anything"), small_clip())

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_numbers_that_are_not_finite(self, tmp_path: Path, value: float):
        state = small_clip()
        state["visual.positional_embedding"][3, 2] = value
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(WeightsError, match=r"visual\.positional_embedding holds numbers"):
            read_state_dict(tmp_path / "w.pt")


BLOCK = "visual.transformer.resblocks.1."


class TestLayout:
    @pytest.mark.parametrize("key", sorted(k for k in small_clip() if k != "logit_scale"))
    def test_every_tensor_is_needed(self, key: str):
        state = small_clip()
        del state[key]
        if key == "token_embedding.weight":
            assert all(k.startswith("visual.") or k == "logit_scale" for k in normalise(state, "f"))
        else:
            with pytest.raises(WeightsError, match=r"f is not a supported CLIP ViT: .* missing"):
                normalise(state, "f")

    @pytest.mark.parametrize("key", sorted(k for k in small_clip() if k != "logit_scale"))
    def test_every_shape_is_checked(self, key: str):
        state = small_clip()
        state[key] = torch.cat([state[key], state[key][..., -1:]], dim=-1)
        with pytest.raises(WeightsError, match="f is not a supported CLIP ViT"):
            normalise(state, "f")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"visual.attn_pool.query": torch.ones(2)}, r"visual\.attn_pool\.query is not part"),
            ({f"{BLOCK}ls_1.gamma": torch.ones(16)}, r"ls_1\.gamma is not part"),
            ({"transformer.resblocks.0.ls_1.gamma": torch.ones(16)}, r"ls_1\.gamma is not part"),
            ({"visual.proj": torch.ones(16, 8, dtype=torch.int64)}, "int64, not"),
            ({"visual.proj": torch.ones(16)}, "not 2 dimensions"),
            ({"logit_scale": torch.ones(2)}, "logit_scale has 2 values"),
        ],
    )
    def test_what_is_not_openai_architecture(self, change: dict[str, torch.Tensor], message: str):
        with pytest.raises(WeightsError, match=message):
            normalise(small_clip() | change, "f")

    def test_other_models_are_refused(self):
        resnet = {"visual.conv1.weight": torch.ones(4, 3, 3, 3), "visual.layer1.0.x": torch.ones(1)}
        for state in (resnet, {"fc.weight": torch.ones(2, 2)}, {}):
            with pytest.raises(WeightsError, match=r"visual\.class_embedding is missing"):
                normalise(state, "f")

    def test_tensors_beside_the_towers_do_not_matter(self):
        extra = {"input_resolution": torch.tensor(224), "attn_mask": torch.ones(7, 7)}
        assert_same(normalise(small_clip() | extra, "f"), small_clip())
