"""What stages that work on large pictures in tiles have in common. No torch in here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from clipes.disk.images import MAX_TILED_PIXELS, opened
from clipes.errors import ImageError
from clipes.listener import Listener
from clipes.masks.mosaic import tile_side
from clipes.run.loop import Summary, Work, for_each
from clipes.types import Sample

TILE = 2048
"""Side of tiles that towers or segmenters look at, in pixels, where none is asked for."""


def is_large(sample: Sample, tile: int | None) -> bool:
    """Tell whether a picture is worked on in tiles.

    Args:
        sample: The picture; one that cannot be read is not large.
        tile: As for ``clipes.masks.mosaic.tile_side``.
    """
    try:
        with opened(sample.image, most=MAX_TILED_PIXELS) as image:
            size = image.size  # upright or not; to know, a PNG would have to be decoded
    except ImageError:
        return False
    return tile_side(size, tile, 1) > 0


def large_last(
    samples: Sequence[Sample],
    tile: int | None,
    others: Callable[[Sequence[Sample]], Summary],
    work: Work,
    is_done: Callable[[Sample], bool],
    listener: Listener,
) -> Summary:
    """Do pictures that are worked on in tiles after all others, and one by one.

    Args:
        samples: All pictures.
        tile: As for ``is_large``.
        others: Does those that are not.
        work: Does one that is, and shows its progress itself.
        is_done: As for ``clipes.run.loop.for_each``.
        listener: Who is told which fail.

    Raises:
        WriteError: An output cannot be written.
    """
    large = {sample.id for sample in samples if is_large(sample, tile)}
    done = others([sample for sample in samples if sample.id not in large])
    if not large:
        return done
    tiled = for_each(
        work,
        [sample for sample in samples if sample.id in large],
        is_done=is_done,
        progress=lambda done, total: None,
        report=listener.report,
    )
    return Summary(
        done.done + tiled.done,
        done.skipped + tiled.skipped,
        (*done.failures, *tiled.failures),
        Counter(done.remarks) + Counter(tiled.remarks),
    )
