"""How a decoder on frozen tokens is trained: AdamW on whole images, mirrored or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from clipes.config import FrozenPreset
from clipes.masks.values import value_count
from clipes.run.tokens import CachedTokens
from clipes.seg.data import TrainingPair
from clipes.seg.draws import Draws, choose_draws
from clipes.seg.frozen import (
    FrozenDecoder,
    FrozenSpec,
    TokenInput,
    TokenSpec,
    flat_tokens,
    label_size,
    labels_of_tokens,
)
from clipes.seg.frozen_start import fit_discriminant
from clipes.seg.loss import Guidance, weighted_loss
from clipes.seg.panels import SHOWN, below_each_other, row
from clipes.seg.recipes import (
    Batch,
    Examples,
    Part,
    Recipe,
    Schedule,
    refuse_weights,
    say_short,
)
from clipes.seg.resize import resize
from clipes.types import IGNORE, Float32Array, Progress, UInt8Array

_RAREST = 1e-4  # no label is taken for rarer: a share of what is seen


@dataclass(frozen=True)
class Grids(Part):
    """Images on their way through the decoder.

    Attributes:
        targets: Labels and weights, (1, 4h, 4w), of each image.
    """

    targets: Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FrozenRecipe(Recipe[FrozenDecoder, Grids]):
    """The recipe of a decoder on frozen tokens.

    Attributes:
        preset: Model, rates, draws.
        classes: Class names in mask order.
        guidance: How confidence counts.
        tokens: Where tokens come from.
        importance: How much each label counts, background first; none before the training starts,
            or for all the same.
    """

    made = FrozenSpec

    preset: FrozenPreset
    classes: tuple[str, ...]
    guidance: Guidance
    tokens: CachedTokens
    importance: tuple[float, ...] = ()

    @property
    def reads_labels(self) -> bool:
        """Whether the labels of an image change what is learnt: they say what is drawn evenly."""
        return self.preset.even_classes

    @property
    def spec(self) -> FrozenSpec:
        """What the model is built from."""
        preset, source = self.preset, self.tokens.source
        inputs = tuple(TokenInput(name, source.widths[name]) for name in preset.tokens)
        return FrozenSpec(
            inputs,
            self.classes,
            preset.width,
            preset.blocks,
            preset.heads,
            preset.dropout,
            preset.max_patches,
            dict(source.digests),
            preset.linear,
            preset.spread,
            preset.finer,
            bool(preset.linear) and preset.adapts,
            preset.attention_power,
        )

    @property
    def schedule(self) -> Schedule:
        """How much is learnt."""
        preset = self.preset
        return Schedule(preset.iterations, preset.batch, preset.accumulate, preset.average)

    def initialise(
        self, model: FrozenDecoder, source: str, say: Callable[[str], None]
    ) -> FrozenRecipe:
        """Start from random weights; a decoder has no others."""
        refuse_weights(source, self.preset.name, "the towers stay as they are")
        count = sum(parameter.numel() for parameter in model.parameters())
        say(f"decoder: {count / 1e6:.1f} million weights on {', '.join(self.preset.tokens)}")
        say_short(self.preset.warmup, self.preset.iterations, say)
        return self

    def start(
        self, model: FrozenDecoder, pairs: Sequence[TrainingPair], progress: Progress
    ) -> FrozenRecipe:
        """Find the discriminant between labels: one look at every image, and nothing trained."""
        if model.discriminant is None:
            return self
        seen = fit_discriminant(model, pairs, self.tokens, self.guidance, progress)
        if not self.preset.balance or not seen.any():
            return self
        shares = np.maximum(seen / seen.sum(), _RAREST)
        return replace(self, importance=tuple((shares**-self.preset.balance).tolist()))

    def state(self) -> Mapping[str, Any]:
        """Return how much each label counts."""
        return {"importance": list(self.importance)}

    def resume(self, state: Mapping[str, Any]) -> FrozenRecipe:
        """Return the recipe whose ``state`` a checkpoint holds."""
        return replace(self, importance=tuple(map(float, state.get("importance", ()))))

    def optimizer(self, model: FrozenDecoder) -> AdamW:
        """Return AdamW; only matrices decay."""
        parameters = list(model.parameters())
        groups: list[dict[str, Any]] = [
            {
                "params": [one for one in parameters if one.ndim > 1],
                "factor": 1.0,
                "weight_decay": self.preset.weight_decay,
            },
            {
                "params": [one for one in parameters if one.ndim == 1],
                "factor": 1.0,
                "weight_decay": 0.0,
            },
        ]
        return AdamW(groups, lr=self.preset.lr)

    def rate(self, iteration: int) -> float:
        """Return the learning rate: a linear rise, then half a cosine down to 0."""
        preset = self.preset
        if iteration < preset.warmup:
            return preset.lr * (iteration + 1) / preset.warmup
        rest = max(preset.iterations - preset.warmup, 1)
        return preset.lr * (1 + math.cos(math.pi * (iteration - preset.warmup) / rest)) / 2

    def examples(self, pairs: Sequence[TrainingPair], seed: int) -> TokenExamples:
        """Return whole images, mirrored or not."""
        draws = choose_draws([pair.labels for pair in pairs], seed, even=self.preset.even_classes)
        return TokenExamples(pairs, self.spec, self.tokens, draws)

    def part(self, batch: Batch) -> Grids:
        """Return tokens with the labels of each image."""
        grids, labels, confidence, *tokens = batch
        cut, weights = self.guidance.weigh(labels, confidence)
        sizes = [label_size((int(h), int(w))) for h, w in grids.tolist()]
        targets = list(zip(cut_up(cut, sizes), cut_up(weights, sizes), strict=True))
        if self.importance:
            importance = torch.tensor(self.importance, device=weights.device)
            targets = [(one, balanced(one, weight, importance)) for one, weight in targets]
        return Grids(
            (grids, *tokens),
            torch.stack([one.sum() for _, one in targets]).sum()[None],
            (labels != IGNORE).sum(),
            (cut != IGNORE).sum(),
            targets,
        )

    def losses(self, outputs: Sequence[Tensor], part: Grids) -> list[Tensor]:
        """Return the weighted cross-entropy over all images, as one term."""
        costs = [
            weighted_loss(_enlarged(logits), labels, weights)
            for logits, (labels, weights) in zip(outputs, part.targets, strict=True)
        ]
        return [torch.stack(costs).sum()]

    def answers(self, outputs: Sequence[Tensor], part: Grids) -> list[tuple[Tensor, Tensor]]:
        """Return labels and answer of each image, at the labels' size."""
        pairs = zip(outputs, part.targets, strict=False)  # a picture asks for the first alone
        return [(labels[0], _enlarged(logits).argmax(1)[0]) for logits, (labels, _) in pairs]

    def picture(self, outputs: Sequence[Tensor], part: Grids) -> UInt8Array:
        """Return rows of trained labels and answer, side by side, at the labels' size."""
        return below_each_other([row(pair) for pair in self.answers(outputs[:SHOWN], part)])


