"""The first passes of ``clipes cam``: what the classes of a run look like, from some of its images.

The sums are kept in the run folder and written now and then, so that a pass that was stopped goes
on, and every shard uses the same ones. They are added in the order of the images whatever the
number of workers, so a pass that was stopped ends with the same bits as one that was not (on a GPU,
if it goes on with the same size of batch).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from joblib import Parallel, delayed

from clipes.config import PatchParams
from clipes.disk.files import write_arrays
from clipes.errors import ClipesError
from clipes.listener import Listener, ignore
from clipes.maps.looks import Looks, Statistics
from clipes.maps.maker import CamMaker, Lesson
from clipes.maps.neighbours import Neighbours, Regions
from clipes.run.folder import Run
from clipes.run.loop import compute_together, in_groups
from clipes.run.origin import digest, mark_seen
from clipes.stages.drawn_masks import DrawnMasks
from clipes.stages.images import ImageSource, ReadImage
from clipes.stages.looks_sources import (
    Arrays,
    Source,
    count_changed,
    damaged,
    kept_vectors,
    read_looks,
    read_sources,
    vectors_of,
    write_sources,
)
from clipes.types import Progress, Sample, UInt8Array, evenly_spaced

_SECONDS_BETWEEN_WRITES = 30.0


@dataclass
class _Learnt:
    """How far learning is.

    Attributes:
        rounds: Sums over the images of each round; the last may not be over.
        total: How many images there are to go through in a round.
        tried: How many were in the last of the rounds.
        sources: Those of them that could be used.
        old_ids: Their ids instead, in a file that an older clipes wrote.
        regions: What images can be asked, by the round that they were found in; of a finished file
            there are none.
        chosen: Digest of the ids of the images of a round, in order; empty in a file that an older
            clipes wrote.
        vectors: sha256 of the class vectors that their maps came from; empty if it is not known.
        started: When this process began with it, before it looked at a picture, in nanoseconds.
    """

    rounds: list[Statistics]
    total: int
    tried: int = 0
    sources: list[Source] = field(default_factory=list)
    old_ids: tuple[str, ...] = ()
    regions: dict[int, list[Regions]] = field(default_factory=dict)
    chosen: str = ""
    vectors: str = ""
    started: int = field(default_factory=time.time_ns)

    def ids(self) -> frozenset[str]:
        """Return the ids of the sources."""
        return frozenset((*self.old_ids, *(source.id for source in self.sources)))

    def is_over(self, rounds: int) -> bool:
        """Tell whether all of so many rounds are over."""
        return len(self.rounds) == rounds and self.tried == self.total

    def neighbours(self, patches: PatchParams, device: torch.device) -> Neighbours | None:
        """Return whom images ask before they say something in the last of the rounds."""
        found = self.regions.get(len(self.rounds) - 2)
        params = patches.rounds[len(self.rounds) - 2].neighbours
        return Neighbours(Regions.joined(found), device, params) if found and params else None

    def can_go_on(self, patches: PatchParams) -> bool:
        """Tell whether all is there that the last of the rounds needs."""
        before = len(self.rounds) - 2
        return before < 0 or not patches.rounds[before].neighbours or before in self.regions

    def looks(self, patches: PatchParams) -> list[Looks | None]:
        """Return what the classes look like after each round."""
        return [Looks.of(statistics, patches) for statistics in self.rounds]


def learn_looks(
    samples: Sequence[Sample],
    maker: CamMaker,
    run: Run,
    patches: PatchParams,
    images: ImageSource,
    listener: Listener,
    *,
    drawn: DrawnMasks | None = None,
    keep: bool = False,
    batch: int = 1,
    workers: int,
) -> tuple[CamMaker, frozenset[str]]:
    """Find out what the classes look like, or read what was found before.

    It is found anew if one of the images that said it has other labels or another corrected mask
    now, is another picture or is gone: what was wrong would be in every map. So it is if the class
    vectors were fitted anew, and if none of the images could be used, as when a disk was gone.
    Images that came later change nothing.

    Args:
        samples: All images of the run, not of a shard.
        maker: Makes the statistics of an image.
        run: The run folder; the sums go to ``looks/statistics.npz``.
        patches: Settings.
        images: Reads and encodes, and keeps what is seen for the passes that follow.
        listener: Told of progress, if another process does it, and what has changed.
        drawn: Masks that a person drew, which are believed instead of maps; None for none.
        keep: Keep what was found whatever has changed since.
        batch: How many images to give to the towers together, as in ``make_cams``.
        workers: How many batches at once.

    Returns:
        A maker that knows what they look like, and the ids of the images that say it.

    Raises:
        ArtifactError: The file of an earlier pass is damaged or of another vocabulary or model.
        WriteError: The run folder cannot be written to.
    """
    path, rounds, vectors = run.looks_path, len(patches.rounds), vectors_of(run)
    waiting = f"waiting for another process, which finds out what the classes look like: {path}"
    with run.claim("looks", on_wait=lambda: listener.say(waiting)):
        found = _load(path, maker, rounds) if path.exists() else None
        if found and not found.ids():
            found = None  # all failed, perhaps for a while: they are tried again
        if found and not keep and (why := _why_anew(found, vectors, samples, path, drawn)):
            listener.say(
                f"{why}: it is learnt anew, and all maps are made again (--keep-looks keeps it)"
            )
            found = None
        spaced = evenly_spaced(len(samples), patches.statistics_images)
        if found is None or not found.is_over(rounds):
            chosen = [samples[index] for index in spaced]
            ids = digest([sample.id for sample in chosen])
            new = _Learnt([maker.no_statistics(0)], len(chosen), chosen=ids, vectors=vectors)
            found = _begun(found, new, samples, path, maker, patches, drawn, listener.say)
            rest = _Rounds(found, chosen, maker, path, patches, images, drawn, listener.say)
            with listener.progress("looks") as progress:
                rest.go_on(batch, workers, progress)
        _say_few(len(found.ids()), len(spaced), path, listener.say)
    return maker.with_looks(*found.looks(patches)), found.ids()


def load_looks(run: Run, maker: CamMaker, patches: PatchParams) -> CamMaker:
    """Return a maker that knows what the classes of a finished run look like.

    Raises:
        ArtifactError: There is no such file, or it is damaged or of another vocabulary or model.
    """
    return maker.with_looks(*_load(run.looks_path, maker, len(patches.rounds)).looks(patches))


def _why_anew(
    found: _Learnt,
    vectors: str,
    samples: Sequence[Sample],
    path: Path,
    drawn: DrawnMasks | None,
) -> str:
    """Return why what was found is to be learnt anew; empty if it is not."""
    if found.vectors not in ("", vectors):
        return "what the classes look like was learnt with other class vectors"
    if changed := count_changed(found.sources, samples, path, drawn):
        return (
            f"{changed} of the {len(found.sources)} images that say what the classes look like "
            "have other labels or corrected masks, are other pictures or are gone"
        )
    return ""


def _say_few(used: int, wanted: int, path: Path, say: Callable[[str], None]) -> None:
    """Say if fewer images tell what the classes look like than are there to be asked."""
    if wanted and not used:
        say(
            f"none of {wanted} images can be used to learn what the classes look like: words alone "
            "make the maps, and the next 'clipes cam' tries again"
        )
    elif used < wanted:
        say(
            f"what the classes look like was learnt from {used} of {wanted} images; if the others "
            f"can be used now, remove {path.parent} to learn it from all"
        )


def _begun(
    found: _Learnt | None,
    new: _Learnt,
    samples: Sequence[Sample],
    path: Path,
    maker: CamMaker,
    patches: PatchParams,
    drawn: DrawnMasks | None,
    say: Callable[[str], None],
) -> _Learnt:
    """Return what was begun and stopped, if all that it is of is the same still; else ``new``."""
    before = _unfinished(path)
    if found is None and before.exists():
        found, path = _load(before, maker, len(patches.rounds)), before
    if found is None:
        return new
    if (
        (found.chosen, found.vectors) == (new.chosen, new.vectors)
        and found.can_go_on(patches)
        and not count_changed(found.sources, samples, path, drawn)
    ):
        return found
    say(
        "what was begun of learning what the classes look like is of other images, masks or class "
        "vectors, or of an older clipes: it begins anew"
    )
    return new


def _unfinished(path: Path) -> Path:
    # Not ``path`` itself: whoever stops because it takes too long has what was learnt before.
    return path.with_name("unfinished.npz")


class _Rounds:
    """Goes through the images once a round.

    Not a loop of ``clipes.run.loop``: the sums of floats depend on their order, and nothing of a
    single image is saved.

    Args:
        state: How far it is.
        chosen: The images.
        maker: Makes the statistics of an image.
        path: Where the sums go.
        patches: Settings.
        images: Reads and encodes.
        drawn: Masks that are believed instead of maps; None for none.
        say: Told of those that cannot be used.
    """

    def __init__(
        self,
        state: _Learnt,
        chosen: Sequence[Sample],
        maker: CamMaker,
        path: Path,
        patches: PatchParams,
        images: ImageSource,
        drawn: DrawnMasks | None,
        say: Callable[[str], None],
    ) -> None:
        self._drawn, self._say = drawn, say
        self._state, self._chosen, self._maker = state, chosen, maker
        self._path, self._patches, self._images = path, patches, images
        self._written = time.monotonic()
        self._neighbours: Neighbours | None = None
        self._asked: frozenset[str] = frozenset()

    def go_on(self, batch: int, workers: int, progress: Progress) -> None:
        """Do what is left of the rounds."""
        state, rounds = self._state, self._patches.rounds
        while True:
            before = state.rounds[:-1]
            looks = [Looks.of(statistics, self._patches) for statistics in before]
            self._neighbours = state.neighbours(self._patches, self._maker.device)
            self._go_through(self._maker.with_looks(*looks), batch, workers, progress)
            if state.is_over(len(rounds)):
                break
            state.regions.pop(len(state.rounds) - 2, None)
            state.rounds.append(self._maker.no_statistics(len(state.rounds)))
            state.tried = 0
        state.regions.clear()  # whoever makes maps asks no one
        _save(self._path, state)
        _unfinished(self._path).unlink(missing_ok=True)

    def _go_through(self, maker: CamMaker, batch: int, workers: int, progress: Progress) -> None:
        state = self._state
        whole, begun = len(self._patches.rounds) * state.total, len(state.rounds) - 1
        params = self._patches.rounds[begun].neighbours
        spaced = evenly_spaced(len(self._chosen), params.images if params else 0)
        self._asked = frozenset(self._chosen[index].id for index in spaced)
        progress(begun * state.total + state.tried, whole)
        groups = in_groups(self._chosen[state.tried :], batch)
        # Who could not be used in the first round is no source: its maps get its own sums.
        usable = state.ids() if begun else {sample.id for sample in self._chosen}
        jobs = (
            delayed(self._lessons)([sample for sample in group if sample.id in usable], maker)
            for group in groups
        )
        results = Parallel(workers, backend="threading", return_as="generator")(jobs)
        for group, lessons in zip(groups, results, strict=True):
            self._take_in(lessons, begun)
            state.tried += len(group)
            if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
                _save(_unfinished(self._path), state)
                self._written = time.monotonic()
            progress(begun * state.total + state.tried, whole)

    def _take_in(self, lessons: Mapping[Source, Lesson], number: int) -> None:
        """Add what some images teach in the round of a number."""
        state, sums = self._state, self._maker.no_statistics(number)
        for lesson in lessons.values():
            sums.add(lesson.statistics)
        state.rounds[-1].add(sums)
        state.sources += lessons if number == 0 else []
        for source, lesson in lessons.items():
            if lesson.regions is not None and source.id in self._asked:
                state.regions.setdefault(number, []).append(lesson.regions)

    def _lessons(self, group: Sequence[Sample], maker: CamMaker) -> Mapping[Source, Lesson]:
        """Return what those of some images teach that can be used."""

        def look(images: Sequence[ReadImage]) -> list[Lesson]:
            encoded = self._images.encode(images, maker)
            for one, image in zip(images, encoded, strict=True):
                self._images.keep(one, image)
            return [
                maker.lesson(image, one.id, self._neighbours, self._mask(by_id[one.id]))
                for one, image in zip(images, encoded, strict=True)
            ]

        by_id = {sample.id: sample for sample in group}
        images: dict[Source, ReadImage] = {}
        for sample in group:
            with suppress(ClipesError):  # the last pass says what is wrong with it
                image = self._images.read(sample, maker)
                mask = None if self._drawn is None else self._drawn.file(sample)
                labels = tuple(sorted(sample.labels))
                images[Source(sample.id, labels, image.picture, mask)] = image
        found, _ = compute_together(look, images)
        return found

    def _mask(self, sample: Sample) -> UInt8Array | None:
        """Return the mask that a person drew of an image, if it can be used; say once if not."""
        if self._drawn is None:
            return None
        return self._drawn.read(sample, self._say if len(self._state.rounds) == 1 else ignore)


def _save(path: Path, state: _Learnt) -> None:
    arrays = {
        "tried": np.array([state.tried, state.total], np.int64),
        "chosen": np.array(state.chosen),
        "vectors": np.array(state.vectors),
    }
    for number, sums in enumerate(state.rounds):
        for name in ("sums", "mass", "moment"):
            arrays[_key(name, number)] = getattr(sums, name)
    for number, some in state.regions.items():
        joined = Regions.joined(some)
        arrays[_key("centres", number)] = joined.centres.numpy()
        arrays[_key("shares", number)] = joined.shares.numpy()
        arrays[_key("owners", number)] = np.array(joined.owners, np.str_)
    write_arrays(path, arrays | write_sources(state.sources), compress=False)
    mark_seen(path, state.started)  # a picture that was replaced since is looked at again


def _key(name: str, number: int) -> str:
    return f"{name}_{number + 1}" if number else name


def _load(path: Path, maker: CamMaker, rounds: int) -> _Learnt:
    arrays = read_looks(path)
    there = [number for number in range(rounds) if _key("sums", number) in arrays]
    found = [_statistics_of(arrays, number, path, maker) for number in there or [0]]
    tried, total = arrays["tried"].tolist()
    sources = read_sources(arrays)
    if sources is None:
        return _Learnt(found, total, tried, old_ids=tuple(arrays["ids"].tolist()))
    chosen, vectors = str(arrays.get("chosen", "")), kept_vectors(arrays)
    regions = {
        number: [_regions_of(arrays, number, path, maker)]
        for number in there
        if _key("owners", number) in arrays
    }
    return _Learnt(found, total, tried, sources, regions=regions, chosen=chosen, vectors=vectors)


def _regions_of(arrays: Arrays, number: int, path: Path, maker: CamMaker) -> Regions:
    labels, width = maker.no_statistics(number).sums.shape
    owners = tuple(map(str, arrays[_key("owners", number)].tolist()))
    centres, shares = (
        torch.from_numpy(
            _checked(arrays, _key(name, number), (len(owners), size), np.float16, path)
        )
        for name, size in (("centres", width), ("shares", labels))
    )
    return Regions(centres, shares, owners)


def _statistics_of(arrays: Arrays, number: int, path: Path, maker: CamMaker) -> Statistics:
    expected = maker.no_statistics(number)
    return Statistics(
        *(
            _checked(arrays, _key(name, number), like.shape, like.dtype, path)
            for name, like in vars(expected).items()
        )
    )


def _checked(
    arrays: Arrays, key: str, shape: tuple[int, ...], dtype: npt.DTypeLike, path: Path
) -> npt.NDArray[Any]:
    """Return an array of a file.

    Raises:
        ArtifactError: It is not there, or not what it is to be.
    """
    part = arrays.get(key)
    fits = part is not None and part.shape == shape and part.dtype == dtype
    if part is None or not fits or not np.isfinite(part).all():
        raise damaged(path, f"{path} is of other classes or another model")
    return part
