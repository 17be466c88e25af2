"""WeakCLIP (Zhu et al., IJCV 2025): what is trained on frozen CLIP to make masks better.

Words and pixels are matched in the space that they share; how well they match guides a decoder of
CLIP's tokens. With a text tower the words are names behind learnt vectors, without one the run's
own vectors, through a linear map that is learnt. ``clipes.seg.weakclip_layers`` has the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipes.choices import Norm, Normalise
from clipes.masks.values import value_count
from clipes.seg.frozen import TokenInput
from clipes.seg.recipes import Model, Spec
from clipes.seg.views import PATCH
from clipes.seg.weakclip_layers import Adapter, CoAttention, Decoder
from clipes.towers.clip_text import CONTEXT_LENGTH, ContextEncoder
from clipes.towers.side_by_side import CLIP
from clipes.towers.tokens import GLOBAL, JOINT

Words: TypeAlias = ContextEncoder | Tensor
"""Where words come from: a text tower, or vectors (L, E) of length 1, background first."""

BACKGROUND = "background"
"""What label 0 is called."""

STRIDES = (4, 8, 16, 32)
"""Pixels of the image per cell of each level."""

_WORDS_NORM = 10.0
"""Length of the vectors that CLIP's towers return, about: the co-attention's share is of these."""

_LAYERS = 3  # of the co-attention, on either side

_WIDEST = 1 << 12
"""Beyond that a file is damaged: it shall not ask for all of the memory."""


@dataclass(frozen=True)
class WeakClipSpec(Spec):
    """What has to be known to build a model for its weights.

    Attributes:
        classes: Class names in mask order, without the background.
        blocks: Blocks of CLIP that are decoded, at as many of ``STRIDES``, the last ones.
        channels: D, of CLIP's tokens.
        embed: E, of the space that images and words share.
        contexts: Vectors that are learnt before each name; 0 for constant vectors and a map.
        words_width: Channels of such a vector; 0 without.
        chained: See ``clipes.seg.weakclip_layers.CoAttention``.
        norm: Of ``clipes.choices.Norm``.
        normalise: Of ``clipes.choices.Normalise``: the colours that count as mean and deviation.
        side: Of windows that an image is looked at in, in pixels, and of its shorter side at scale
            1; 0 for whole images as they are.
        max_patches: Larger images are shrunk to at most this many patches.
        digests: sha256 of the towers' weights, by the name of the tower.
        beside: Tokens of another tower that the decoder reads beside the scores; none as published.
    """

    kind: ClassVar[str] = "weakclip"

    classes: tuple[str, ...]
    blocks: tuple[int, ...] = (4, 6, 8, 12)
    channels: int = 768
    embed: int = 512
    contexts: int = 8
    words_width: int = 512
    chained: bool = True
    norm: str = Norm.batch.value
    normalise: str = Normalise.imagenet.value
    side: int = 512
    max_patches: int = 1600
    digests: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[TokenInput, ...] = ()

    @property
    def name(self) -> str:
        """The model's name, in a few words."""
        more = "".join(f" and {one.name}" for one in self.beside)
        return f"WeakCLIP on {len(self.blocks)} blocks{more}"

    @property
    def inputs(self) -> tuple[TokenInput, ...]:
        """The tokens that the model reads, in order."""
        others = [one.width for one in self.beside]
        widths = [self.channels] * len(self.blocks) + others + [self.embed] * 2
        names = token_names(self.blocks, [one.name for one in self.beside])
        return tuple(map(TokenInput, names, widths))

    @property
    def labels(self) -> int:
        """L, background included."""
        return value_count(len(self.classes))

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per cell of each level."""
        return STRIDES[-len(self.blocks) :]

    def build(self) -> WeakClip:
        """Return the model with random weights, on the CPU."""
        return WeakClip(self)

    def problem(self) -> str:
        """Return why no such model can be built; empty if one can."""
        if not 1 <= len(self.blocks) <= len(STRIDES) or min(self.blocks) < 1:
            return f"it decodes {len(self.blocks)} blocks"
        others = [one.width for one in self.beside]
        widths = (self.channels, self.embed, self.words_width if self.contexts else 1, *others)
        if min(widths) < 1 or max(widths) > _WIDEST or not 0 <= self.contexts < CONTEXT_LENGTH:
            return "its words and tokens are of no size that there is"
        if self.norm not in Norm.names() or self.normalise not in Normalise.names():
            return "it was trained on colours or normalised in a way of another clipes"
        if not 0 <= self.side <= _WIDEST or self.side % PATCH:
            return f"it looks at windows of {self.side} pixels"
        if self.beside and self.side:
            return "it looks at windows with a second tower"
        if self.max_patches < max(1, (self.side // PATCH) ** 2):
            return "its windows are larger than its images"
        return ""

    def towers(self) -> Mapping[str, str]:
        """Return the sha256 of the frozen towers' weights that the model goes with, by name."""
        return self.digests


