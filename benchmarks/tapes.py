"""What the ablation works with: images encoded once, and many ways to make maps of them.

Maps come from the product's ``CamMaker``. A ``Row`` is the settings of a preset, changed; rows
that need the same of a pass share it; ``score_row`` counts what a row's maps are worth on two
halves of every data set.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from clipes.config import CamParams, CrfParams, PatchParams
from clipes.disk.images import read_image, read_mask
from clipes.maps.looks import Looks
from clipes.maps.maker import CamMaker, EncodedImage
from clipes.maps.neighbours import Neighbours, Regions
from clipes.masks.pseudo import cam_mask, pseudo_label
from clipes.masks.scores import ConfusionMatrix
from clipes.types import CamMaps, Sample, UInt8Array, evenly_spaced

FOLDS = 16
"""Parts of the data whose looks are learnt from the other parts."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Its name.
        cam: Settings of the maps; ``patches`` None for the published method.
        crf: Settings of the CRF.
        exponent: alpha of the background.
        held_out: Whether looks are learnt from the other ``FOLDS - 1`` parts of the images only.
        own: Whether an image that did not say what its classes look like has its own say, too.
        main: Whether it is worth the time of a CRF.
    """

    name: str
    cam: CamParams
    crf: CrfParams
    exponent: float = 1.0
    held_out: bool = False
    own: bool = True
    main: bool = False

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the towers beside CLIP that it looks with."""
        return () if self.cam.patches is None else self.cam.patches.towers

    @property
    def of_a_pass(self) -> tuple[object, ...]:
        """What it needs of a pass over an image; rows that agree in it share one."""
        cam = self.cam
        settings = [cam.affinity_blocks, cam.fp16_positions, cam.max_patches]
        if (patches := cam.patches) is not None:
            settings += [
                patches.temperature,
                patches.finer,
                patches.finer_block,
                patches.finer_parts,
            ]
        return (*settings, *self.others)


@dataclass(frozen=True)
class Photo:
    """An image of the run: the data set that it is from, half 0 or 1 of it, and its sample."""

    data: str
    half: int
    sample: Sample


@dataclass(frozen=True)
class Tape:
    """An image encoded: what a pass left behind, and the processor's seconds that it took."""

    photo: Photo
    encoded: EncodedImage
    seconds: float


def tape_all(maker: CamMaker, photos: Iterable[Photo]) -> Iterator[Tape]:
    """Encode all images, one by one."""
    for photo in photos:
        image = read_image(photo.sample.image)
        start = time.thread_time()
        (encoded,) = maker.encode([maker.prepare(image, photo.sample.labels)])
        yield Tape(photo, encoded, time.thread_time() - start)


def row_maps(row: Row, maker: CamMaker, images: Sequence[EncodedImage]) -> Iterator[CamMaps]:
    """Make the maps of a row, image by image."""
    patches = row.cam.patches
    if patches is None or not patches.learns:
        yield from map(maker.maps, images)
        return
    members = evenly_spaced(len(images), patches.statistics_images)
    folds = min(FOLDS, len(images)) if row.held_out else 1
    makers = []
    for fold in range(folds):
        chosen = [k for k in members if not (row.held_out and k % folds == fold)]
        makers.append(learnt(maker, patches, [images[k] for k in chosen]))
    asked = frozenset(() if row.held_out else members)
    for k, image in enumerate(images):
        yield makers[k % folds].maps(image, in_statistics=k in asked or not row.own)


def learnt(
    maker: CamMaker,
    patches: PatchParams,
    images: Sequence[EncodedImage],
    drawn: Mapping[int, UInt8Array] | None = None,
) -> CamMaker:
    """Return a maker that knows what the classes look like.

    Args:
        maker: Knows nothing yet.
        patches: Its settings.
        images: Those that say it.
        drawn: (H0, W0) masks that are believed instead of maps, by the place of their image.
    """
    neighbours = None
    for number, this in enumerate(patches.rounds):
        total, regions = maker.no_statistics(number), []
        for k, image in enumerate(images):
            lesson = maker.lesson(image, str(k), neighbours, (drawn or {}).get(k))
            total.add(lesson.statistics)
            regions += [] if lesson.regions is None else [lesson.regions]
        maker = maker.with_looks(Looks.of(total, patches))
        neighbours = None
        if this.neighbours:
            asked = [regions[k] for k in evenly_spaced(len(regions), this.neighbours.images)]
            neighbours = Neighbours(Regions.joined(asked), maker.device, this.neighbours)
    return maker


def tape_mask(tape: Tape, cams: CamMaps, row: Row) -> UInt8Array:
    """Return the mask of an image after the CRF of a row."""
    image = read_image(tape.photo.sample.image)
    return pseudo_label(image, cams, row.crf, background_exponent=row.exponent).mask


@dataclass(frozen=True)
class Score:
    """mIoU in percent of the images 0, 2, 4, ... (half A), 1, 3, 5, ... (half B), and all.

    Attributes:
        half_a: See above.
        half_b: See above; as ``half_a`` if there is one image only.
        full: See above.
        seconds: Processor time per image of the run.
    """

    half_a: float
    half_b: float
    full: float
    seconds: float


def score_row(
    row: Row, maker: CamMaker, tapes: Sequence[Tape], n_labels: int, *, crf: bool
) -> dict[str, tuple[Score, Score | None]]:
    """Score the maps of a row, and their masks after the CRF if ``crf``, for each data set."""
    places = {(tape.photo.data, half) for tape in tapes for half in (0, 1)}
    before, after = ({place: ConfusionMatrix(n_labels) for place in places} for _ in range(2))
    making, refining = sum(tape.seconds for tape in tapes), 0.0
    maps = row_maps(row, maker, [tape.encoded for tape in tapes])
    for tape in tapes:
        sample, place = tape.photo.sample, (tape.photo.data, tape.photo.half)
        assert sample.mask is not None
        truth = read_mask(sample.mask)
        start = time.thread_time()
        cams = next(maps)
        making += time.thread_time() - start
        before[place].update(truth, cam_mask(cams, row.exponent))
        if crf:
            image = read_image(sample.image)
            start = time.thread_time()
            pseudo = pseudo_label(image, cams, row.crf, background_exponent=row.exponent)
            refining += time.thread_time() - start
            after[place].update(truth, pseudo.mask)

    def score(counts: Mapping[tuple[str, int], ConfusionMatrix], name: str, took: float) -> Score:
        first, second = counts[name, 0], counts[name, 1]
        parts = first, second if second.images else first, first + second
        return Score(*(100 * part.scores().miou for part in parts), took / len(tapes))

    return {
        name: (score(before, name, making), score(after, name, refining) if crf else None)
        for name in dict.fromkeys(tape.photo.data for tape in tapes)
    }
