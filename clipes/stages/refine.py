"""Stage 2: maps and images to pseudo-masks and confidence maps, on many cores or machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from clipes.choices import CrfBackend, RefineBackend
from clipes.config import get_preset
from clipes.disk.images import MAX_TILED_PIXELS, read_image
from clipes.errors import ArtifactError
from clipes.listener import Listener
from clipes.masks.pseudo import SHRUNK, pseudo_label, workable_size
from clipes.masks.values import value_count
from clipes.run.folder import Run
from clipes.run.freshness import EDITED_REMEDY, Freshness
from clipes.run.loop import Outcome, Shard, Summary, for_each, waiting
from clipes.run.origin import MaskOrigin
from clipes.run.record import RefineSettings
from clipes.run.reopen import preset_of, reopen
from clipes.stages.refine_tiles import CRF_TILE, refine_tiles
from clipes.stages.tiles import large_last
from clipes.types import CamMaps, Sample

STAGE = "refine"


@dataclass(frozen=True)
class RefineRequest:
    """All that ``clipes refine`` is told.

    Attributes:
        root: Where the data set is, if not where run.json says.
        preset: Name of the preset whose CRF is used; None for that of the maps.
        crf: Implementation of the CRF, of ``CrfBackend``.
        command: The command line, for the record.
        tile: Side of the tiles of larger images; None for tiles only beyond ``MAX_PIXELS``.
    """

    root: Path | None = None
    preset: str | None = None
    crf: str = CrfBackend.numba.value
    command: str = ""
    tile: int | None = None


@dataclass(frozen=True)
class RefineResources:
    """What the work is shared among.

    Attributes:
        part: The images that this process does.
        workers: Images at once; None for as many as there are cores.
        backend: What they are spread over, of ``RefineBackend``.
    """

    part: Shard = field(default_factory=Shard)
    workers: int | None = None
    backend: str = RefineBackend.loky.value


def refine(
    request: RefineRequest, run: Run, resources: RefineResources, listener: Listener
) -> Outcome:
    """Make the masks and confidence maps of a run's images that have none, or old ones.

    If there is nothing to do, nothing is written: a finished run may be read-only.

    Args:
        request: What is asked for.
        run: The run folder; only images with maps in it can be refined.
        resources: What the work is shared among.
        listener: Who is told how it goes.

    Raises:
        RunConflictError: The masks there are were made with other settings.
        ClipesError: Run folder or data set cannot be used.
    """
    data = reopen(run, request.root)
    preset = preset_of(run) if request.preset is None else get_preset(request.preset)
    settings = RefineSettings(preset.crf, preset.background_exponent, request.crf, request.tile)
    shared = resources.part.count > 1
    if shared or _has_masks(run):
        run.check_settings(STAGE, settings.to_dict())
    current = Freshness.of(run, data.classes, refine=settings.to_dict())
    mine = resources.part.of(data.samples)
    todo = waiting(mine, current.has_pseudo, listener)
    if not todo:
        return Outcome(Summary(0, len(mine), ()), data.failures)
    facts = {"tile": settings.tile or CRF_TILE}  # the second of pictures that cannot be held
    with run.claim(STAGE, shared=shared):
        # Whoever removed the masks starts over; not as one of several, who may differ.
        anew = not (shared or _has_masks(run))
        run.begin(STAGE, settings.to_dict(), request.command, facts, anew=anew)
        summary = make_masks(todo, run, settings, current, resources, listener)
    return Outcome(replace(summary, skipped=len(mine) - len(todo)), data.failures)


def _has_masks(run: Run) -> bool:
    return bool(run.ids("pseudo") or run.ids("confidence"))


def make_masks(
    samples: Sequence[Sample],
    run: Run,
    settings: RefineSettings,
    current: Freshness,
    resources: RefineResources,
    listener: Listener,
) -> Summary:
    """Make and save the mask and confidence map of every sample that has none up to date.

    Masks that were edited by hand are never written over: if their maps have changed, that is
    reported.

    Args:
        samples: Images with maps.
        run: The run folder.
        settings: Of the CRF.
        current: Tells which masks are out of date.
        resources: What the work is shared among; all samples are done, whatever the part.
        listener: Who is told how it goes.
    """
    # Workers on other machines, or started before a change of folder, have another idea of ".".
    run = Run(run.root.absolute())
    samples = [replace(sample, image=sample.image.absolute()) for sample in samples]
    current = current.at(run)

    def others(samples: Sequence[Sample]) -> Summary:
        with listener.progress(STAGE) as progress:
            return for_each(
                partial(_refine_one, run=run, settings=settings, current=current),
                samples,
                is_done=current.has_pseudo,
                backend=resources.backend,
                workers=resources.workers,
                progress=progress,
                report=listener.report,
            )

    def in_tiles(sample: Sample) -> str:
        cams, origin = _usable(sample, run, settings, current)
        return refine_tiles(
            sample, cams, run, settings, listener, origin=origin, workers=resources.workers
        )

    return large_last(samples, settings.tile, others, in_tiles, current.has_pseudo, listener)


def _refine_one(
    sample: Sample, run: Run, settings: RefineSettings, current: Freshness
) -> str | None:
    cams, origin = _usable(sample, run, settings, current)
    pseudo = pseudo_label(
        read_image(sample.image),
        cams,
        settings.crf,
        background_exponent=settings.background_exponent,
        backend=settings.backend,
    )
    run.save_pseudo(sample.id, pseudo, origin=origin)
    size = workable_size(cams.size, value_count(len(cams.labels)))
    return None if size == cams.size else SHRUNK


def _usable(
    sample: Sample, run: Run, settings: RefineSettings, current: Freshness
) -> tuple[CamMaps, str]:
    """Return the maps of an image, and the origin of masks that are made of them.

    Raises:
        ArtifactError: They are out of date, or a person's work stands where the mask goes.
    """
    if reason := current.maps(sample):
        raise ArtifactError(reason, "run 'clipes cam' again")
    if run.has_pseudo(sample.id) and current.is_edited(sample) and (why := current.mask(sample)):
        raise ArtifactError(f"{why}: {run.pseudo_path(sample.id)}", EDITED_REMEDY)
    maps, cams = run.maps_origin(sample.id), run.load_cams(sample.id, most=MAX_TILED_PIXELS)
    if run.maps_origin(sample.id) != maps:
        raise ArtifactError(
            "its maps were made again while they were read", "run the same command again"
        )
    return cams, MaskOrigin.of(maps, settings.to_dict()).text() if maps else ""
