"""A decoder on tokens of frozen towers: what is trained is small, and images are encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from clipes.config import DECODER_CRF, CrfParams
from clipes.masks.values import value_count
from clipes.seg.discriminant import Discriminant
from clipes.seg.recipes import Model, Spec
from clipes.seg.resize import shrink
from clipes.types import Float32Array, UInt8Array

LABELS_PER_TOKEN = 4
"""Labels along each side of a patch: those of every fourth pixel, where patches have 16."""

_MLP = 4  # times the width, inside the MLP of a block

_WIDEST, _DEEPEST, _FINEST, _SHARPEST = 1 << 14, 64, 4, 8
"""Beyond that a file is damaged: it shall not ask for all of the memory."""


@dataclass(frozen=True)
class TokenInput:
    """Tokens that the decoder reads.

    Attributes:
        name: As ``TokenSource`` names them.
        width: Channels.
    """

    name: str
    width: int


class TokenSpec(Protocol):
    """A model that reads tokens by name."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in mask order, without the background."""

    @property
    def inputs(self) -> tuple[TokenInput, ...]:
        """The tokens that it reads, in order; of patches the first."""


@dataclass(frozen=True)
class FrozenSpec(Spec):
    """What has to be known to build a decoder for its weights.

    Attributes:
        inputs: The tokens that it reads, in order.
        classes: Class names in mask order, without the background.
        width: Channels inside.
        blocks: Transformer blocks.
        heads: Attention heads of a block.
        dropout: Share of the fused channels that is dropped in training.
        max_patches: Larger images are shrunk to at most this many patches.
        digests: sha256 of the towers' weights, by the name of the tower.
        linear: Names of the inputs that a linear discriminant reads, which the decoder's logits are
            added to; none for none.
        spread: Whether prediction spreads the answers over what the towers hold for one thing.
        finer: Brings them to a grid whose sides have so many times as many patches, by a closer
            look of the second tower; 1 for none.
        adapts: Whether the discriminant is brought to what labels look like in the image asked
            about, see ``Discriminant.change``.
        attention_power: CLIP's attention to this power is what answers are spread over, beside the
            likeness of another tower if one is read: above 1, nearer to what is attended to most.
    """

    kind: ClassVar[str] = "frozen"
    crf: ClassVar[CrfParams] = DECODER_CRF

    inputs: tuple[TokenInput, ...]
    classes: tuple[str, ...]
    width: int = 256
    blocks: int = 2
    heads: int = 8
    dropout: float = 0.1
    max_patches: int = 1600
    digests: Mapping[str, str] = field(default_factory=dict)
    linear: tuple[str, ...] = ()
    spread: bool = False
    finer: float = 1.0
    adapts: bool = False
    attention_power: float = 1.0

    @property
    def name(self) -> str:
        """The model's name, in a few words."""
        return f"a decoder on {', '.join(one.name for one in self.inputs)}"

    def build(self) -> FrozenDecoder:
        """Return the model with random weights, on the CPU."""
        return FrozenDecoder(self)

    def problem(self) -> str:
        """Return why no such model can be built; empty if one can."""
        widths = (self.width, self.heads, *(one.width for one in self.inputs))
        if not self.inputs or min(widths) < 1 or max(widths) > _WIDEST:
            return "its decoder reads no tokens that there are"
        if not 0 <= self.blocks <= _DEEPEST or self.width % self.heads or not 0 <= self.dropout < 1:
            return f"there is no decoder of {self.blocks} blocks and {self.heads} heads"
        if not 1 <= self.finer <= _FINEST:
            return f"it looks {self.finer} times as closely"
        if not 0 < self.attention_power <= _SHARPEST:
            return f"it spreads answers over attention to the power of {self.attention_power}"
        if not {*self.linear} <= {one.name for one in self.inputs}:
            return "its discriminant reads tokens that it does not have"
        if self.adapts and not self.linear:
            return "it has no discriminant that could adapt"
        return ""

    def towers(self) -> Mapping[str, str]:
        """Return the sha256 of the frozen towers' weights that the model goes with, by name."""
        return self.digests


