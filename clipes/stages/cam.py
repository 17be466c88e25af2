"""Stage 1: images and their labels to refined activation maps, the only stage that needs CLIP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from threading import Lock

from clipes.artifacts import Run
from clipes.cam_maker import CamMaker, Prepared, Sight
from clipes.images import read_image
from clipes.runner import Summary, for_each_batch
from clipes.types import CamMaps, Failure, Progress, Sample

SHRUNK = "are larger than what CLIP looks at: it saw a smaller copy"
"""Said of images beyond ``CamParams.max_patches``."""

_KEPT_IMAGES, _KEPT_BYTES = 200, 1 << 30  # as many images of VOC take 950 MB


class KeptSights:
    """What a first pass saw, for the second, as long as it fits into memory.

    Args:
        wanted: Ids of the images that the second pass will ask for.
    """

    def __init__(self, wanted: Iterable[str] = ()) -> None:
        self._wanted = frozenset(wanted)
        self._sights: dict[str, Sight] = {}
        self._room = _KEPT_BYTES
        self._lock = Lock()

    def keep(self, name: str, sight: Sight) -> None:
        """Keep what was seen in the image of an id, if it is wanted and there is room."""
        if name not in self._wanted:
            return
        size = sight.evidence.activations.nbytes + sight.evidence.walk.attention.nbytes
        with self._lock:
            if size <= self._room and len(self._sights) < _KEPT_IMAGES:
                self._room -= size
                self._sights[name] = sight.alone()

    def take(self, name: str) -> Sight | None:
        """Return what was seen in the image of an id and forget it; None if it was not kept."""
        return self._sights.pop(name, None)


def make_cams(
    samples: Sequence[Sample],
    maker: CamMaker,
    run: Run,
    *,
    learnt_from: Collection[str] = (),
    kept: KeptSights | None = None,
    batch: int = 1,
    workers: int,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Make and save the maps of every sample that has none yet.

    Args:
        samples: Images with their labels.
        maker: Makes the maps.
        run: Where they go.
        learnt_from: Ids of the images that say what the classes look like.
        kept: What was seen in some of them.
        batch: How many images to give to CLIP together; it looks at those of one size at once.
        workers: How many batches are under way, each in a thread; see ``share_processor``.
        progress: Called after each image.
        report: Called with each image that cannot be processed; the others go on.
    """
    kept = kept or KeptSights()

    def read(sample: Sample) -> tuple[bool, Prepared | Sight]:
        sight = kept.take(sample.id)
        seen = sample.id in learnt_from
        return seen, sight or maker.prepare(read_image(sample.image), sample.labels)

    def compute(images: Sequence[tuple[bool, Prepared | Sight]]) -> list[CamMaps]:
        new = iter(maker.look([image for _, image in images if isinstance(image, Prepared)]))
        return [
            maker.maps(next(new) if isinstance(image, Prepared) else image, seen=seen)
            for seen, image in images
        ]

    def save(sample: Sample, cams: CamMaps) -> str | None:
        run.save_cams(sample.id, cams)
        return SHRUNK if maker.shrinks(cams.size) else None

    return for_each_batch(
        read,
        compute,
        save,
        samples,
        size=batch,
        is_done=lambda sample: run.cams_path(sample.id).exists(),
        workers=workers,
        progress=progress,
        report=report,
    )
