"""``tokens/<id>.safetensors`` of a run folder: what frozen towers said of an image, kept as fp16.

A cache: it may be removed at any time, keeps within its bounds, and what it cannot keep is computed
again. Files of other towers, of another picture, and damaged ones count as absent. A file may hold
more tokens than are asked for: those of presets that were trained before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from clipes.device import memory_for
from clipes.disk.files import atomic_write, check_id, list_files, room_on_disk
from clipes.errors import WriteError
from clipes.run.origin import Picture, TokensOrigin, read_picture, same_picture
from clipes.towers.tokens import TokenSource

_SUFFIX = ".safetensors"


class CachedTokens:
    """Tokens of images, from disk where they were kept.

    They are rounded to fp16 whether they are kept or not, so that removing files changes nothing.

    Args:
        open_source: Loads the towers; asked once, when they are first needed.
        folder: For the files.
        limit: Most bytes that all files of the folder take, whoever wrote them.
        processes: How many keep tokens there at the same time, each as many bytes of what is left.
    """

    def __init__(
        self,
        open_source: Callable[[], TokenSource],
        folder: Path,
        limit: int,
        processes: int = 1,
    ) -> None:
        self._open = open_source
        self._folder = folder
        self._sizes = [path.stat().st_size for path in list_files(folder, _SUFFIX)]
        here = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
        # The whole folder counts against the whole limit, and only then each gets its part: also
        # of the disk, which others want, too, however many processes there are.
        self._room = room_on_disk(here, limit - sum(self._sizes)) // processes

    @cached_property
    def source(self) -> TokenSource:
        """The towers."""
        return self._open()

    @property
    def has_room(self) -> bool:
        """Whether another file fits that is as large as those kept so far are on average.

        Once a file could not be written there is no room for any.
        """
        sizes = self._sizes or [1]
        return self._room >= sum(sizes) / len(sizes)

    def has(self, image_id: str, image: Path) -> bool:
        """Tell whether the tokens of a picture are on disk."""
        return self._kept(self._path(image_id), image, load=False) is not None

    def keep(self, image_id: str, image: Path) -> bool:
        """Keep the tokens of a picture, and tell whether there was room; errors as for ``read``.

        That there was none for a large one does not say that there is none for others: see
        ``has_room``.
        """
        return self._make(self._path(image_id), image)[1]

    def read(self, image_id: str, image: Path) -> dict[str, Tensor]:
        """Return the tokens of a picture, (h, w, D) float16 by name; keep them if there is room.

        Raises:
            ImageError: The picture cannot be read.
        """
        path = self._path(image_id)
        if (kept := self._kept(path, image)) is not None:
            return kept
        return self._make(path, image)[0]

    def _make(self, path: Path, image: Path) -> tuple[dict[str, Tensor], bool]:
        pixels, picture = read_picture(image)
        with memory_for(str(image), "use --device cpu"):
            found = self.source.tokens(pixels)
        # Copied, because what towers return was made in inference mode and cannot be learnt from.
        tokens = {name: one.to("cpu", torch.float16, copy=True) for name, one in found.items()}
        return tokens, self._keep(path, tokens, picture)

    def _path(self, image_id: str) -> Path:
        return self._folder / f"{check_id(image_id)}{_SUFFIX}"

    def _kept(self, path: Path, image: Path, *, load: bool = True) -> dict[str, Tensor] | None:
        """Return the tokens of a file; None if it is absent or of something else."""
        try:
            written = path.stat().st_mtime_ns
            with safe_open(path, framework="pt") as file:
                origin = _origin(file.metadata())
                wanted = self.source.fingerprints
                if origin is None or not wanted.items() <= origin.tokens.items():
                    return None
                same, _ = same_picture(image, origin.image, origin.bytes, written)
                if not same:
                    return None
                return {name: file.get_tensor(name) for name in wanted if load}
        except (OSError, SafetensorError):
            return None

    def _keep(self, path: Path, tokens: Mapping[str, Tensor], picture: Picture) -> bool:
        """Keep tokens beside others of the same picture, or in their place for want of room."""
        mine = {name: one.contiguous() for name, one in tokens.items()}
        prints = dict(self.source.fingerprints)
        others, of_others = _others(path, picture, prints)
        before = path.stat().st_size if path.is_file() else 0
        content = _file(others | mine, of_others | prints, picture)
        if others and len(content) - before > self._room:
            content = _file(mine, prints, picture)
        if len(content) - before > self._room:
            return False
        try:
            with atomic_write(path) as temporary:
                temporary.write_bytes(content)
        except WriteError:  # a full disk is no reason to stop: it is only a cache
            self._room = 0
            return False
        self._room -= len(content) - before
        self._sizes.append(len(content))
        return True


def _origin(metadata: Mapping[str, str] | None) -> TokensOrigin | None:
    """Return what a file says that it was made from; None if it does not say."""
    return TokensOrigin.parse((metadata or {}).get("origin", ""))


def _others(
    path: Path, picture: Picture, mine: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what else a file holds of a picture than ``mine``: tokens, and their fingerprints."""
    try:
        with safe_open(path, framework="pt") as file:
            origin = _origin(file.metadata())
            if origin is None or origin.image != picture.sha256:
                return {}, {}
            prints = {name: one for name, one in origin.tokens.items() if name not in mine}
            return {name: file.get_tensor(name) for name in prints}, prints
    except (OSError, SafetensorError):
        return {}, {}


def _file(tokens: dict[str, Tensor], prints: Mapping[str, str], picture: Picture) -> bytes:
    """Return the content of a file of kept tokens."""
    origin = TokensOrigin(picture.sha256, picture.size, dict(sorted(prints.items())))
    return save(tokens, {"origin": origin.text()})
