"""How WeCLIP and WeCLIP+ are trained: AdamW on random views, whose labels are made as it goes.

A run's words and the labels of its images are all that is needed: it may have no masks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.optim import AdamW

from clipes.config import WeClipPreset
from clipes.disk.images import read_image
from clipes.seg.augment import Colours, Square, in_colours
from clipes.seg.data import TrainingPair
from clipes.seg.draws import Passes
from clipes.seg.panels import SHOWN, below_each_other, row
from clipes.seg.recipes import (
    Batch,
    Examples,
    Part,
    Recipe,
    refuse_weights,
    say_short,
    warm_up,
)
from clipes.seg.resize import resize
from clipes.seg.views import require_patches, require_whole_patches
from clipes.seg.weclip import WeClip, WeClipSpec, require_scales
from clipes.seg.weclip_labels import Seen, Teacher, make_labels
from clipes.seg.weclip_loss import weclip_loss
from clipes.seg.weclip_plus import WeClipPlus
from clipes.types import UInt8Array

M = TypeVar("M", WeClip, WeClipPlus)


@dataclass(frozen=True)
class SeenViews(Part):
    """Views on their way through the decoder.

    Attributes:
        views: (B, 3, H, W) float32, normalised.
        seen: What CLIP says of each.
        updates: Made before these views are learnt from.
    """

    views: Tensor
    seen: Sequence[Seen]
    updates: int


@dataclass(frozen=True)
class ViewsRecipe(Recipe[M, SeenViews], Generic[M]):
    """What both recipes do alike.

    Attributes:
        preset: Views, rates, how labels are made.
        classes: Class names in mask order.
        open_teacher: Loads CLIP and the words, once they are needed.
    """

    reads_masks = False

    preset: WeClipPreset
    classes: tuple[str, ...]
    open_teacher: Callable[[], Teacher]

    @cached_property
    def teacher(self) -> Teacher:
        """CLIP and the words."""
        return self.open_teacher()

    def check_part(self, images: int) -> None:
        """Refuse views that are not of whole patches, and scales that are too large to predict."""
        require_whole_patches(self.preset.crop)
        require_scales(self.preset.test_scales)

    def initialise(self, model: M, source: str, say: Callable[[str], None]) -> ViewsRecipe[M]:
        """Start from random weights; a decoder has no others.

        Raises:
            UsageError: There are to be others, or CLIP's patches are of another size.
        """
        refuse_weights(source, self.preset.name, "the towers stay as they are")
        require_patches(self.teacher.clip.patch, self.preset.name)
        count = sum(parameter.numel() for parameter in model.parameters())
        say(f"{model.spec.name}: {count / 1e6:.1f} million weights; labels are made as it learns")
        say_short(self.preset.warmup, self.preset.iterations, say)
        for first, what in self._later():
            if first >= self.preset.iterations:
                say(f"{what} from update {first} on: this training ends before, and goes without")
        return self

    def _later(self) -> list[tuple[int, str]]:
        """Return the updates from which more is done, and what."""
        return [(self.preset.refine_from, "labels are refined by what the decoder has learnt")]

    def optimizer(self, model: M) -> AdamW:
        """Return AdamW with its usual moments; everything decays."""
        group = {"params": list(model.parameters()), "factor": 1.0}
        return AdamW([group], lr=self.preset.lr, weight_decay=self.preset.weight_decay)

    def rate(self, iteration: int) -> float:
        """Return the learning rate: a linear rise, then a fall as if it had begun at once."""
        preset = self.preset
        if iteration < preset.warmup:
            return preset.lr * warm_up(iteration, preset.warmup)
        return preset.lr * (1 - iteration / preset.iterations)

    def examples(self, pairs: Sequence[TrainingPair], seed: int) -> ViewExamples:
        """Return random views of images that show a class."""
        return ViewExamples(pairs, len(self.classes), self.preset, self._colours, seed)

    def part(self, batch: Batch) -> SeenViews:
        """Return views with all that CLIP says of them."""
        views, present, iterations = batch
        tokens, seen = self.teacher.look(views, present, self.preset)
        pixels = torch.tensor(views[:, 0].numel(), device=views.device)
        return SeenViews(
            self._inputs(tokens, views),
            torch.tensor([float(len(views))], device=views.device),
            pixels,
            pixels,
            views,
            seen,
            int(iterations[0]),
        )

    def losses(self, outputs: Sequence[Tensor], part: SeenViews) -> list[Tensor]:
        """Return the loss as one term, summed over views.

        Labels are balanced, and compared (Dice), within a part, for how much there is of each is
        only known once the decoder has answered.
        """
        cams, labels = self._labels(outputs, part)
        return [self._loss(outputs, cams, labels) * len(part.views)]

    def answers(self, outputs: Sequence[Tensor], part: SeenViews) -> list[tuple[Tensor, Tensor]]:
        """Return labels and answer of each view, at its size; the labels are made again."""
        _, labels = self._labels(outputs, part)
        size = (labels.shape[1], labels.shape[2])
        answers = resize(self._answer(outputs).float(), size).argmax(1)
        return list(zip(labels, answers, strict=True))

    def picture(self, outputs: Sequence[Tensor], part: SeenViews) -> UInt8Array:
        """Return rows of view, labels and answer, side by side: (n H, 3 W, 3) uint8."""
        mean, std = (torch.tensor(one)[:, None, None] for one in self._colours)
        views = (part.views.cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
        pairs = zip(views.permute(0, 2, 3, 1).numpy(), self.answers(outputs, part), strict=True)
        return below_each_other([row(pair, view) for view, pair in pairs][:SHOWN])

    @property
    def _colours(self) -> Colours:
        return self.teacher.mean, self.teacher.std

    @abstractmethod
    def _inputs(self, tokens: Tensor, views: Tensor) -> tuple[Tensor, ...]:
        """Return what the decoder is called with, of CLIP's tokens (B, L, h, w, D) and views."""

    @abstractmethod
    def _answer(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the logits (B, 1 + C, h, w) that count in the end."""

    @abstractmethod
    def _labels(self, outputs: Sequence[Tensor], part: SeenViews) -> tuple[Tensor, Tensor]:
        """Return what CLIP's maps say of views, and what is learnt: (B, H, W) int64 each."""

    @abstractmethod
    def _loss(self, outputs: Sequence[Tensor], cams: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch, a mean over it: ()."""


class WeClipRecipe(ViewsRecipe[WeClip]):
    """WeCLIP's recipe."""

    made = WeClipSpec

    @property
    def spec(self) -> WeClipSpec:
        """What the model is built from."""
        teacher = self.teacher
        return WeClipSpec(
            self.classes,
            layers=teacher.layers,
            channels=teacher.channels,
            side=self.preset.side,
            normalise=self.preset.normalise,
            digests=dict(teacher.digests),
        )

    def _inputs(self, tokens: Tensor, views: Tensor) -> tuple[Tensor, ...]:
        return (tokens,)

    def _answer(self, outputs: Sequence[Tensor]) -> Tensor:
        return outputs[0]

    def _labels(self, outputs: Sequence[Tensor], part: SeenViews) -> tuple[Tensor, Tensor]:
        learnt = outputs[1].detach() if part.updates >= self.preset.refine_from else None
        labels = make_labels(part.seen, part.views, learnt, self.preset)
        return labels, labels

    def _loss(self, outputs: Sequence[Tensor], cams: Tensor, labels: Tensor) -> Tensor:
        logits, affinity = outputs
        return weclip_loss(logits, affinity, labels)


class ViewExamples(Examples):
    """Random views, pass after pass over the images.

    An example is its view (3, H, W) float32, normalised, the classes of its whole image (C,) bool,
    and the () int64 number of updates before it is learnt from.

    Args:
        pairs: The images; each shows a class, and masks are not read.
        classes: C.
        preset: Augmentation.
        colours: What is taken off.
        seed: Chooses the sequence.
    """

    def __init__(
        self,
        pairs: Sequence[TrainingPair],
        classes: int,
        preset: WeClipPreset,
        colours: Colours,
        seed: int,
    ) -> None:
        self._pairs = pairs
        self._classes = classes
        self._preset = preset
        self._colours = colours
        self._draws = Passes(len(pairs), seed)

    def __getitem__(self, position: int) -> Batch:
        """Return a view."""
        index, rng = self._draws.at(position)
        pair = self._pairs[index]
        image = read_image(pair.image)
        view = in_colours(random_view(image, self._preset, rng), self._colours)
        number = torch.tensor(position // self._preset.batch)
        return view, pair.shows(self._classes), number


def random_view(image: UInt8Array, preset: WeClipPreset, rng: np.random.Generator) -> UInt8Array:
    """Scale, mirror, pad with black and crop an image at random.

    Args:
        image: (H, W, 3) RGB uint8.
        preset: Says how much.
        rng: Source of chance.

    Returns:
        (S, S, 3) uint8, ``preset.crop`` pixels square.
    """
    factor, side = rng.uniform(*preset.scale), preset.crop
    height, width = (max(1, round(length * factor)) for length in image.shape[:2])
    # As published, by Pillow, which averages over all pixels where it makes an image smaller.
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    scaled = np.asarray(picture, np.uint8)
    if rng.random() < 0.5:
        scaled = scaled[:, ::-1]
    square = Square.of(scaled, side, rng)
    view = np.zeros((side, side, 3), np.uint8)
    view[square.put] = scaled[square.taken]
    return view
