"""The pictures below a folder: their ids, what names mean, and what is there but not used."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from clipes.datasets.base import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    image_id,
    path_id,
    printable,
    suffixes_agree,
    without_suffix,
)
from clipes.datasets.problems import Kind, Problem, ProblemError
from clipes.disk.files import list_files, walk_files
from clipes.errors import DatasetError

IMAGE_FOLDERS = ("images", "JPEGImages")
"""Sub-folders that hold the images of a folder, where it has one of them."""

MASK_FOLDERS = ("masks", "SegmentationClassAug", "SegmentationClass")
"""Sub-folders that hold masks, the first that has an image's mask wins."""

_NO_PHOTOS = frozenset({*MASK_FOLDERS, "SegmentationObject", "@eaDir"})  # the last: thumbnails
_WRITTEN_HERE = ("run.json", "export.json")  # in a run folder, in an export: their PNGs are masks
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
"""What JPEG, PNG, GIF, WebP and TIFF files start with."""

_NAMED = 3  # files that a message names


@dataclass(frozen=True)
class Pictures:
    """The pictures in and below a folder.

    Attributes:
        root: The folder that was named.
        folder: Where its images lie: ``root`` or one of ``IMAGE_FOLDERS`` in it.
        ids: The id of each picture, by its path below ``folder``.
        problems: What is wrong with those whose paths make no id, by path.
        unread: Paths below ``folder`` of pictures of a kind that is not read.
        beside: Paths below ``root`` of pictures outside ``folder``, at most a folder deep.
        links: Paths below ``folder`` of links to folders, which were not followed.
        unnamed: Paths below ``folder`` of pictures whose names do not say that they are.
    """

    root: Path
    folder: Path
    ids: dict[str, str]
    problems: dict[str, Problem]
    unread: tuple[str, ...]
    beside: tuple[str, ...]
    links: tuple[str, ...]
    unnamed: tuple[str, ...]

    @cached_property
    def by_id(self) -> dict[str, list[str]]:
        """The paths of each id: more than one are a problem."""
        return _grouped((id_, path) for path, id_ in self.ids.items())

    def id_of(self, name: str) -> str:
        """Return the id of the image that a label file or a list calls ``name``.

        That may be its path, from below the folder or longer; its id; or its file name, if no other
        folder has one like it. Suffixes may be left out.

        Raises:
            DatasetError: It is no name of an image, or fits several.
        """
        plain = image_id(name)  # also refuses what leads out
        found = self._named(name)
        ids = dict.fromkeys(self.ids[path] for path in found)
        if len(ids) > 1:
            raise DatasetError(f"{printable(name)!r} fits {_listing(found)}", "write the path")
        if ids:
            return next(iter(ids))
        return plain if PureWindowsPath(name.strip()).anchor else path_id(name.strip())

    def same(self, one: str, other: str) -> bool:
        """Tell whether two names of one id are names of one picture."""
        return suffixes_agree(one, other) and self._named(one) == self._named(other)

    def locate(self, id_: str, called: str | None = None) -> Path:
        """Return the file of an image.

        Args:
            id_: Its id.
            called: What a label file calls it: a suffix there chooses among files of one id.

        Raises:
            ProblemError: It is not there or not read, or several files have its id.
        """
        found = self.by_id.get(id_, [])
        if called is not None and len(found) > 1:
            found = [path for path in found if _same_end(path, called)] or found
        if called is not None and not found:
            beside = [path for path in self.beside if _plain(path) == _plain(called)]
            if beside:
                return self.root / beside[0]
        if not found:
            raise self._missing(id_, called or id_)
        if len(found) > 1:
            raise ProblemError(
                Kind.duplicate_id,
                f"{_listing(found)} in {self.folder} have one id",
                "rename one, or write the path of the one that is meant into a label file",
            )
        return self.folder / found[0]

    def unused(self, used: Collection[Path], told: Collection[str]) -> list[str]:
        """Return the pictures that are not among ``used`` and whose ids are not among ``told``."""
        left = [
            path
            for path, id_ in self.ids.items()
            if id_ not in told and self.folder / path not in used
        ]
        return [*left, *(path for path, item in self.problems.items() if item.id not in told)]

    def remarks(self, used: Collection[Path] = ()) -> list[str]:
        """Return what was seen and cannot be used, each kind in a line; ``used`` is used yet."""
        lines = []
        if self.unread:
            kinds = ", ".join(sorted({PurePosixPath(path).suffix.lower() for path in self.unread}))
            lines.append(
                f"{count_text(self.unread)} of a kind that is not read ({kinds}): convert to JPEG, "
                f"the first is {self.folder / printable(self.unread[0])}"
            )
        if self.unnamed:
            lines.append(
                f"{count_text(self.unnamed)} not used for want of a suffix: add .jpg or what they "
                f"are, the first is {self.folder / printable(self.unnamed[0])}"
            )
        beside = [path for path in self.beside if self.root / path not in used]
        if beside:
            lines.append(
                f"{count_text(beside)} beside {self.folder} and not used: move them there, the "
                f"first is {self.root / printable(beside[0])}"
            )
        if self.links:
            lines.append(
                f"{len(self.links)} links to folders in {self.folder} are not followed: put the "
                f"folders themselves there, the first is {printable(self.links[0])}"
            )
        return lines

    @cached_property
    def _by_path(self) -> dict[str, list[str]]:
        return _grouped((_plain(path), path) for path in self.ids)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return _grouped((_last(_plain(path)), path) for path in self.ids)

    @cached_property
    def _folders(self) -> frozenset[str]:
        return frozenset(_plain(path).rpartition("/")[0] for path in self.ids)

    def _named(self, name: str) -> list[str]:
        """Return the paths of the pictures that are called ``name``."""
        parts = _parts(_plain(name))
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            if tail in self._by_path:
                return _closest(self._by_path[tail], name)
            # What precedes may be the way to the folder somewhere else, but not a folder that is
            # here: then the picture is missing, and its namesake further up is another one.
            if start + 1 < len(parts) and "/".join(parts[start:-1]) in self._folders:
                return []
        last = parts[-1] if parts else ""
        return _closest(self.by_id.get(last) or self._by_stem.get(last, []), name)

    @cached_property
    def _by_caseless(self) -> dict[str, str]:
        stems = {_last(_plain(path)).casefold(): path for path in self.ids}
        ids = {id_.casefold(): path for path, id_ in self.ids.items()}
        return {**stems, **ids, **{_plain(path).casefold(): path for path in self.ids}}

    def _missing(self, id_: str, called: str) -> ProblemError:
        for path in self.unread:
            if _plain(path).replace("/", "_") == id_ or _same_end(path, called):
                return not_read(self.folder / path)
        spelt = (_plain(called).casefold(), id_.casefold())
        near = next((self._by_caseless[key] for key in spelt if key in self._by_caseless), None)
        return not_there(called, self.folder, near, "its row")