class TokenExamples(Examples):
    """Whole images as tokens, every second one mirrored on the grid.

    An example is its grid (2,), labels and confidence (16 h w,), what else a kind needs of it, and,
    for each input, (h w, D) float16.

    Args:
        pairs: The images and their masks.
        spec: Says which tokens are read, and how many labels there are.
        tokens: Where they come from.
        draws: Says which image comes when.
    """

    ahead = False

    def __init__(
        self,
        pairs: Sequence[TrainingPair],
        spec: TokenSpec,
        tokens: CachedTokens,
        draws: Draws,
    ) -> None:
        self._pairs = pairs
        self._spec = spec
        self._tokens = tokens
        self._draws = draws

    def __getitem__(self, position: int) -> Batch:
        """Return an image's tokens and labels."""
        index, rng = self._draws.at(position)
        pair = self._pairs[index]
        mask, confidence = pair.read_labels(value_count(len(self._spec.classes)))
        tokens = self._tokens.read(pair.id, pair.image)
        mirrored = rng.random() < 0.5
        if mirrored:
            tokens = {name: one.flip(1) for name, one in tokens.items()}
            mask, confidence = mask[:, ::-1].copy(), confidence[:, ::-1].copy()
        grid, flat = flat_tokens(tokens, self._spec)
        more = self.beside(position, pair, (mask, confidence), grid, mirrored=mirrored)
        small = [one.flatten() for one in labels_of_tokens(mask, confidence, grid)]
        return (torch.tensor(grid), *small, *more, *flat)

    def beside(
        self,
        position: int,
        pair: TrainingPair,
        labels: tuple[UInt8Array, Float32Array],
        grid: tuple[int, int],
        *,
        mirrored: bool,
    ) -> tuple[Tensor, ...]:
        """Return what else is needed of an example, each tensor to be laid behind others'.

        Args:
            position: Of the example.
            pair: Its files.
            labels: Mask and confidence, (H, W) each, mirrored if the example is.
            grid: Of its tokens.
            mirrored: Whether it is.
        """
        return ()

    def collate(self, examples: Sequence[Batch]) -> Batch:
        """Return images one behind the other, their grids as (B, 2)."""
        grids, *rest = zip(*examples, strict=True)
        return (torch.stack(grids), *(torch.cat(column) for column in rest))


def balanced(labels: Tensor, weights: Tensor, importance: Tensor) -> Tensor:
    """Return the weights of an image's pixels such that small things and rare labels count.

    A label counts by the square root of what an image shows of it, as in the discriminant that
    training starts from, and by its importance.

    Args:
        labels: (1, H, W) int64 with ``IGNORE``.
        weights: (1, H, W), 0 where nothing is learnt.
        importance: (1 + C,).
    """
    known = labels.masked_fill(labels == IGNORE, 0)
    shown = torch.zeros_like(importance).scatter_add_(0, known.flatten(), weights.flatten())
    return weights * (importance * shown.clamp(min=1).rsqrt())[known]


def cut_up(maps: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return (1, H, W) of each size, of maps that lie one behind the other."""
    counts = [height * width for height, width in sizes]
    return [one.view(1, *size) for one, size in zip(maps.split(counts), sizes, strict=True)]


def _enlarged(logits: Tensor) -> Tensor:
    """Return (1, L, h, w) logits at the size of the labels."""
    return resize(logits, label_size((logits.shape[2], logits.shape[3])))
