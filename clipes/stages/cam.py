"""Stage 1: a data set to the activation maps of its images.

What can be told without CLIP is told first: a run with nothing left to do is over in a second, and
torch, which takes seconds to import, is imported only for work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clipes.choices import Descriptions, Fusion
from clipes.config import AUTO_LABELS, SMALLEST_TILE, Preset, TagParams
from clipes.datasets import Dataset
from clipes.datasets.base import recorded_split
from clipes.errors import UsageError, WriteError
from clipes.listener import Listener
from clipes.run.corrected import Chosen
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.loop import Outcome, Shard, Summary
from clipes.run.origin import digest
from clipes.run.record import CamSettings
from clipes.run.reopen import orphans
from clipes.stages.drawn_masks import DrawnMasks
from clipes.stages.looks_sources import looks_are_current
from clipes.stages.open_data import open_labelled, open_unlabelled
from clipes.stages.tag_file import open_tagged, untagged
from clipes.stages.words_sources import words_are_current
from clipes.types import Sample
from clipes.words.templates import BEST
from clipes.words.vocabulary import Vocabulary, check_levels

STAGE = "cam"


@dataclass(frozen=True)
class DataRequest:
    """The images that are asked for, and where their labels come from.

    Attributes:
        dataset: One of ``clipes.datasets.DATASETS``.
        root: As for ``open_dataset``.
        split: As for ``open_dataset``.
        labels: Label file; ``auto`` for zero-shot tags; None for those of the data set.
        prompts: Vocabulary; None for that of the kind of data set.
        difficult: As for ``open_dataset``.
        tags: Settings of zero-shot tags.
    """

    dataset: str
    root: Path | None = None
    split: str | None = None
    labels: Path | None = None
    prompts: str | None = None
    difficult: bool = True
    tags: TagParams = field(default_factory=TagParams)

    @property
    def automatic(self) -> bool:
        """Whether the labels are zero-shot tags."""
        return str(self.labels) == AUTO_LABELS

    def open(self) -> tuple[Vocabulary, Dataset]:
        """Return the words and the images, without labels where they are to be tags."""
        source: dict[str, Any] = {"root": self.root, "split": self.split, "prompts": self.prompts}
        source["difficult"] = self.difficult
        if self.automatic:
            return open_unlabelled(self.dataset, **source)
        return open_labelled(self.dataset, labels=self.labels, **source)


@dataclass(frozen=True)
class ClipRequest:
    """What is to look at the images; see ``clipes.stages.setup.load_clip``.

    Attributes:
        weights: ``--weights``.
        model: ``--model``.
        text_features: A user's vectors, or None.
        fusion: Where synonyms become one.
        template: What takes the place of the vocabulary's template.
        rankings: Run folders in which a ranking may tell the best template.
        device: ``auto`` or a torch device.
        precision: Of the linear layers: fp32, bf16, fp16 or auto.
        dino: Where the weights of DINOv2 come from, for presets that look with it.
        fit: Whether classes that no vector knows get one from the run's own images and labels.
        descriptions: What the vocabulary's descriptions do; None to pass over them.

    Raises:
        UsageError: Descriptions cannot be joined to that fusion.
    """

    weights: str = "auto"
    model: str = "ViT-B-16"
    text_features: Path | None = None
    fusion: Fusion = Fusion.sentence
    template: str | None = None
    rankings: tuple[Path, ...] = ()
    device: str = "auto"
    precision: str = "fp32"
    dino: str = "auto"
    fit: bool = True
    descriptions: Descriptions | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense before anything is loaded."""
        check_levels(self.fusion, self.descriptions)


