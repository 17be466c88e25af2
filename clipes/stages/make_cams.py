"""Stage 1: images and their labels to refined activation maps, the only stage that needs CLIP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock

from clipes.maps.maker import CamMaker, Prepared, Sight
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.loop import Summary, for_each_batch
from clipes.run.origin import Picture, changing, read_picture
from clipes.types import CamMaps, Failure, Progress, Sample

SHRUNK = "are larger than what CLIP looks at: it saw a smaller copy"
"""Said of images beyond ``CamParams.max_patches``."""

_KEPT_IMAGES, _KEPT_BYTES = 200, 1 << 30  # as many images of VOC take 950 MB


@dataclass(frozen=True)
class _Input:
    """An image on its way to maps.

    Attributes:
        image: What CLIP is to see, or saw before.
        picture: Its file as it was read.
        seen: Whether it is among the images that say what the classes look like.
    """

    image: Prepared | Sight
    picture: Picture
    seen: bool


class KeptSights:
    """What a first pass saw, for the second, as long as it fits into memory.

    Args:
        wanted: Ids of the images that the second pass will ask for.
    """

    def __init__(self, wanted: Iterable[str] = ()) -> None:
        self._wanted = frozenset(wanted)
        self._sights: dict[str, tuple[Sight, Picture]] = {}
        self._room = _KEPT_BYTES
        self._lock = Lock()

    def keep(self, name: str, sight: Sight, picture: Picture) -> None:
        """Keep what was seen in the image of an id, if it is wanted and there is room."""
        if name not in self._wanted:
            return
        size = sight.evidence.activations.nbytes + sight.evidence.walk.attention.nbytes
        with self._lock:
            if size <= self._room and len(self._sights) < _KEPT_IMAGES:
                self._room -= size
                self._sights[name] = sight.alone(), picture

    def take(self, name: str) -> tuple[Sight, Picture] | None:
        """Return what was seen in the image of an id and forget it; None if it was not kept."""
        return self._sights.pop(name, None)


def make_cams(
    samples: Sequence[Sample],
    maker: CamMaker,
    run: Run,
    current: Freshness,
    *,
    learnt_from: Collection[str] = (),
    kept: KeptSights | None = None,
    batch: int = 1,
    workers: int,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Make and save the maps of every sample that has none, or whose maps are out of date.

    Args:
        samples: Images with their labels.
        maker: Makes the maps.
        run: Where they go.
        current: Tells which maps are out of date.
        learnt_from: Ids of the images that say what the classes look like.
        kept: What was seen in some of them.
        batch: How many images to give to CLIP together; it looks at those of one size at once.
        workers: How many batches are under way, each in a thread; see ``share_processor``.
        progress: Called after each image.
        report: Called with each image that cannot be processed; the others go on.
    """
    kept = kept or KeptSights()

    def read(sample: Sample) -> _Input:
        seen = sample.id in learnt_from
        if (known := kept.take(sample.id)) is not None:
            return _Input(*known, seen)
        pixels, picture = read_picture(sample.image)
        return _Input(maker.prepare(pixels, sample.labels), picture, seen)

    def compute(inputs: Sequence[_Input]) -> list[tuple[CamMaps, Picture]]:
        images = [one.image for one in inputs]
        new = iter(maker.look([image for image in images if isinstance(image, Prepared)]))
        sights = [next(new) if isinstance(image, Prepared) else image for image in images]
        return [
            (maker.maps(sight, seen=one.seen), one.picture)
            for sight, one in zip(sights, inputs, strict=True)
        ]

    def save(sample: Sample, made: tuple[CamMaps, Picture]) -> str | None:
        cams, picture = made
        if not picture.is_still(sample.image):
            raise changing(sample.image)
        run.save_cams(sample.id, cams, origin=current.maps_origin(sample, picture).text())
        return SHRUNK if maker.shrinks(cams.size) else None

    return for_each_batch(
        read,
        compute,
        save,
        samples,
        size=batch,
        is_done=current.has_maps,
        workers=workers,
        progress=progress,
        report=report,
    )