def not_there(called: str, folder: Path, near: str | None, entry: str) -> ProblemError:
    """Return what is wrong with an image that is not there.

    Args:
        called: What names it.
        folder: Where it should be.
        near: The image there that has that name in other capitals, if any.
        entry: What to drop.
    """
    return ProblemError(
        Kind.missing_image,
        f"no image {printable(called)} in {folder}",
        f"did you mean {printable(near)}? Capitals count" if near else f"add it, or drop {entry}",
    )


def not_read(path: Path) -> ProblemError:
    """Return what is wrong with an image that is there, but of a kind that is not read."""
    name = path.parent / printable(path.name)
    return ProblemError(
        Kind.unreadable_image,
        f"{name} is there, but {path.suffix.lower()} is not read",
        "convert it to JPEG",
    )


def find_masks(root: Path, pictures: Pictures) -> tuple[dict[Path, Path], list[str]]:
    """Find the masks of pictures: under their id, their path, or a stem that no other has.

    Args:
        root: The folder that holds ``MASK_FOLDERS``.
        pictures: Whose masks they are.

    Returns:
        The mask of each image that has one, and what ``mask_remarks`` says of other files.

    Raises:
        ArtifactError: A folder may not be read.
    """
    stems = Counter(_last(_plain(path)) for path in pictures.ids)
    names: dict[Path, list[str]] = {pictures.root / p: [_plain(p)] for p in pictures.beside}
    for path, id_ in pictures.ids.items():
        stem = _last(_plain(path))
        alone = stems[stem] == 1 and stem not in pictures.by_id
        names[pictures.folder / path] = [id_, _plain(path), *([stem] if alone else [])]
    folders = {root / name: walk_files(root / name)[0] for name in MASK_FOLDERS}
    found: dict[Path, Path] = {}
    used = set()
    for folder, files in reversed(folders.items()):
        masks = {_plain(path): folder / path for path in _of_kind(files, (".png",))}
        for image, calls in names.items() if masks else ():
            mask = next((masks[name] for name in calls if name in masks), None)
            if mask is not None:
                found[image] = mask
                used.add(mask)
    example = next(iter(pictures.by_id), "IMAGE")
    return found, mask_remarks(folders, used, example)


def flat_mask_remarks(
    folders: Iterable[Path], used: Collection[Path | None], example: str
) -> list[str]:
    """Return what ``mask_remarks`` does for data sets that come with masks of other images, too.

    There only files that can be nobody's are worth a word, or that none is of any use.
    """
    files = {folder: [path.name for path in list_files(folder)] for folder in folders}
    if any(used):
        other = [folder / name for folder, names in files.items() for name in names]
        used = {path for path in other if path.suffix.lower() == ".png"}
    return mask_remarks(files, used, example)