@dataclass(frozen=True)
class Resources:
    """What the work is shared among.

    Attributes:
        part: The images that this process does.
        workers: Batches at once; None for what suits the device.
        batch: Images given to CLIP together; None likewise.
    """

    part: Shard = field(default_factory=Shard)
    workers: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class CamRequest:
    """All that ``clipes cam`` is told.

    Attributes:
        data: The images.
        clip: What looks at them.
        preset: Settings.
        keep_looks: Keep what the classes look like, and their vectors if they were fitted, although
            labels or pictures changed.
        command: The command line, for the record.
        tile: Side of the tiles of larger images; None for tiles only beyond ``MAX_PIXELS``.
        use_corrected: Whether masks that a person corrected say what the classes look like, in
            place of the maps of their images.

    Raises:
        UsageError: Tiles are asked for, and are too small, or the preset cannot see in tiles.
    """

    data: DataRequest
    clip: ClipRequest
    preset: Preset
    keep_looks: bool = False
    command: str = ""
    tile: int | None = None
    use_corrected: bool = True

    def __post_init__(self) -> None:
        """Refuse tiles that show nothing, and any where they cannot be compared."""
        if self.tile is not None and self.tile < SMALLEST_TILE:
            raise UsageError(
                f"tiles of {self.tile} pixels are too small", f"take {SMALLEST_TILE} or more"
            )
        if self.tile is not None and self.preset.cam.patches is None:
            raise UsageError(
                f"the preset {self.preset.name} cannot see in tiles: its gradients vanish where a "
                "class is certain, so that tiles do not compare",
                "take another preset",
            )


def cam(request: CamRequest, run: Run, resources: Resources, listener: Listener) -> Outcome:
    """Make the maps of all images of a data set that have none, or whose maps are out of date.

    Args:
        request: What is asked for.
        run: The run folder.
        resources: What the work is shared among.
        listener: Who is told how it goes.

    Raises:
        RunConflictError: The run was made with other settings.
        ClipesError: Data set, weights, words or run folder cannot be used.
    """
    vocabulary, data = request.data.open()
    return cam_of(request, vocabulary, data, run, resources, listener)


def cam_of(
    request: CamRequest,
    vocabulary: Vocabulary,
    data: Dataset,
    run: Run,
    resources: Resources,
    listener: Listener,
) -> Outcome:
    """As ``cam``, with the words and the images that ``request.data.open`` returned."""
    for remark in data.remarks:
        listener.say(remark)
    labelled, part = _labelled(request, data, run), resources.part
    if labelled and (done := _nothing_to_do(request, vocabulary, labelled, run, part, listener)):
        say_orphans(run, labelled, listener)
        return Outcome(done, labelled.failures)
    # Not at the top: they bring torch.
    from clipes.stages.with_clip import make_maps

    return make_maps(request, vocabulary, data, run, resources, listener)


def known_settings(request: CamRequest, data: Dataset) -> CamSettings:
    """Return the settings of a run, less what only CLIP's weights and words tell."""
    labels: str | None = None
    if request.data.labels is not None:
        # Later commands may be given elsewhere.
        path = request.data.labels.absolute()
        labels = AUTO_LABELS if request.data.automatic else str(path)
    return CamSettings(
        data.name,
        data.classes,
        split=recorded_split(data.root, request.data.split),
        labels=labels,
        difficult=request.data.difficult,
        preset=request.preset,
        precision=request.clip.precision,
        tile=request.tile,
    )


def asked_of_clip(
    request: CamRequest, vocabulary: Vocabulary, files: Sequence[Path]
) -> dict[str, Any] | None:
    """Return what was asked of CLIP, and the files that answered, as plain data.

    As long as it is the same, so are weights and vectors. None where that cannot be told.

    Args:
        request: What is asked for.
        vocabulary: The words.
        files: The files that it depends on.
    """
    clip, words = request.clip, asdict(vocabulary)
    if clip.template == BEST:
        return None
    sentences, described = words.pop("descriptions"), {}
    if clip.descriptions is not None:
        described = {"descriptions": clip.descriptions.value, "sentences": digest(sentences)}
    return {
        "weights": _placed(clip.weights),
        "model": clip.model,
        "words": digest(words),
        "text_features": str(clip.text_features.absolute()) if clip.text_features else None,
        "fusion": clip.fusion.value,
        "template": None if clip.template is None else _placed(clip.template),
        "dino": _placed(clip.dino),
        **described,
        **({} if clip.fit else {"fit": False}),
        "files": {str(path): _state(path) for path in files},
    }


