"""What trainer, checkpoints and prediction ask of a kind of segmenter, and all they know of it.

A kind is a ``Spec`` (what a checkpoint says, so that the model can be built again), a ``Recipe``
(how the model is trained) and a ``LabelPredictor`` (how it is asked); ``clipes.seg.kinds`` lists
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clipes.config import AnySegmenterPreset, CrfParams
from clipes.errors import ArtifactError, UsageError
from clipes.masks.values import value_count, value_of
from clipes.types import Float32Array, Progress, UInt8Array

if TYPE_CHECKING:
    from clipes.seg.data import TrainingPair

Batch: TypeAlias = tuple[Tensor, ...]
"""Examples side by side, in whatever tensors a recipe feeds its model with."""

_NEVER = -1e4  # a logit of no probability; finite, so that it can be interpolated


@dataclass(frozen=True)
class TestSettings:
    """How an image is asked.

    Attributes:
        scales: Factors of the image's size whose probabilities are averaged.
        flip: Whether the mirrored image is averaged in.
        crf: Whether the dense CRF comes last.
        window: Longest side, in pixels, that the network sees at once.
    """

    __test__ = False  # not a test, whatever its name makes pytest believe

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    crf: bool = False
    window: int = 1024


class LabelPredictor(Protocol):
    """Turns images into probabilities of labels."""

    @property
    def labels(self) -> int:
        """Number of labels, background included."""

    def __call__(self, image: UInt8Array, present: Sequence[int] | None = None) -> Float32Array:
        """Return (1 + C, H, W) float32 that sum to 1, background first.

        Args:
            image: (H, W, 3) RGB uint8.
            present: The 0-based classes that it holds, the others get 0; None if that is not known.
        """


class Spec(ABC):
    """What has to be known to build a model for its weights; subclasses are frozen dataclasses.

    Attributes:
        kind: Names the kind in checkpoints.
        crf: Settings of the dense CRF that suits its answers.
        classes: Class names in mask order, without the background.
    """

    kind: ClassVar[str]
    crf: ClassVar[CrfParams] = CrfParams()
    classes: tuple[str, ...]

    @property
    @abstractmethod
    def name(self) -> str:
        """The model's name, in a few words."""

    @abstractmethod
    def build(self) -> Model:
        """Return the model with random weights, on the CPU."""

    @abstractmethod
    def problem(self) -> str:
        """Return why no such model can be built; empty if one can."""

    def towers(self) -> Mapping[str, str]:
        """Return the sha256 of the frozen towers' weights that the model goes with, by name."""
        return {}

    @classmethod
    def crf_of(cls, test: TestSettings) -> CrfParams | None:
        """Return settings of the dense CRF that comes last, or None if none is to."""
        return cls.crf if test.crf else None

    def to_dict(self: Any) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {**asdict(self), "classes": list(self.classes)}


class Model(nn.Module):
    """A segmenter.

    Attributes:
        spec: What it was built from.
    """

    spec: Spec


class Examples(ABC):
    """An endless random sequence of examples: position p always gives the same one.

    Attributes:
        ahead: Whether threads may load before they are asked; not where towers are, on the
            processor or GPU that learns.
    """

    ahead: ClassVar[bool] = True

    @abstractmethod
    def __getitem__(self, position: int) -> Batch:
        """Return an example; several threads may ask at once.

        Raises:
            ClipesError: It cannot be read.
        """

    def collate(self, examples: Sequence[Batch]) -> Batch:
        """Return examples as a batch: here stacked, so they have to be of one size."""
        return tuple(torch.stack(column) for column in zip(*examples, strict=True))


@dataclass(frozen=True)
class Schedule:
    """How much is learnt.

    Attributes:
        iterations: Updates.
        batch: Images per update, over all processes and accumulated parts.
        accumulate: Parts that an update's images are put through in, one after the other.
        average: Share that the mean of all earlier weights keeps at each update; that mean is
            the trained model. 0 for the weights as the last update left them.
    """

    iterations: int
    batch: int
    accumulate: int
    average: float = 0.0


@dataclass(frozen=True)
class Part:
    """A batch on its way through the network.

    Attributes:
        inputs: What the network is called with.
        weights: (T,) what each term of the loss weighs: the sum of the weights of its pixels.
        labelled: () number of pixels with a label.
        used: () of those, the ones that count in the loss.
    """

    inputs: tuple[Tensor, ...]
    weights: Tensor
    labelled: Tensor
    used: Tensor


_FIRST_RATE = 1e-6  # share of the rate that the first update gets

M = TypeVar("M", bound=Model)
P = TypeVar("P", bound=Part)


class ModelPredictor(Generic[M]):
    """What the predictors of all kinds begin with; see ``LabelPredictor``.

    Args:
        model: Put into evaluation mode.
        settings: How an image is asked.
    """

    def __init__(self, model: M, settings: TestSettings) -> None:
        self._model = model.eval()
        self._settings = settings
        self._device = next(model.parameters()).device

    @property
    def labels(self) -> int:
        """Number of labels, background included."""
        return value_count(len(self._model.spec.classes))

    def _allowed(self, logits: Tensor, present: Sequence[int] | None) -> Tensor:
        """Return logits (B, 1 + C, ...) that leave no probability to classes known to be absent."""
        if present is None:
            return logits
        absent = torch.ones(self.labels, dtype=torch.bool, device=logits.device)
        absent[[0, *map(value_of, present)]] = False
        return logits.masked_fill(absent.unflatten(0, (-1, *[1] * (logits.ndim - 2))), _NEVER)