class FrozenDecoder(Model):
    """Reads several kinds of tokens, fuses them, lets patches attend to each other, scores labels.

    Images of any grids lie one behind the other: all layers but attention work on the tokens of the
    whole batch at once, without padding, so that an image's answer does not depend on the others.

    Attributes:
        spec: What it was built from.
    """

    spec: FrozenSpec

    def __init__(self, spec: FrozenSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.readers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(one.width),
                nn.Linear(one.width, width),
                nn.GELU(),
                nn.Linear(width, width),
            )
            for one in spec.inputs
        )
        self.fuse = nn.Linear(width * len(spec.inputs), width)
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(Block(width, spec.heads) for _ in range(spec.blocks))
        labels = value_count(len(spec.classes))
        self.classify = nn.Linear(width, labels)
        self.discriminant = None
        if spec.linear:
            read = [one.width for one in spec.inputs if one.name in spec.linear]
            self.discriminant = Discriminant(sum(read), labels, adapts=spec.adapts)
            nn.init.zeros_(self.classify.weight)
            nn.init.zeros_(self.classify.bias)

    def forward(self, grids: Tensor, *tokens: Tensor) -> list[Tensor]:
        """Return logits of background and classes.

        Args:
            grids: (B, 2) int64, (h, w) of each image.
            tokens: For each input (S, D), S the sum of h * w, row by row, image by image.

        Returns:
            B times (1, 1 + C, h, w) float.
        """
        sizes = [(int(h), int(w)) for h, w in grids.tolist()]
        counts = [h * w for h, w in sizes]
        read = [reader(one.float()) for reader, one in zip(self.readers, tokens, strict=True)]
        fused = self.dropout(self.fuse(torch.cat(read, 1)))
        for block in self.blocks:
            fused = block(fused, counts)
        logits = self.classify(fused)
        if self.discriminant is not None:
            logits = logits.float() + self.discriminant(self.read_linearly(tokens))
        parts = logits.split(counts)
        return [one.T.unflatten(1, size)[None] for one, size in zip(parts, sizes, strict=True)]

    def read_linearly(self, tokens: Sequence[Tensor]) -> Tensor:
        """Return (S, D) float32 that the discriminant reads of (S, D) of each input."""
        named = zip(self.spec.inputs, tokens, strict=True)
        return torch.cat(
            [one.float() for source, one in named if source.name in self.spec.linear], 1
        )


class Block(nn.Module):
    """A pre-norm transformer block, of which the patches of one image see each other.

    Args:
        width: Channels.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, _MLP * width), nn.GELU(), nn.Linear(_MLP * width, width)
        )

    def forward(self, tokens: Tensor, counts: list[int]) -> Tensor:
        """Return (S, D) for (S, D) tokens of images of ``counts`` patches."""
        # (3, H, S, d)
        parts = self.project(self.norm_1(tokens)).unflatten(1, (3, self._heads, -1))
        images = parts.permute(1, 2, 0, 3).split(counts, dim=2)
        mixed = torch.cat([_attend(*image[:, None]) for image in images], dim=1)
        tokens = tokens + self.mix(mixed.transpose(0, 1).flatten(1))
        output: Tensor = tokens + self.mlp(self.norm_2(tokens))
        return output


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return (H, N, d) of (1, H, N, d) each."""
    return functional.scaled_dot_product_attention(query, key, value)[0]


def label_size(grid: tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) of the labels of a grid."""
    return LABELS_PER_TOKEN * grid[0], LABELS_PER_TOKEN * grid[1]


def labels_at(
    mask: UInt8Array, confidence: Float32Array, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return labels and confidence, (1, H, W) int64 and float32.

    Args:
        mask: (H0, W0).
        confidence: (H0, W0).
        size: (H, W), such as ``label_size``.
    """
    labels, sure = torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(confidence)
    return shrink(labels[None], size), shrink(sure[None], size)


def labels_of_tokens(
    mask: UInt8Array, confidence: Float32Array, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return ``labels_at`` the size of a grid's labels."""
    return labels_at(mask, confidence, label_size(grid))


def flat_tokens(
    tokens: Mapping[str, Tensor], spec: TokenSpec
) -> tuple[tuple[int, int], list[Tensor]]:
    """Return the grid of an image's tokens, (h, w, D) by name, and (h * w, D) for each input."""
    chosen = [tokens[one.name] for one in spec.inputs]
    height, width = chosen[0].shape[:2]
    return (height, width), [one.flatten(0, 1) for one in chosen]
