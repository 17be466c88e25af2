"""The last pass of ``clipes cam``: refined maps of every image, in the run folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from clipes.listener import Listener
from clipes.maps.maker import CamMaker, PreparedTiles
from clipes.masks.mosaic import TILED
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.loop import Summary, for_each_batch
from clipes.run.origin import Picture, changing
from clipes.stages.images import ImageSource, ReadImage
from clipes.stages.tiles import large_last
from clipes.types import CamMaps, Sample

SHRUNK = "are larger than what CLIP looks at: it saw a smaller copy"
"""Said of images beyond ``CamParams.max_patches``."""

EMPTY = "have maps that show nothing: too small, or all alike; their masks are all background"
"""Said of images such as those of one patch."""


def make_cams(
    samples: Sequence[Sample],
    maker: CamMaker,
    run: Run,
    current: Freshness,
    images: ImageSource,
    listener: Listener,
    *,
    learnt_from: Collection[str] = (),
    batch: int = 1,
    workers: int,
) -> Summary:
    """Make and save the maps of every sample that has none, or whose maps are out of date.

    Args:
        samples: Images with their labels.
        maker: Makes the maps.
        run: Where they go.
        current: Tells which maps are out of date.
        images: Reads and encodes.
        listener: Told of progress, and of each image that cannot be processed; the others go on.
        learnt_from: Ids of the images that say what the classes look like.
        batch: How many images to give to the towers together; they see those of one size at once.
        workers: How many batches are under way, each in a thread; see ``share_processor``.
    """

    def compute(inputs: Sequence[ReadImage]) -> list[tuple[CamMaps, Picture]]:
        encoded = images.encode(inputs, maker)
        return [
            (maker.maps(image, in_statistics=one.id in learnt_from), one.picture)
            for image, one in zip(encoded, inputs, strict=True)
        ]

    def save(sample: Sample, made: tuple[CamMaps, Picture]) -> str | None:
        cams, picture = made
        if not picture.is_still(sample.image):
            raise changing(sample.image)
        run.save_cams(sample.id, cams, origin=current.maps_origin(sample, picture).text())
        if not cams.maps.any():
            return EMPTY
        return SHRUNK if maker.shrinks(cams.size) else None

    def others(samples: Sequence[Sample]) -> Summary:
        with listener.progress("cam") as progress:
            return for_each_batch(
                lambda sample: images.read(sample, maker),
                compute,
                save,
                samples,
                size=batch,
                is_done=current.has_maps,
                workers=workers,
                progress=progress,
                report=listener.report,
            )

    def in_tiles(sample: Sample) -> str | None:
        one = images.read(sample, maker)
        with listener.progress(f"cam {sample.id}") as progress:
            if isinstance(one.image, PreparedTiles):
                one = replace(one, image=replace(one.image, progress=progress))
            (made,) = compute([one])
        remark = save(sample, made)
        return TILED.format(one.side) if one.side else remark

    return large_last(samples, images.tile, others, in_tiles, current.has_maps, listener)
