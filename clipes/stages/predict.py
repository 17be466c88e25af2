"""A trained segmenter's masks of any images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from clipes.choices import RefineBackend
from clipes.config import CrfParams
from clipes.datasets.base import IMAGE_SUFFIXES, image_id
from clipes.datasets.pictures import Pictures, find_pictures
from clipes.device import choose_device
from clipes.disk.claim import claim
from clipes.disk.files import sha256_of
from clipes.disk.images import read_origin, write_mask
from clipes.errors import DatasetError, ImageError, UsageError
from clipes.listener import Listener
from clipes.masks.mosaic import TILED, tile_side
from clipes.masks.pseudo import SHRUNK
from clipes.processes import local_rank
from clipes.run.loop import Outcome, Shard, Summary, for_each, say_made_again, waiting
from clipes.run.origin import (
    Picture,
    PredictionOrigin,
    digest,
    read_large,
    read_picture,
    same_picture,
)
from clipes.seg.checkpoint import Checkpoint, load_checkpoint
from clipes.seg.kinds import predictor_for
from clipes.seg.label import label_image, label_tiles, largest_tile_of
from clipes.seg.recipes import LabelPredictor, TestSettings
from clipes.stages.tiles import TILE, large_last
from clipes.stages.token_source import TowerRequest, tokens_of
from clipes.types import Failure, Sample


@dataclass(frozen=True)
class PredictRequest:
    """All that ``clipes predict`` is told.

    Attributes:
        checkpoint: The segmenter's file.
        images: Images, and folders of images.
        out: Folder of the masks.
        scales: Factors of the image's size that are averaged; None as the checkpoint says.
        flip: Whether the mirror image is averaged in; None likewise.
        crf: Whether the dense CRF comes last; None likewise.
        window: Longest side, in pixels, that is taken in at once.
        device: ``auto``, or a torch device.
        towers: Where the towers' weights come from, for segmenters that read tokens.
        tile: Side of the tiles of larger images; None for tiles only beyond ``MAX_PIXELS``.
    """

    checkpoint: Path
    images: Sequence[Path]
    out: Path
    scales: tuple[float, ...] | None = None
    flip: bool | None = None
    crf: bool | None = None
    window: int = TestSettings.window
    device: str = "auto"
    towers: TowerRequest = field(default_factory=TowerRequest)
    tile: int | None = None

    def settings(self, own: TestSettings) -> TestSettings:
        """Return how images are asked, of a checkpoint whose ``own`` way is given."""
        return TestSettings(
            own.scales if self.scales is None else self.scales,
            own.flip if self.flip is None else self.flip,
            own.crf if self.crf is None else self.crf,
            self.window,
        )


@dataclass(frozen=True)
class Found:
    """The images that are to be predicted.

    Attributes:
        samples: The images.
        failures: Those whose names make no id.
        remarks: What was seen and not used, how many, and why.
    """

    samples: tuple[Sample, ...]
    failures: tuple[Failure, ...]
    remarks: tuple[str, ...]


def find_images(paths: Sequence[Path], out: Path) -> Found:
    """Return the images named, and those in and below the folders named, with the ids of ``cam``.

    Args:
        paths: Images, and folders of images.
        out: Where the masks go: a folder below one of ``paths`` that holds none of the images.

    Raises:
        DatasetError: A path is not there, a folder holds no image, or two images share an id.
    """
    images: dict[str, Path] = {}
    failures: list[Failure] = []
    remarks: list[str] = []
    for path in paths:
        if path.is_dir():
            pictures = find_pictures(path, leave_out=out)
            failures += pictures.problems.values()
            remarks += pictures.remarks()
            pairs = _pairs(path, pictures)
        elif path.is_file():
            pairs = [(image_id(path.name), path)]
        else:
            raise DatasetError(f"there is no file or folder {path}", "check the path")
        for id_, image in pairs:
            if images.setdefault(id_, image).resolve() != image.resolve():
                raise DatasetError(
                    f"{images[id_]} and {image} would both become {id_}.png",
                    "rename one, or predict them into different folders",
                )
    samples = tuple(Sample(id_, image, ()) for id_, image in images.items())
    return Found(samples, tuple(failures), tuple(remarks))


def _pairs(path: Path, pictures: Pictures) -> list[tuple[str, Path]]:
    if not pictures.ids:
        seen = "; ".join([f"no image in {path}", *pictures.remarks()])
        raise DatasetError(seen, f"it takes {', '.join(IMAGE_SUFFIXES)}")
    return [(id_, pictures.folder / name) for name, id_ in pictures.ids.items()]


def predict(request: PredictRequest, part: Shard, listener: Listener) -> Outcome:
    """Write the mask ``<id>.png`` of every image that is asked for.

    Masks that this segmenter, asked like this, made of the same pictures stay; those of another, or
    of other pictures, are made again. What no segmenter made is never written over, photos least of
    all.

    Args:
        request: What is asked for.
        part: The images that this process does.
        listener: Who is told how it goes.

    Raises:
        ArtifactError: The checkpoint cannot be used, or another process predicts into the folder.
        DatasetError: As for ``find_images``.
        UsageError: A mask would take the place of a file that is none of a segmenter.
        WriteError: A mask cannot be written; the rest is not tried.
    """
    if request.checkpoint.suffix.lower() in IMAGE_SUFFIXES:
        raise UsageError(
            f"{request.checkpoint} is a picture, not a checkpoint",
            "the checkpoint comes first: clipes predict CHECKPOINT IMAGES --out MASKS",
        )
    saved = load_checkpoint(request.checkpoint)
    found = find_images(request.images, request.out)
    for remark in found.remarks:
        listener.say(remark)
    with claim(request.out, "clipes predict", shared=part.count > 1):
        there = _masks_there(found.samples, request.out)
        summary = _predict_waiting(request, saved, part.of(found.samples), there, listener)
    return Outcome(summary, found.failures)


def _predict_waiting(
    request: PredictRequest,
    saved: Checkpoint,
    mine: Sequence[Sample],
    there: Mapping[str, _Mask],
    listener: Listener,
) -> Summary:
    """Predict those of some samples that have no current mask; errors as for ``predict``."""
    test = request.settings(saved.test)
    model = saved.build().to(choose_device(request.device, local_rank()))
    source = tokens_of(saved.spec, request.towers, request.device, listener)
    predictor = predictor_for(model, test, source)
    crf = saved.spec.crf_of(test)
    asked = [sha256_of(request.checkpoint), asdict(test), *changed_crf(crf)]
    asked += [request.tile] if request.tile else []
    made_with = digest(asked)
    todo = _waiting(mine, there, made_with, listener)
    summary = predict_samples(
        todo,
        predictor,
        request.out,
        crf=crf,
        listener=listener,
        made_with=made_with,
        tile=request.tile,
    )
    before = len(mine) - len(todo)
    return replace(summary, skipped=summary.skipped + before)


@dataclass(frozen=True)
class _Mask:
    """A segmenter's mask that is there.

    Attributes:
        origin: What it says that it was made from.
        written: When it was, in nanoseconds.
    """

    origin: PredictionOrigin
    written: int

    def stale(self, image: Path, made_with: str) -> str:
        """Return why it is not the mask that would be made now; empty if it is.

        Args:
            image: Its picture.
            made_with: As for ``predict_samples``.
        """
        if self.origin.model != made_with:
            return "its mask was made by another segmenter, or by one that was asked otherwise"
        same, _ = same_picture(image, self.origin.image, self.origin.bytes, self.written)
        return "" if same else "its mask was made from another picture of that name"


def _masks_there(samples: Sequence[Sample], out: Path) -> dict[str, _Mask]:
    """Return the masks that are there, by id.

    Raises:
        UsageError: A mask would take the place of what no segmenter made.
    """
    there = {}
    for sample in samples:
        target = out / f"{sample.id}.png"
        if not target.exists():
            continue
        written = target.stat().st_mtime_ns
        if _are_one(target, sample.image):
            what = f"the mask of {sample.image} would take its place"
        elif (origin := PredictionOrigin.of_file(target)) is None:
            what = (
                f"{target} is there and does not say that a segmenter made it (a person's, another "
                "program's or an older clipes')"
            )
        else:
            there[sample.id] = _Mask(origin, written)
            continue
        raise UsageError(what, "choose another --out, or move the file away")
    return there


def _are_one(target: Path, image: Path) -> bool:
    """Tell whether a mask would take the place of its picture."""
    try:
        return target.samefile(image)
    except OSError:  # as a link whose disk is away: whoever reads it says what is wrong
        return False


def _waiting(
    samples: Sequence[Sample], there: Mapping[str, _Mask], made_with: str, listener: Listener
) -> list[Sample]:
    """Return the samples whose masks are to be made; say how many take the place of one, and why.

    Args:
        samples: Those of this process.
        there: The masks that are there, by id.
        made_with: As for ``predict_samples``.
        listener: Who is told.
    """
    again: list[tuple[str, str]] = []

    def is_current(sample: Sample) -> bool:
        if sample.id not in there:
            return False
        if reason := there[sample.id].stale(sample.image, made_with):
            again.append((sample.id, reason))
        return not reason

    todo = waiting(samples, is_current, listener)
    say_made_again(again, listener)
    return todo


def changed_crf(crf: CrfParams | None) -> list[object]:
    """Return what masks have to say of a CRF: its settings, where they are not all kinds' own.

    So masks of segmenters whose CRF is what it ever was stay.
    """
    return [] if crf is None or crf == CrfParams() else [asdict(crf)]


def predict_samples(
    samples: Sequence[Sample],
    predictor: LabelPredictor,
    out: Path,
    *,
    crf: CrfParams | None,
    listener: Listener,
    made_with: str,
    tile: int | None = None,
) -> Summary:
    """Write the mask ``<id>.png`` of every image.

    Args:
        samples: The images.
        predictor: The segmenter.
        out: Folder of the masks.
        crf: Settings of the dense CRF that comes last; None for none.
        listener: Who is told how it goes.
        made_with: Digest of the segmenter and of how it is asked: masks that say that they were
            made with it, of the pictures that there are, stay.
        tile: Side of the tiles of larger images; None for tiles only beyond ``MAX_PIXELS``.

    Raises:
        WriteError: A mask cannot be written; the rest is not tried.
    """

    def there(sample: Sample) -> bool:
        return is_done(out / f"{sample.id}.png", sample.image, made_with)

    def origin(picture: Picture) -> str:
        return PredictionOrigin(picture.sha256, picture.size, made_with).text()

    def work(sample: Sample) -> str | None:
        pixels, picture = read_picture(sample.image)
        made, was_shrunk = label_image(pixels, predictor, crf)
        write_mask(out / f"{sample.id}.png", made.mask, origin=origin(picture))
        return SHRUNK if was_shrunk else None

    def in_tiles(sample: Sample) -> str:
        pixels, picture = read_large(sample.image, out)
        side = tile_side(pixels.size, tile, TILE, largest_tile_of(predictor, crf))
        with listener.progress(f"predict {sample.id}") as progress:
            made = label_tiles(pixels, side, predictor, crf, out, progress)
        made.write_mask(out / f"{sample.id}.png", origin=origin(picture))
        return TILED.format(side)

    def others(samples: Sequence[Sample]) -> Summary:
        with listener.progress("predict") as progress:
            return for_each(
                work,
                samples,
                is_done=there,
                backend=RefineBackend.threading,
                workers=1,  # the network uses all cores itself
                progress=progress,
                report=listener.report,
            )

    return large_last(samples, tile, others, in_tiles, there, listener)


def is_done(path: Path, image: Path, made_with: str) -> bool:
    """Tell whether a mask is there and is the one that would be made now.

    Args:
        path: The mask.
        image: Its picture.
        made_with: As for ``predict_samples``.
    """
    if not path.exists():
        return False
    try:
        origin = PredictionOrigin.parse(read_origin(path))
    except ImageError:
        return False
    if origin is None:  # of an older clipes
        return True
    return not _Mask(origin, path.stat().st_mtime_ns).stale(image, made_with)
