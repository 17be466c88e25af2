"""What run.json says: one frozen dataclass for each stage, written and read as these.

::

    {"schema": 1, "stages": {"cam": {"command", "settings", "facts", "packages"}, "refine": ...}}

Settings are all that changes a stage's output; other ones are refused by name. Facts are worth
knowing, and may change. What an older clipes did not write has the default here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from clipes.choices import CrfBackend, Descriptions, Fusion, Precision
from clipes.config import CrfParams, Preset
from clipes.disk.records import parse_record
from clipes.errors import ArtifactError

_T = TypeVar("_T")

_REMEDY = "make the run again in another folder"


class _Plain:
    """What run.json holds as an object; subclasses are dataclasses."""

    def to_dict(self: Any) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def _without_tile(settings: dict[str, Any]) -> dict[str, Any]:
    # Files remember a digest of their settings, which is to stay what it was.
    return {name: value for name, value in settings.items() if name != "tile" or value is not None}


@dataclass(frozen=True)
class WeightsUsed:
    """The weights of a run.

    Attributes:
        name: As in ``clipes.weights.Weights``.
        sha256: Likewise.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class TextUsed:
    """The class vectors of a run.

    Attributes:
        sha256: Of names and vectors.
        note: What a reader of the results must know about their origin; may be empty.
        fusion: How synonyms became one, of ``Fusion``.
        templates: What the words were put into.
        descriptions: What descriptions did for a class; None without them.
    """

    sha256: str
    note: str = ""
    fusion: str = Fusion.sentence.value
    templates: tuple[str, ...] = ()
    descriptions: Descriptions | None = None


@dataclass(frozen=True)
class CamSettings(_Plain):
    """All that changes maps.

    Attributes:
        dataset: Kind of data set.
        classes: Class names in mask order.
        split: Its list of images: a name that the data set knows, or a file's whole path.
        labels: Path of a label file, ``auto``, or None for the labels of the data set.
        difficult: Whether VOC's difficult objects count.
        preset: What is done to an image.
        precision: Of CLIP's linear layers, of ``Precision``.
        weights: The image tower.
        text: The class vectors.
        towers: sha256 of the weights of each tower beside CLIP, by its name.
        tile: Side of the tiles of larger images; None for tiles only beyond ``MAX_PIXELS``.
    """

    dataset: str
    classes: tuple[str, ...]
    split: str | None = None
    labels: str | None = None
    difficult: bool = True
    preset: Preset | None = None
    precision: str = Precision.fp32.value
    weights: WeightsUsed | None = None
    text: TextUsed | None = None
    towers: Mapping[str, str] = field(default_factory=dict)
    tile: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data; what an older clipes did not know only where it was asked."""
        return _without_tile(asdict(self))


@dataclass(frozen=True)
class CamFacts(_Plain):
    """What is worth knowing of maps.

    Attributes:
        root: Where the data set is.
        device: Where CLIP ran.
        kernels: Which code computed what.
        asked: What was asked of CLIP; see ``clipes.stages.cam``.
        fitted: Number of images that the vector of a class was fitted to; empty if none was.
        tile: Side of the tiles of pictures that cannot be held, at least; 0 if they are shrunk.
        corrected: Number of corrected masks that said what the classes look like.
    """

    root: str = ""
    device: str = ""
    kernels: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, Any] | None = None
    fitted: Mapping[str, int] = field(default_factory=dict)
    tile: int = 0
    corrected: int = 0


@dataclass(frozen=True)
class CamRecord:
    """What run.json says of ``cam``.

    Attributes:
        settings: All that changes maps.
        command: The command line.
        facts: The rest.
        packages: Versions, by name.
    """

    settings: CamSettings
    command: str = ""
    facts: CamFacts = field(default_factory=CamFacts)
    packages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RefineSettings(_Plain):
    """All that changes masks but the maps and the images.

    Attributes:
        crf: Settings of the CRF.
        background_exponent: alpha of the background score.
        backend: Implementation of the CRF, of ``CrfBackend``.
        tile: Side of the tiles of larger images; None for tiles only beyond ``MAX_PIXELS``.
    """

    crf: CrfParams
    background_exponent: float
    backend: str = CrfBackend.numba.value
    tile: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data; what an older clipes did not know only where it was asked."""
        return _without_tile(asdict(self))


