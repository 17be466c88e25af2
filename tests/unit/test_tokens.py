"""Kept tokens: what is kept, within which bounds, and what is not taken for the right ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

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


def cache(
    tmp_path: Path, limit: int = GIGABYTE, seed: int = 0, only: str = "", **more: int
) -> tuple[Colours, CachedTokens]:
    source = Colours(seed, only)
    return source, CachedTokens(lambda: source, tmp_path / "tokens", limit, **more)


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


def test_tokens_that_others_asked_for_stay_beside(tmp_path: Path, image: Path) -> None:
    _, clip = cache(tmp_path, only="clip")
    _, dino = cache(tmp_path, only="dino")
    _, both = cache(tmp_path)
    first = clip.read("a", image)
    assert not dino.has("a", image)
    assert not both.has("a", image)
    second = dino.read("a", image)
    assert (first.keys(), second.keys()) == ({"clip.4"}, {"dino.12"})
    assert same(cache(tmp_path)[1].read("a", image), first | second)
    for one in (clip, dino, both):
        assert one.has("a", image)
    assert same(clip.read("a", image), first)
    # Those of other weights are not beside these, nor those of another picture.
    _, others = cache(tmp_path, seed=1, only="clip")
    others.read("a", image)
    assert (clip.has("a", image), dino.has("a", image)) == (False, True)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(image)
    clip.read("a", image)
    assert (clip.has("a", image), dino.has("a", image)) == (True, False)


def test_others_tokens_go_where_there_is_no_room_for_both(tmp_path: Path, image: Path) -> None:
    cache(tmp_path, only="dino")[1].read("a", image)
    size = (tmp_path / "tokens" / "a.safetensors").stat().st_size
    _, clip = cache(tmp_path, limit=size + 200, only="clip")  # 96 more than dino takes
    assert clip.keep("a", image)
    assert (clip.has("a", image), cache(tmp_path, only="dino")[1].has("a", image)) == (True, False)


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
    assert tokens.has_room
    assert not tokens.keep("a", image)
    assert not tokens.has_room
    first = tokens.read("a", image)
    assert same(tokens.read("a", image), first)
    assert source.seen == 3


def test_a_picture_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"junk")
    _, tokens = cache(tmp_path)
    with pytest.raises(ImageError, match=r"bad\.png"):
        tokens.read("bad", tmp_path / "bad.png")


def test_processes_share_what_the_folder_has_left(tmp_path: Path, image: Path) -> None:
    _, tokens = cache(tmp_path)
    for name in ("a", "b", "c"):
        assert tokens.keep(name, image)
    size = (tmp_path / "tokens" / "a.safetensors").stat().st_size
    ranks = [cache(tmp_path, 5 * size, processes=2)[1] for _ in range(2)]
    assert [rank.has_room for rank in ranks] == [True, True]
    assert [rank.keep(name, image) for rank, name in zip(ranks, "de", strict=True)] == [True, True]
    assert [rank.has_room for rank in ranks] == [False, False]
    assert [rank.keep(name, image) for rank, name in zip(ranks, "fg", strict=True)] == [False] * 2
    assert sum(path.stat().st_size for path in (tmp_path / "tokens").iterdir()) == 5 * size


def test_processes_share_what_the_disk_has_left(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tokens = cache(tmp_path)
    tokens.keep("a", image)
    size = (tmp_path / "tokens" / "a.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=24 * size))
    for processes, kept in ((1, 6), (3, 2), (4, 1)):
        _, tokens = cache(tmp_path, processes=processes)
        names = [f"{processes}-{number}" for number in range(8)]
        assert sum(tokens.keep(name, image) for name in names) == kept


def test_room_is_for_a_file_like_those_that_are_kept(tmp_path: Path, image: Path) -> None:
    _, tokens = cache(tmp_path)
    tokens.keep("a", image)
    size = (tmp_path / "tokens" / "a.safetensors").stat().st_size
    _, bounded = cache(tmp_path, limit=3 * size)
    assert bounded.has_room
    large = tmp_path / "large.png"
    Image.fromarray(np.zeros((2000, 2000, 3), np.uint8)).save(large)
    assert not bounded.keep("large", large)
    assert bounded.has_room  # for others
    for name in ("b", "c"):
        assert bounded.has_room
        assert bounded.keep(name, image)
    assert not bounded.has_room
    assert not bounded.keep("d", image)


def test_an_empty_folder_without_any_room_has_none(tmp_path: Path) -> None:
    assert cache(tmp_path)[1].has_room
    assert not cache(tmp_path, limit=0)[1].has_room
