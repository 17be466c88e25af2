"""What ``train-seg`` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from clipes.choices import SegmenterPresetName
from clipes.config import (
    OUTPUT_STRIDES,
    TOKEN_SPACE,
    TRAIN_SCALES,
    AnySegmenterPreset,
    FrozenPreset,
    choose_segmenter_preset,
)
from clipes.errors import UsageError
from clipes.run.folder import Run
from clipes.seg.loss import Guidance
from clipes.seg.train import TrainOptions
from clipes.stages.token_source import TowerRequest

_FIELDS = {"multi_scale": "train_scales"}
"""What a change is called in presets, where that is something else."""


@dataclass(frozen=True)
class Sources:
    """What a training learns from.

    Attributes:
        run: The run folder with the pseudo-masks.
        out: Folder for checkpoints and predictions; the run folder itself, or another one.
        root: Where the data set is, if not where run.json says.
        split: Name or path of the list of images to learn from, if not the run's.
        masks: Folder of masks ``<id>.png`` to learn instead of the run's.
        confidence: Folder of confidence maps that goes with ``masks``.
        relabelled: Whether a segmenter's masks of the run, and their confidence, take their place.
        val: Name or path of the list of images to predict at the end; None looks for ``val``.
        backbone_weights: ``auto``, ``none`` or a file.
        use_corrected: Whether masks that a person corrected go before the run's, sure everywhere.
    """

    run: Run
    out: Run
    root: Path | None = None
    split: str | None = None
    masks: Path | None = None
    confidence: Path | None = None
    relabelled: bool = False
    val: str | None = None
    backbone_weights: str = "auto"
    use_corrected: bool = True

    def __post_init__(self) -> None:
        """Refuse two sets of masks."""
        if self.relabelled and self.masks is not None:
            raise UsageError(f"two sets of masks, --relabelled and {self.masks}", "give one")

    @property
    def own(self) -> Run:
        """The folder with ``pseudo/`` and ``confidence/`` that is learnt where none is named."""
        return self.run.relabelled if self.relabelled else self.run


@dataclass(frozen=True)
class Changes:
    """What of a preset is asked for otherwise, by its names there; None keeps the preset's.

    Attributes:
        multi_scale: Whether the training scales are DeepLab-v2's, or the image's own alone.
    """

    arch: str | None = None
    backbone: str | None = None
    output_stride: int | None = None
    iterations: int | None = None
    batch: int | None = None
    accumulate: int | None = None
    crop: int | None = None
    lr: float | None = None
    freeze_norms: bool | None = None
    crf: bool | None = None
    test_scales: tuple[float, ...] | None = None
    flip: bool | None = None
    multi_scale: bool | None = None
    even_classes: bool | None = None

    def foreign_to(self, preset: AnySegmenterPreset) -> list[str]:
        """Return the names of what is asked for and a preset knows nothing of."""
        known = {one.name for one in fields(preset)}
        given = [name for name, value in vars(self).items() if value is not None]
        return [name for name in given if _FIELDS.get(name, name) not in known]

    def of(self, preset: AnySegmenterPreset) -> AnySegmenterPreset:
        """Return a preset with what is asked for.

        Raises:
            UsageError: It makes no sense, or the preset knows nothing of the kind.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        if given.get("output_stride", OUTPUT_STRIDES[0]) not in OUTPUT_STRIDES:
            raise UsageError(f"an output stride of {given['output_stride']}", "choose 8, 16 or 32")
        if foreign := self.foreign_to(preset):
            raise UsageError(
                f"--{foreign[0].replace('_', '-')} means nothing to preset {preset.name}",
                "leave it out, or choose another --preset",
            )
        several = given.pop("multi_scale", None)
        if several is not None:
            given["train_scales"] = TRAIN_SCALES if several else TRAIN_SCALES[:1]
        return replace(preset, **given)


@dataclass(frozen=True)
class TrainRequest:
    """All that ``clipes train-seg`` is told.

    Attributes:
        sources: What it learns from, and where its output goes.
        preset: Of ``clipes.choices.SegmenterPresetName``.
        changes: What of the preset is asked for otherwise.
        guidance: How confidence counts.
        options: Seed, precision and so on.
        towers: Where the towers' weights come from, for presets that read tokens.
        token_space: Most bytes that kept tokens take.
        device: ``auto``, or a torch device.
        resume: Go on from the latest checkpoint, if there is one; else start over.
        command: The command line, for run.json.
    """

    sources: Sources
    preset: str = "auto"
    changes: Changes = field(default_factory=Changes)
    guidance: Guidance = field(default_factory=Guidance)
    options: TrainOptions = field(default_factory=TrainOptions)
    towers: TowerRequest = field(default_factory=TowerRequest)
    token_space: int = TOKEN_SPACE
    device: str = "auto"
    resume: bool = True
    command: str = ""

    def recipe_preset(self, *, gpu: bool) -> AnySegmenterPreset:
        """Return the preset that is asked for.

        Args:
            gpu: Whether there is a GPU.

        Raises:
            UsageError: There is none, or its changes make no sense.
        """
        dataset, name = self.sources.run.cam_record().settings.dataset, self.preset
        preset = choose_segmenter_preset(name, dataset, gpu=gpu)
        if name == SegmenterPresetName.auto and isinstance(preset, FrozenPreset):
            deeplab = self.changes.foreign_to(preset) or self.sources.backbone_weights != "auto"
            if deeplab:  # what is asked for tells which network is meant
                preset = choose_segmenter_preset(SegmenterPresetName.small, dataset, gpu=gpu)
        return self.changes.of(preset)
