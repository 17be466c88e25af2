"""The first pass of ``clipes cam``: what the classes of a run look like, from a part of its images.

The sums are kept in the run folder and written now and then, so that a pass that was stopped goes
on, and every shard uses the same ones. They are added in the order of the images whatever the
number of workers, so a pass that was stopped ends with the same bits as one that was not (on a GPU,
if it goes on with the same size of batch).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed

from clipes.config import PatchParams
from clipes.disk.files import write_arrays
from clipes.errors import ClipesError
from clipes.maps.looks import Looks, Statistics
from clipes.maps.maker import CamMaker, Prepared
from clipes.run.folder import Run
from clipes.run.loop import compute_together, in_groups
from clipes.run.origin import read_picture
from clipes.stages.looks_sources import (
    Source,
    count_changed,
    damaged,
    read_looks,
    read_sources,
    write_sources,
)
from clipes.stages.make_cams import KeptSights
from clipes.types import Progress, Sample, evenly_spaced

_SECONDS_BETWEEN_WRITES = 30.0


@dataclass
class _Pass:
    """How far the pass is.

    Attributes:
        statistics: Sums over the images so far.
        total: How many images there are to go through.
        tried: How many were.
        sources: Those of them that could be used.
        old_ids: Their ids instead, in a file that an older clipes wrote.
    """

    statistics: Statistics
    total: int
    tried: int = 0
    sources: list[Source] = field(default_factory=list)
    old_ids: tuple[str, ...] = ()

    def ids(self) -> frozenset[str]:
        """Return the ids of the sources."""
        return frozenset((*self.old_ids, *(source.id for source in self.sources)))


def learn_looks(
    samples: Sequence[Sample],
    maker: CamMaker,
    run: Run,
    patches: PatchParams,
    *,
    kept: KeptSights | None = None,
    keep: bool = False,
    batch: int = 1,
    workers: int,
    say: Callable[[str], None],
    progress: Progress,
) -> tuple[Looks | None, frozenset[str]]:
    """Find out what the classes look like, or read what was found before.

    It is found anew if one of the images that said it has other labels now, is another picture or
    is gone: what was wrong would be in every map. Images that came later change nothing.

    Args:
        samples: All images of the run, not of a shard.
        maker: Makes the statistics of an image.
        run: The run folder; the sums go to ``looks/statistics.npz``.
        patches: Settings.
        kept: Takes what is seen in the images, for the second pass.
        keep: Keep what was found whatever has changed since.
        batch: How many images to give to CLIP together, as in ``make_cams``.
        workers: How many batches at once.
        say: Told if another process does it, and what has changed.
        progress: Called after each image.

    Returns:
        What they look like, None if no image says so, and the ids of the images that say it.

    Raises:
        ArtifactError: The file of an earlier pass is damaged or of another vocabulary or model.
        WriteError: The run folder cannot be written to.
    """
    path = run.looks_path
    waiting = f"waiting for another process, which finds out what the classes look like: {path}"
    with run.claim("looks", on_wait=lambda: say(waiting)):
        found = _load(path, maker) if path.exists() else None
        if found and not keep and (changed := count_changed(found.sources, samples, path)):
            say(
                f"{changed} of the {len(found.sources)} images that say what the classes look like "
                "have other labels, are other pictures or are gone: it is learnt anew, and all "
                "maps are made again (--keep-looks keeps it)"
            )
            found = None
        if found is None or found.tried < found.total:
            spaced = evenly_spaced(len(samples), patches.statistics_images)
            chosen = [samples[index] for index in spaced]
            found = _begun(found, samples, len(chosen), path, maker)
            _go_on(
                found, chosen, maker, path, patches, kept or KeptSights(), batch, workers, progress
            )
        elif found.total < min(len(samples), patches.statistics_images):
            say(
                f"what the classes look like was learnt when there were {found.total} images; to "
                f"learn it from more, remove {path.parent}"
            )
    return Looks.of(found.statistics, patches), found.ids()


def load_looks(run: Run, maker: CamMaker, patches: PatchParams) -> Looks | None:
    """Read what the classes of a finished run look like; arguments as for ``learn_looks``.

    Raises:
        ArtifactError: There is no such file, or it is damaged or of another vocabulary or model.
    """
    return Looks.of(_load(run.looks_path, maker).statistics, patches)


def _begun(
    found: _Pass | None, samples: Sequence[Sample], total: int, path: Path, maker: CamMaker
) -> _Pass:
    """Return a pass that was stopped, if its images are the same still; else a new one."""
    before = _unfinished(path)
    if found is None and before.exists():
        found, path = _load(before, maker), before
    usable = found is not None and found.total == total and not found.old_ids
    if found is None or not usable or count_changed(found.sources, samples, path):
        return _Pass(maker.no_statistics(), total)
    return found


def _unfinished(path: Path) -> Path:
    # Not ``path`` itself: whoever stops because it takes too long has what was learnt before.
    return path.with_name("unfinished.npz")


def _go_on(
    state: _Pass,
    chosen: Sequence[Sample],
    maker: CamMaker,
    path: Path,
    patches: PatchParams,
    kept: KeptSights,
    batch: int,
    workers: int,
    progress: Progress,
) -> None:
    def look(images: Sequence[tuple[Source, Prepared]]) -> list[Statistics]:
        sights = maker.look([image for _, image in images])
        for (source, _), sight in zip(images, sights, strict=True):
            kept.keep(source.id, sight, source.picture)
        return [maker.statistics(sight, patches) for sight in sights]

    def look_at(group: Sequence[Sample]) -> tuple[Statistics, list[Source]]:
        images: dict[Source, tuple[Source, Prepared]] = {}
        for sample in group:
            with suppress(ClipesError):  # the second pass says what is wrong with it
                pixels, picture = read_picture(sample.image)
                source = Source(sample.id, tuple(sorted(sample.labels)), picture)
                images[source] = (source, maker.prepare(pixels, sample.labels))
        found, _ = compute_together(look, images)
        total = maker.no_statistics()
        for statistics in found.values():
            total.add(statistics)
        return total, list(found)

    progress(state.tried, state.total)
    written = time.monotonic()
    groups = in_groups(chosen[state.tried :], batch)
    # In order: sums of floats depend on it.
    jobs = (delayed(look_at)(group) for group in groups)
    results = Parallel(workers, backend="threading", return_as="generator")(jobs)
    for group, (statistics, sources) in zip(groups, results, strict=True):
        state.statistics.add(statistics)
        state.sources += sources
        state.tried += len(group)
        if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
            _save(_unfinished(path), state)
            written = time.monotonic()
        progress(state.tried, state.total)
    _save(path, state)
    _unfinished(path).unlink(missing_ok=True)


def _save(path: Path, state: _Pass) -> None:
    sums = state.statistics
    arrays = {
        "sums": sums.sums,
        "mass": sums.mass,
        "moment": sums.moment,
        "tried": np.array([state.tried, state.total], np.int64),
    }
    write_arrays(path, arrays | write_sources(state.sources), compress=False)


def _load(path: Path, maker: CamMaker) -> _Pass:
    arrays, expected = read_looks(path), maker.no_statistics()
    for name in ("sums", "mass", "moment"):
        part, like = arrays.get(name), getattr(expected, name)
        fits = part is not None and part.shape == like.shape and part.dtype == like.dtype
        if part is None or not fits or not np.isfinite(part).all():
            raise damaged(path, f"{path} is of other classes or another model")
    sums = Statistics(arrays["sums"], arrays["mass"], arrays["moment"])
    tried, total = arrays["tried"].tolist()
    sources = read_sources(arrays)
    if sources is None:
        return _Pass(sums, total, tried, old_ids=tuple(arrays["ids"].tolist()))
    return _Pass(sums, total, tried, sources)
