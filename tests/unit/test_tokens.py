"""Kept tokens: what is kept, within which bounds, and what is not taken for the right ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipes.errors import ImageError
from clipes.run.tokens import CachedTokens
from tests.unit.test_seg_frozen import GIGABYTE, Colours


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def cache(tmp_path: Path, limit: int = GIGABYTE, seed: int = 0) -> tuple[Colours, CachedTokens]:
    source = Colours(seed)
    return source, CachedTokens(lambda: source, tmp_path / "tokens", limit)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_an_image_is_encoded_once(tmp_path: Path, image: Path) -> None:
    source, tokens = cache(tmp_path)
    assert not tokens.has("a", image)
    first = tokens.read("a", image)
    assert {name: (one.shape, one.dtype) for name, one in first.items()} == {
        "clip.4": ((3, 4, 12), torch.float16),
        "dino.12": ((3, 4, 8), torch.float16),
    }
    assert tokens.has("a", image)
    assert same(tokens.read("a", image), first)
    assert source.seen == 1
    _, later = cache(tmp_path)
    assert same(later.read("a", image), first)


def test_other_towers_and_other_pictures_are_encoded_again(tmp_path: Path, image: Path) -> None:
    _, tokens = cache(tmp_path)
    first = tokens.read("a", image)
    source, others = cache(tmp_path, seed=1)
    assert not others.has("a", image)
    assert not same(others.read("a", image), first)
    assert source.seen == 1
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(image)
    assert not others.has("a", image)
    assert not same(others.read("a", image), first)


@pytest.mark.parametrize("damage", [b"", b"junk", None], ids=["empty", "junk", "half"])
def test_damaged_files_are_made_again(tmp_path: Path, image: Path, damage: bytes | None) -> None:
    _, tokens = cache(tmp_path)
    first = tokens.read("a", image)
    (path,) = (tmp_path / "tokens").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert same(tokens.read("a", image), first)
    assert path.read_bytes() == whole


def test_the_folder_keeps_within_its_bounds(tmp_path: Path, image: Path) -> None:
    _, tokens = cache(tmp_path)
    first = tokens.read("a", image)
    folder = tmp_path / "tokens"
    size = (folder / "a.safetensors").stat().st_size
    source, bounded = cache(tmp_path, limit=2 * size)
    for name in ("a", "b", "c", "d", "c"):
        assert same(bounded.read(name, image), first)
    assert [path.stem for path in sorted(folder.iterdir())] == ["a", "b"]
    assert source.seen == 4
    # What takes the place of a file of other towers needs no more room.
    _, others = cache(tmp_path, limit=2 * size, seed=1)
    others.read("b", image)
    assert others.has("b", image)


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path, image: Path) -> None:
    (tmp_path / "tokens").write_text("a file")
    source, tokens = cache(tmp_path)
    first = tokens.read("a", image)
    assert same(tokens.read("a", image), first)
    assert source.seen == 2


def test_a_picture_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"junk")
    _, tokens = cache(tmp_path)
    with pytest.raises(ImageError, match=r"bad\.png"):
        tokens.read("bad", tmp_path / "bad.png")