def token_names(blocks: Iterable[int], beside: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the names of the tokens that go with some decoded blocks, in order."""
    return (*(f"{CLIP}.{block}" for block in blocks), *beside, JOINT, GLOBAL)


class WeakClip(Model):
    """Words and pixels of frozen CLIP, matched; and a decoder that reads the match.

    Images of several grids lie one behind the other, as for ``clipes.seg.frozen.FrozenDecoder``;
    those of one grid go through together.

    Attributes:
        spec: What it was built from.
    """

    spec: WeakClipSpec

    def __init__(self, spec: WeakClipSpec) -> None:
        super().__init__()
        self.spec = spec
        self.words = LearntContexts(spec) if spec.contexts else MappedVectors(spec)
        self.adapter = Adapter(spec.strides, spec.channels, spec.norm)
        self.match = CoAttention(spec.embed, _LAYERS, chained=spec.chained)
        self.norms = nn.ModuleList(nn.LayerNorm(one.width) for one in spec.beside)
        beside = sum(one.width for one in spec.beside)
        self.decoder = Decoder(spec.strides, spec.channels, spec.labels, spec.norm, beside)

    def forward(self, grids: Tensor, *tokens: Tensor) -> list[Tensor]:
        """Return what each image shows, and how well its patches match the words.

        Args:
            grids: (B, 2) int64, (h, w) of each image.
            tokens: For each of ``spec.inputs`` (S, D), S the sum of h * w, row by row, image by
                image; of what stands for a whole image (B, E).

        Returns:
            B times logits (1, L, H, W), at the finest of ``spec.strides``, then B times cosines
            (1, L, h, w).
        """
        sizes = [(int(h), int(w)) for h, w in grids.tolist()]
        words, count = self.words(), len(sizes)
        together = count if len(set(sizes)) == 1 else 1
        grid_of = sizes[::together]
        parts = [one.split([together * h * w for h, w in grid_of]) for one in tokens[:-1]]
        parts.append(tokens[-1].split(together))
        found = [
            self._look(words, grid, [one.float().unflatten(0, (together, -1)) for one in part])
            for grid, part in zip(grid_of, zip(*parts, strict=True), strict=True)
        ]
        logits, scores = zip(*found, strict=True)
        return [image[None] for part in (*logits, *scores) for image in part]

    def _look(
        self, words: Tensor, grid: tuple[int, int], tokens: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return logits (B, L, H, W) and cosines (B, L, h, w) of tokens (B, N, D)."""
        *patches, joint, whole = tokens
        blocks, beside = patches[: len(self.spec.blocks)], patches[len(self.spec.blocks) :]
        levels = self.adapter(one.mT.unflatten(2, grid) for one in blocks)
        pixels = torch.cat([whole, joint], 1)
        matched, seen = self.match(words.expand(len(joint), -1, -1), pixels)
        scores = cosines(matched, seen[:, 1:]).unflatten(2, grid)
        others = [
            norm(one).mT.unflatten(2, grid) for norm, one in zip(self.norms, beside, strict=True)
        ]
        return self.decoder(levels, torch.cat([scores, *others], 1)), scores


def cosines(words: Tensor, pixels: Tensor) -> Tensor:
    """Return (B, L, N) in [-1, 1], float32, of (B, L, E) and (B, N, E)."""
    with torch.autocast(words.device.type, enabled=False):
        units = (functional.normalize(one.float(), dim=2) for one in (words, pixels))
        text, image = units
        return text @ image.mT


class LearntContexts(nn.Module):
    """Names behind vectors that are learnt, one set of them for all; see ``ContextEncoder``.

    The text tower is no part of it: it is lent for training, and what it says at last is kept.
    """

    features: Tensor

    def __init__(self, spec: WeakClipSpec) -> None:
        super().__init__()
        self._lent: list[ContextEncoder] = []  # in a list, so that it is no weight of ours
        self.contexts = nn.Parameter(torch.empty(1, spec.contexts, spec.words_width))
        nn.init.trunc_normal_(self.contexts)
        self.register_buffer("features", torch.zeros(spec.labels, spec.embed))
        nn.Module.register_state_dict_pre_hook(self, _up_to_date)

    def lend(self, encoder: ContextEncoder) -> None:
        """Take the text tower that training goes through."""
        self._lent = [encoder]

    def forward(self) -> Tensor:
        """Return (L, E), not of length 1; without gradient where nothing is trained."""
        return self.encoded() if self.training and self._lent else self.features

    def encoded(self) -> Tensor:
        """Return what the text tower says now: (L, E) float32."""
        with torch.autocast(self.contexts.device.type, enabled=False):
            return self._lent[0](self.contexts[0]).float()

    def keep(self) -> None:
        """Keep what the text tower says now, if there is one."""
        if self._lent:
            with torch.no_grad():
                self.features.copy_(self.encoded())


def _up_to_date(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if isinstance(module, LearntContexts):
        module.keep()


class MappedVectors(nn.Module):
    """Vectors that stay, and a linear map for all of them that starts as the identity."""

    vectors: Tensor

    def __init__(self, spec: WeakClipSpec) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(spec.labels, spec.embed))
        # What is added to the identity, so that weight decay leads back to it.
        self.map = nn.Linear(spec.embed, spec.embed, bias=False)
        nn.init.zeros_(self.map.weight)

    def keep(self, vectors: Tensor) -> None:
        """Take the vectors (L, E), of length 1; they get the length of a tower's."""
        self.vectors.copy_(_WORDS_NORM * vectors)

    def forward(self) -> Tensor:
        """Return (L, E), not of length 1."""
        output: Tensor = self.vectors + self.map(self.vectors)
        return output