def other_tower(what: str, tower: str, learnt: str, found: str) -> ArtifactError:
    """Return the error of a model that was trained on other weights of a tower.

    Args:
        what: The model.
        tower: Its name.
        learnt: sha256 of the tower's weights in training; empty for none.
        found: sha256 of those that are here; likewise.
    """
    return ArtifactError(
        f"{what} was trained on a tower {tower} of sha256 {learnt[:12] or 'none'}, not "
        f"{found[:12] or 'none'}",
        "give the weights that it was trained on",
    )


def refuse_weights(source: str, preset: str, stays: str) -> None:
    """Refuse weights to start from where a decoder on frozen towers has none but random ones.

    Args:
        source: As for ``Recipe.initialise``.
        preset: Name of the preset, for the message.
        stays: What is not trained, for the message.

    Raises:
        UsageError: There are to be others.
    """
    if source not in ("auto", "none"):
        raise UsageError(
            f"--backbone-weights {source} means nothing to preset {preset}",
            f"leave it out: {stays}",
        )


def say_short(warmup: int, iterations: int, say: Callable[[str], None]) -> None:
    """Say so if a training ends before its learning rate has risen."""
    if warmup >= iterations:
        say(f"the rate rises for {warmup} updates: this training ends before")


def warm_up(iteration: int, warmup: int) -> float:
    """Return the share of the learning rate that an update of the linear rise gets.

    Args:
        iteration: Updates made, fewer than ``warmup``.
        warmup: Updates over which the rate rises.
    """
    return 1 - (1 - iteration / warmup) * (1 - _FIRST_RATE)


class Recipe(ABC, Generic[M, P]):
    """How a kind of model is trained. Recipes are values: what changes is in model and trainer.

    Attributes:
        made: The kind of spec that it has, known before any tower is loaded.
        reads_masks: Whether it learns from masks; else it makes its labels itself.
        preset: Its numbers.
    """

    made: ClassVar[type[Spec]]
    reads_masks: ClassVar[bool] = True
    preset: AnySegmenterPreset

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """What the model is built from."""

    @property
    def reads_labels(self) -> bool:
        """Whether the labels of an image change what is learnt; here only where masks do not."""
        return not self.reads_masks

    @property
    def note(self) -> str:
        """What is worth knowing beside preset and options; here nothing."""
        return ""

    @property
    def schedule(self) -> Schedule:
        """How much is learnt."""
        return Schedule(self.preset.iterations, self.preset.batch, self.preset.accumulate)

    @property
    def test(self) -> TestSettings:
        """How the model is to be asked."""
        return TestSettings(self.preset.test_scales, self.preset.flip, self.preset.crf)

    def check_part(self, images: int) -> None:
        """Refuse to put ``images`` through at a time; here any number will do.

        Raises:
            UsageError: The model cannot learn from so few.
        """

    @abstractmethod
    def initialise(self, model: M, source: str, say: Callable[[str], None]) -> Recipe[M, P]:
        """Give a new model the weights that training starts from.

        Args:
            model: The model, with random weights.
            source: ``auto``, ``none`` or a file.
            say: Told where the weights come from.

        Returns:
            The recipe that suits these weights.

        Raises:
            WeightsError: The file cannot be used for this model.
        """

    def start(self, model: M, pairs: Sequence[TrainingPair], progress: Progress) -> Recipe[M, P]:
        """Give a new model what examples say before any training; here nothing.

        Args:
            model: The model, as ``initialise`` left it.
            pairs: The examples.
            progress: Called after each of them, where they are looked at.

        Returns:
            The recipe that suits these examples.

        Raises:
            ClipesError: An example cannot be read.
        """
        return self

    def state(self) -> Mapping[str, Any]:
        """Return what ``initialise`` and ``start`` decided, as plain data, for checkpoints."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> Recipe[M, P]:
        """Return the recipe whose ``state`` a checkpoint holds."""
        return self

    def network(self, model: M) -> nn.Module:
        """Return what is trained: the model in training mode, or a wrapper, called with a part."""
        return model.train()

    @abstractmethod
    def optimizer(self, model: M) -> Optimizer:
        """Return what updates the model; each group's ``factor`` is its share of ``rate``."""

    @abstractmethod
    def rate(self, iteration: int) -> float:
        """Return the learning rate after ``iteration`` updates."""

    @abstractmethod
    def examples(self, pairs: Sequence[TrainingPair], seed: int) -> Examples:
        """Return what is learnt from, in the random order that ``seed`` chooses."""

    @abstractmethod
    def part(self, batch: Batch) -> P:
        """Return a batch with all that its loss needs, on the batch's device."""

    @abstractmethod
    def losses(self, outputs: Sequence[Tensor], part: P) -> list[Tensor]:
        """Return the T terms of the loss, each as a sum over pixels of weight times cost.

        Sums, because what they are to be divided by, the weight of the whole batch, may be spread
        over processes and parts.

        Args:
            outputs: What the network returned.
            part: What it was called with.
        """

    @abstractmethod
    def answers(self, outputs: Sequence[Tensor], part: P) -> list[tuple[Tensor, Tensor]]:
        """Return what was learnt and what was answered of each image of a part.

        Args:
            outputs: What the network returned.
            part: What it was called with.

        Returns:
            Labels, with ``IGNORE`` where there was none, and answers: (H, W) int64 each.
        """

    @abstractmethod
    def picture(self, outputs: Sequence[Tensor], part: P) -> UInt8Array:
        """Return (H, W, 3) RGB that shows what was learnt from and what was answered."""