def _placed(asked: str) -> str:
    """Return a file's absolute path, for the same words mean another file elsewhere."""
    return str(Path(asked).absolute()) if "{" not in asked and Path(asked).is_file() else asked


def files_of(request: CamRequest, weights: Path) -> list[Path]:
    """Return the files that decide what CLIP is and what it is told."""
    template = request.clip.template
    paths = [weights, request.clip.text_features]
    paths.append(Path(template) if template and "{" not in template else None)
    paths.append(Path(request.clip.dino) if Path(request.clip.dino).is_file() else None)
    return [path.absolute() for path in paths if path is not None]


def say_stale(
    samples: Sequence[Sample], current: Freshness, listener: Listener
) -> tuple[Sample, ...]:
    """Return the samples whose maps are to be made, and say why, of those that have some."""
    todo, reasons = [], []
    with listener.progress("look") as progress:
        for index, sample in enumerate(samples):
            if not current.has_maps(sample):
                todo.append(sample)
                if reason := current.maps(sample):
                    reasons.append(f"{sample.id}: {reason}")
            progress(index + 1, len(samples))
    if reasons:
        more = f", and {len(reasons) - 1} more" if reasons[1:] else ""
        listener.say(f"made again: {reasons[0]}{more}")
    return tuple(todo)


def _labelled(request: CamRequest, data: Dataset, run: Run) -> Dataset | None:
    """Return the images with their labels; None if some have no tags yet."""
    if not request.data.automatic:
        return data
    if untagged(data.samples, run.tags_path):
        return None
    return open_tagged(data, run, request.data.split)


def _nothing_to_do(
    request: CamRequest,
    vocabulary: Vocabulary,
    data: Dataset,
    run: Run,
    part: Shard,
    listener: Listener,
) -> Summary | None:
    """Return the summary of a run that is done, as far as that can be told without CLIP."""
    if not run.exists() or STAGE not in run.manifest()["stages"]:
        return None
    record = run.cam_record()
    if not _same_clip(request, vocabulary, record.facts.asked):
        return None
    told = record.settings  # what CLIP's weights and words tell is the same
    wanted = replace(
        known_settings(request, data), weights=told.weights, text=told.text, towers=told.towers
    )
    run.check_settings(STAGE, wanted.to_dict())
    if request.data.automatic:
        tagged = run.stage("tag").get("settings") or {}
        run.check_settings("tag", {**tagged, "tags": asdict(request.data.tags)})
    patches, current = request.preset.cam.patches, Freshness.of(run, data.classes)
    if patches is not None and patches.learns and not request.keep_looks:
        drawn = DrawnMasks(Chosen(run, current, request.use_corrected), len(data.classes))
        if not looks_are_current(run, data.samples, drawn):
            return None
    if record.facts.fitted and not words_are_current(run, data, keep=request.keep_looks):
        return None
    mine = part.of(data.samples)
    with listener.progress("look") as progress:
        for index, sample in enumerate(mine):
            if not current.has_maps(sample):
                return None
            progress(index + 1, len(mine))
    _note_place(run, data, listener)
    run.touch()
    return Summary(0, len(mine), ())


def _same_clip(request: CamRequest, vocabulary: Vocabulary, before: object) -> bool:
    if not isinstance(before, Mapping) or not isinstance(before.get("files"), Mapping):
        return False
    try:
        return before == asked_of_clip(request, vocabulary, [Path(f) for f in before["files"]])
    except OSError:
        return False


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _note_place(run: Run, data: Dataset, listener: Listener) -> None:
    """Let the record say where the data set is now, if it can be written."""
    try:
        run.note_fact(STAGE, "root", str(data.root.absolute()))
    except WriteError as error:
        listener.say(f"the run still says that its data are elsewhere: {error}")


def say_orphans(run: Run, data: Dataset, listener: Listener) -> None:
    """Say which maps belong to no image any more."""
    if remark := orphans(run, data, "cams"):
        listener.say(remark)