@dataclass(frozen=True)
class TrainSettings(_Plain):
    """All that changes a segmenter but the examples themselves.

    Attributes:
        preset: Model and recipe: the fields of a preset of ``SEGMENTER_PRESETS``.
        seed: Of weights, order and views.
        threshold: Confidence that pixels need to count; None: none.
        loss: Of ``Loss``.
        amp: Precision of the network, of ``Amp``.
        masks: Folder of masks that are learnt instead of the run's; ``relabelled`` for the run's of
            that name.
        confidence: Folder of their confidence maps.
        split: List of images that are learnt from, if not the run's.
        examples: Number of images.
        backbone_weights: What the backbone starts from.
        val: List of images that are predicted.
    """

    preset: Mapping[str, Any]
    seed: int
    threshold: float | None
    loss: str
    amp: str
    masks: str | None
    confidence: str | None
    split: str | None
    examples: int
    backbone_weights: str
    val: str | None


@dataclass(frozen=True)
class TrainFacts(_Plain):
    """What is worth knowing of a training.

    Attributes:
        processes: How many trained together.
        device: Where.
        learnt_from: Digest of the files of the examples; empty in runs of an older clipes.
        note: What is worth knowing beside the settings, such as where words come from.
        taught_by: Digest of the examples' labels, where these count; empty where they do not, and
            in runs of an older clipes.
        words: sha256 of the vectors that labels were made with; empty likewise.
        final: sha256 of the finished segmenter's file; empty before, and likewise.
    """

    processes: int = 1
    device: str = ""
    learnt_from: str = ""
    note: str = ""
    taught_by: str = ""
    words: str = ""
    final: str = ""


@dataclass(frozen=True)
class TrainRecord:
    """What run.json says of ``train-seg``, as far as later commands ask.

    Attributes:
        settings: All that changes the segmenter.
        facts: The rest.
    """

    settings: TrainSettings
    facts: TrainFacts = field(default_factory=TrainFacts)


@dataclass(frozen=True)
class RelabelSettings(_Plain):
    """All that changes what a segmenter's masks of a run's images are but images and labels.

    Attributes:
        checkpoint: sha256 of the segmenter's file.
        scales: Factors of the image's size that are averaged.
        flip: Whether the mirror image is averaged in.
        window: Longest side, in pixels, that is taken in at once.
        crf: Settings of the dense CRF; None for none.
        share: The segmenter's share in the maps that masks are made of; the rest is the run's. An
            older clipes knew the segmenter alone.
    """

    checkpoint: str
    scales: tuple[float, ...]
    flip: bool
    window: int
    crf: CrfParams | None
    share: float = 1.0


@dataclass(frozen=True)
class RefineRecord:
    """What run.json says of ``refine``, as far as later commands ask.

    Attributes:
        settings: All that changes masks but the maps and the images.
    """

    settings: RefineSettings


@dataclass(frozen=True)
class RelabelRecord:
    """What run.json says of ``relabel``, as far as later commands ask.

    Attributes:
        settings: All that changes the masks.
    """

    settings: RelabelSettings


def parse_section(section: Mapping[str, Any], kind: type[_T], source: str) -> _T:
    """Return what run.json says of a stage.

    Args:
        section: Plain data.
        kind: ``CamRecord`` or another.
        source: What the error begins with.

    Raises:
        ArtifactError: It does not say how the output was made, or says more than is known here.
    """
    record = parse_record(section, kind, source, _REMEDY)
    written = section.get("settings")
    if not isinstance(record, CamRecord) or not isinstance(written, Mapping):
        return record
    if unknown := _unknown(written.get("preset"), record.settings.to_dict()["preset"]):
        raise ArtifactError(f"{source}: its preset has an unknown '{unknown}'", _REMEDY)
    return record


def _unknown(written: object, known: object) -> str:
    """Return the name of a setting that was written and is not known; empty if all are.

    A newer clipes may have settings that cannot be passed over.
    """
    if isinstance(written, Mapping) and isinstance(known, Mapping):
        for name, value in written.items():
            if name not in known:
                return str(name)
            if unknown := _unknown(value, known[name]):
                return unknown
    return ""