def mask_remarks(
    folders: dict[Path, list[str]], used: Collection[Path | None], example: str
) -> list[str]:
    """Return a line for each folder of masks that holds files which are masks of no image.

    Args:
        folders: Its files, for each folder.
        used: The masks that are some image's.
        example: The id of an image.
    """
    lines = []
    for folder, files in folders.items():
        unused = [path for path in files if folder / path not in used]
        if unused:
            lines.append(
                f"masks: {len(unused)} of {len(files)} files in {folder} are not used, the first "
                f"is {printable(unused[0])}: a mask is a PNG called after its image, such as "
                f"{example}.png"
            )
    return lines


def find_pictures(root: Path, *, deepest: int = 64, leave_out: Path | None = None) -> Pictures:
    """Find the pictures in and below a folder; none is decoded.

    Folders of masks, and what clipes itself wrote, are left out; of files without a suffix it is
    looked whether they start as pictures do.

    Args:
        root: The folder, or one that holds one of ``IMAGE_FOLDERS``.
        deepest: How many folders may lie between the images' folder and a picture.
        leave_out: A folder whose files do not count, if it lies below the images' folder.

    Raises:
        ArtifactError: A folder may not be read.
    """
    folder = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), root)
    files: Sequence[str]
    beside: Sequence[str] = ()
    files, links = walk_files(folder, skip=_NO_PHOTOS, made=_WRITTEN_HERE, deepest=deepest)
    if folder != root:
        # Only as deep as a slip goes: the folder above may hold anything.
        skip = _NO_PHOTOS | {folder.name}
        beside, _ = walk_files(root, skip=skip, made=_WRITTEN_HERE, deepest=1)
    if leave_out is not None:
        files, beside = _outside(leave_out, folder, files), _outside(leave_out, root, beside)
    ids, problems = {}, {}
    for path in _of_kind(files, IMAGE_SUFFIXES):
        try:
            id_ = path_id(path)
        except DatasetError as error:
            name = printable(path)
            problems[path] = Problem(name, f"{error}; rename it", Kind.unusable_entry)
            continue
        ids[path] = id_
    unread = tuple(_of_kind(files, UNREAD_SUFFIXES))
    beside = tuple(_of_kind(beside, IMAGE_SUFFIXES))
    unnamed = tuple(p for p in files if _may_be_unnamed(p) and _is_picture(folder / p))
    return Pictures(root, folder, ids, problems, unread, beside, tuple(links), unnamed)


def _may_be_unnamed(path: str) -> bool:
    """Tell whether a path has no suffix, or one like ``.jpg_large`` or ``.png~``."""
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 - many
    return not suffix or (suffix not in IMAGE_SUFFIXES and suffix.startswith(IMAGE_SUFFIXES))


def _is_picture(path: Path) -> bool:
    """Tell whether a file starts as a picture does."""
    try:
        with path.open("rb") as file:
            return file.read(4).startswith(_MAGIC)
    except OSError:
        return False  # it is no use anyway, and nobody asked for it


def _outside(left_out: Path, folder: Path, paths: Sequence[str]) -> Sequence[str]:
    """Return the paths below ``folder`` that do not lie in a folder below it.

    Args:
        left_out: That folder, by any of its names: links, and ``..``, lead to it as well.
        folder: Where the paths start; if it is or lies in ``left_out``, none is left out.
        paths: Files, with ``/``.
    """
    place = os.path.realpath(left_out)  # unlike Path.resolve, says nothing of links in circles
    holders = {path.rpartition("/")[0] for path in paths}
    below = {up for holder in holders for up in (holder, *map(str, PurePosixPath(holder).parents))}
    below -= {"", "."}  # the folder itself
    same = tuple(f"{name}/" for name in below if os.path.realpath(folder / name) == place)
    return [path for path in paths if not path.startswith(same)] if same else paths


def _of_kind(paths: Iterable[str], suffixes: Collection[str]) -> list[str]:
    return [path for path in paths if os.path.splitext(path)[1].lower() in suffixes]  # noqa: PTH122 - many


def _plain(path: str) -> str:
    """Return a path as it is compared: macOS stores accents decomposed, label files rarely do."""
    path = path.strip().replace("\\", "/").lstrip("/")
    return unicodedata.normalize("NFC", without_suffix(path))


def _parts(path: str) -> list[str]:
    return [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _same_end(path: str, called: str) -> bool:
    """Tell whether the shorter of two paths is the end of the other, suffix included."""
    one, other = (_parts(unicodedata.normalize("NFC", text.strip())) for text in (path, called))
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]


def _closest(paths: list[str], called: str) -> list[str]:
    """Return the paths that have the suffix of ``called``, too; all if none has."""
    return [path for path in paths if _same_end(path, called)] or paths


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _listing(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return " and ".join(map(printable, paths[:_NAMED])) + more


def count_text(paths: Sequence[str]) -> str:
    """Return how many pictures these are, as a sentence starts."""
    return "1 picture is" if len(paths) == 1 else f"{len(paths)} pictures are"
