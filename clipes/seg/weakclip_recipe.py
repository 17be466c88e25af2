"""How WeakCLIP is trained: AdamW on masks of random views, or of whole images as kept tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from clipes.config import WeakClipPreset
from clipes.errors import UsageError
from clipes.run.tokens import CachedTokens
from clipes.seg.augment import Colours
from clipes.seg.data import TrainingPair
from clipes.seg.draws import choose_draws
from clipes.seg.frozen import TokenInput, label_size
from clipes.seg.frozen_recipe import cut_up
from clipes.seg.loss import Guidance
from clipes.seg.panels import SHOWN, below_each_other, row
from clipes.seg.recipes import (
    Batch,
    Examples,
    Part,
    Recipe,
    Schedule,
    refuse_weights,
    say_short,
    warm_up,
)
from clipes.seg.resize import resize, shrink
from clipes.seg.views import PATCH, require_patches, require_whole_patches
from clipes.seg.weakclip import LearntContexts, MappedVectors, WeakClip, WeakClipSpec, Words
from clipes.seg.weakclip_examples import MaskedViews, WholeExamples, cells_of
from clipes.seg.weakclip_loss import (
    IDENTITY_WEIGHT,
    boundary_loss,
    identity_loss,
    probabilities,
    seeding_loss,
)
from clipes.towers.clip_text import ContextEncoder
from clipes.towers.side_by_side import CLIP
from clipes.towers.tokens import JOINT, TowerTokens
from clipes.types import IGNORE, UInt8Array


@dataclass(frozen=True)
class SpeakingTowers:
    """Frozen CLIP and the words of a run.

    Attributes:
        source: CLIP's tokens, and those of another tower where some are read.
        words: The words, background first.
        colours: Mean and deviation of the channels that CLIP sees.
        note: Where the words come from, in a few words.
    """

    source: TowerTokens
    words: Words
    colours: Colours
    note: str


@dataclass(frozen=True)
class Target:
    """What an image shall be answered.

    Attributes:
        labels: (1, H, W) int64 with ``IGNORE``.
        weights: (1, H, W), 0 where ignored.
        cells: (1, 2h, 2w) labels of cells of stride 8, likewise.
        cell_weights: (1, 2h, 2w) likewise.
        image: (2h, 2w, 3) RGB uint8, a pixel a cell.
        present: (C,) bool, the classes that it may show.
        boundary: What its boundary loss weighs; 0 for none.
    """

    labels: Tensor
    weights: Tensor
    cells: Tensor
    cell_weights: Tensor
    image: UInt8Array
    present: Tensor
    boundary: float


@dataclass(frozen=True)
class Targets(Part):
    """Images on their way through the model.

    Attributes:
        targets: What each shall be answered.
    """

    targets: Sequence[Target]


@dataclass(frozen=True)
class WeakClipRecipe(Recipe[WeakClip, Targets]):
    """WeakCLIP's recipe.

    Attributes:
        preset: Model, rates, draws.
        classes: Class names in mask order.
        guidance: How confidence counts.
        open_towers: Loads CLIP and the words, once they are needed.
        tokens: Where the tokens of whole images come from; None for views.
    """

    made = WeakClipSpec

    preset: WeakClipPreset
    classes: tuple[str, ...]
    guidance: Guidance
    open_towers: Callable[[], SpeakingTowers]
    tokens: CachedTokens | None = None

    @cached_property
    def towers(self) -> SpeakingTowers:
        """CLIP and the words."""
        return self.open_towers()

    @property
    def reads_labels(self) -> bool:
        """Whether labels change what is learnt: what is drawn, or may show in the boundary loss."""
        return self.preset.boundary_present or self.preset.even_classes

    @property
    def spec(self) -> WeakClipSpec:
        """What the model is built from."""
        preset, source, words = self.preset, self.towers.source, self.towers.words
        learnt = isinstance(words, ContextEncoder)
        widths = source.widths
        return WeakClipSpec(
            self.classes,
            preset.blocks,
            widths[f"{CLIP}.{preset.blocks[0]}"],
            widths[JOINT],
            contexts=preset.contexts if learnt else 0,
            words_width=words.width if isinstance(words, ContextEncoder) else 0,
            chained=preset.chained,
            norm=preset.norm,
            normalise=preset.normalise,
            side=preset.crop,
            max_patches=max(preset.max_patches, (preset.crop // PATCH) ** 2),
            digests=dict(source.digests),
            beside=tuple(TokenInput(name, widths[name]) for name in preset.beside),
        )

    @property
    def note(self) -> str:
        """Where the words come from."""
        return self.towers.note

    @property
    def schedule(self) -> Schedule:
        """How much is learnt."""
        preset = self.preset
        return Schedule(preset.iterations, preset.batch, preset.accumulate, preset.average)

    def check_part(self, images: int) -> None:
        """Refuse views that are not of whole patches."""
        require_whole_patches(self.preset.crop)
        if self.preset.crop and self.preset.beside:
            raise UsageError(
                f"preset {self.preset.name} learns from whole images: views are seen by CLIP alone",
                "leave --crop out, or take preset weakclip-small",
            )

    def initialise(
        self, model: WeakClip, source: str, say: Callable[[str], None]
    ) -> WeakClipRecipe:
        """Give the model its words; a decoder has no weights but random ones to start from."""
        preset = self.preset
        refuse_weights(source, preset.name, "CLIP stays as it is")
        if preset.crop:
            require_patches(self.towers.source.patch, preset.name)
        say_short(preset.warmup, preset.iterations, say)
        words = self.towers.words
        if isinstance(words, Tensor) and isinstance(model.words, MappedVectors):
            model.words.keep(words)
        self._freeze(model)
        count = sum(one.numel() for one in model.parameters() if one.requires_grad)
        blocks = ", ".join(map(str, preset.blocks))
        beside = "".join(f" and {name}" for name in preset.beside)
        say(
            f"WeakCLIP: {count / 1e6:.1f} million weights on CLIP's blocks {blocks}{beside}; "
            f"{self.note}"
        )
        return self

    def network(self, model: WeakClip) -> nn.Module:
        """Return the model in training mode, its text tower at hand."""
        words = self.towers.words
        if isinstance(model.words, LearntContexts) and isinstance(words, ContextEncoder):
            model.words.lend(words)
        return self._freeze(model).train()

    def optimizer(self, model: WeakClip) -> AdamW:
        """Return AdamW; everything decays."""
        trained = [one for one in model.parameters() if one.requires_grad]
        group = {"params": trained, "factor": 1.0}
        return AdamW([group], lr=self.preset.lr, weight_decay=self.preset.weight_decay)

    def rate(self, iteration: int) -> float:
        """Return the learning rate: half a cosine, at first a share of it that rises in a line."""
        preset = self.preset
        turn = math.cos(math.pi * iteration / preset.iterations)
        rate = preset.last_lr + (preset.lr - preset.last_lr) * (1 + turn) / 2
        if iteration < preset.warmup:
            rate *= warm_up(iteration, preset.warmup)
        return rate

    def examples(self, pairs: Sequence[TrainingPair], seed: int) -> Examples:
        """Return whole images, mirrored or not; or random views."""
        if self.tokens is None:
            colours = self.towers.colours
            return MaskedViews(pairs, len(self.classes), self.preset, colours, seed)
        draws = choose_draws([pair.labels for pair in pairs], seed, even=self.preset.even_classes)
        return WholeExamples(pairs, self.spec, self.tokens, draws)

    def part(self, batch: Batch) -> Targets:
        """Return tokens with what each image shall be answered."""
        if self.tokens is None:
            return self._part_of_views(batch)
        grids, labels, confidence, *coarse, small, present, numbers = batch[:8]
        sizes = [(int(h), int(w)) for h, w in grids.tolist()]
        at_labels, cells = list(map(label_size, sizes)), list(map(cells_of, sizes))
        pixels = [
            one.unflatten(0, size)
            for one, size in zip(small.split([h * w for h, w in cells]), cells, strict=True)
        ]
        fine = zip(cut_up(labels, at_labels), cut_up(confidence, at_labels), strict=True)
        of_cells = zip(*(cut_up(one, cells) for one in coarse), strict=True)
        return self._part((grids, *batch[8:]), fine, of_cells, pixels, present, numbers)

    def _part_of_views(self, batch: Batch) -> Targets:
        views, labels, confidence, small, present, numbers = batch
        found = self.towers.source.encode({CLIP: views})
        names = [one.name for one in self.spec.inputs]
        grid = (views.shape[2] // PATCH, views.shape[3] // PATCH)
        # Concatenated here, outside of inference mode, they may be learnt from.
        tokens = [torch.cat([one.flatten(0, 1) for one in found[name]]) for name in names]
        grids, size = torch.tensor([grid] * len(views)), cells_of(grid)
        fine = list(zip(labels.split(1), confidence.split(1), strict=True))
        of_cells = [(shrink(some, size), shrink(sure, size)) for some, sure in fine]
        return self._part((grids, *tokens), fine, of_cells, list(small), present, numbers)

    def _part(
        self,
        inputs: tuple[Tensor, ...],
        labels: Iterable[tuple[Tensor, Tensor]],
        cells: Iterable[tuple[Tensor, Tensor]],
        small: Sequence[Tensor],
        present: Tensor,
        numbers: Tensor,
    ) -> Targets:
        """Return a batch, of each of whose images the arguments hold one.

        Labels come with their confidence, those of cells likewise.
        """
        targets, every = [], self.preset.boundary_every
        labelled = used = torch.zeros((), dtype=torch.long, device=present.device)
        for fine, coarse, image, classes, number in zip(
            labels, cells, small, present, numbers.tolist(), strict=True
        ):
            cut, weights = self.guidance.weigh(*fine)
            of_cells = self.guidance.weigh(*coarse)
            boundary = 0.0 if number % every else float(every)
            picture = image.cpu().numpy()
            targets.append(Target(cut, weights, *of_cells, picture, classes, boundary))
            labelled, used = labelled + (fine[0] != IGNORE).sum(), used + (cut != IGNORE).sum()
        count = torch.tensor([float(len(targets))], device=present.device)
        return Targets(inputs, count, labelled, used, targets)

    def losses(self, outputs: Sequence[Tensor], part: Targets) -> list[Tensor]:
        """Return the loss as one term, summed over images: within each, labels are balanced."""
        count = len(part.targets)
        costs = [
            self._loss(*one)
            for one in zip(outputs[:count], outputs[count:], part.targets, strict=True)
        ]
        return [torch.stack(costs).sum()]

    def _loss(self, logits: Tensor, scores: Tensor, target: Target) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            probs = probabilities(logits, _size_of_cells(scores))
            loss = seeding_loss(probs, target.cells, target.cell_weights)
            loss = loss + IDENTITY_WEIGHT * identity_loss(scores, target.labels, target.weights)
            if target.boundary:
                known = target.present if self.preset.boundary_present else None
                crf = self.preset.boundary_crf
                loss = loss + target.boundary * boundary_loss(probs, target.image, crf, known)
            return loss

    def answers(self, outputs: Sequence[Tensor], part: Targets) -> list[tuple[Tensor, Tensor]]:
        """Return labels and answer of each image, at stride 8."""
        count, found = len(part.targets), []
        for logits, scores, target in zip(
            outputs[:count], outputs[count:], part.targets, strict=True
        ):
            answer = resize(logits.float(), _size_of_cells(scores)).argmax(1)[0]
            found.append((target.cells[0], answer))
        return found

    def picture(self, outputs: Sequence[Tensor], part: Targets) -> UInt8Array:
        """Return rows of image, labels and answer, side by side, at stride 8."""
        answers = zip(part.targets, self.answers(outputs, part), strict=True)
        rows = [row(pair, target.image) for target, pair in answers]
        return below_each_other(rows[:SHOWN])

    def _freeze(self, model: WeakClip) -> WeakClip:
        """Take the gradient from what is not trained."""
        for module in model.match.unused():
            module.requires_grad_(False)
        model.adapter.requires_grad_(self.preset.train_adapter)
        return model


def _size_of_cells(scores: Tensor) -> tuple[int, int]:
    """Return (2h, 2w) for (1, L, h, w)."""
    return cells_of((scores.shape[2], scores.shape[3]))
