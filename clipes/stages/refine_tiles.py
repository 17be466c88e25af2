"""``clipes refine`` of one picture that memory is not to hold: the CRF on tiles of its pixels."""

from __future__ import annotations

import os

from clipes.disk.large import LargePicture
from clipes.listener import Listener
from clipes.masks.mosaic import TILED, LargeLabel, Tiles, Window, averaged, tile_side
from clipes.masks.pseudo import in_mask_order, largest_tile, part_probs, require_size
from clipes.masks.values import value_count
from clipes.run.folder import Run
from clipes.run.loop import in_order
from clipes.run.record import RefineSettings
from clipes.types import CamMaps, Float32Array, Sample

CRF_TILE = 1024
"""Side of the tiles where none is asked for: an overlap is four deviations of the CRF's reach."""


def refine_tiles(
    sample: Sample,
    cams: CamMaps,
    run: Run,
    settings: RefineSettings,
    listener: Listener,
    *,
    origin: str,
    workers: int | None,
) -> str:
    """Make and save mask and confidence map of an image, and say in tiles of what side.

    Args:
        sample: The image.
        cams: Its maps.
        run: The run folder, which has room for the pixels.
        settings: Of the CRF.
        listener: Who is told how it goes.
        origin: What the files say that they were made from.
        workers: Tiles at once; None for as many as there are cores, and no more than fit into the
            memory that one image may take.

    Raises:
        ImageError: The image cannot be read, or the maps were made from one of another size.
        WriteError: There is no room.
    """
    cams = in_mask_order(cams)
    picture = LargePicture(sample.image, run.root)
    require_size(picture.size, cams)
    labels = value_count(len(cams.labels))
    largest = largest_tile(labels)
    side = tile_side(picture.size, settings.tile, CRF_TILE, largest)
    tiles, made = Tiles.of(picture.size, side), LargeLabel(picture.size, run.root)

    def probs(window: Window) -> Float32Array:
        return part_probs(
            picture.window(*window),
            cams,
            *window,
            settings.crf,
            background_exponent=settings.background_exponent,
            backend=settings.backend,
        )

    at_once = max(1, min(workers or os.cpu_count() or 1, (largest // side) ** 2))
    with listener.progress(f"refine {sample.id}") as progress:
        found = in_order(probs, list(tiles), workers=at_once, progress=progress)
        made.fill(averaged(tiles, found, labels, run.root), cams.labels)
    made.write_confidence(run.confidence_path(sample.id), origin=origin)
    made.write_mask(run.pseudo_path(sample.id), origin=origin)
    return TILED.format(side)
