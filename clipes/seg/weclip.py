"""WeCLIP's decoder (Zhang et al., CVPR 2024): all of it that is trained, on all blocks of CLIP.

From the fused tokens come both the labels of pixels and the affinity of patches, which in turn
refines the labels that the decoder learns; see ``clipes.seg.weclip_recipe``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from clipes.choices import Normalise
from clipes.config import WECLIP_CRF, CrfParams
from clipes.errors import UsageError
from clipes.masks.values import value_count
from clipes.seg.recipes import Model, Spec

LARGEST_SCALE = 2.0
"""Of prediction: what the towers are asked about at most, times ``FusedSpec.side``."""

_MLP = 4  # times the width, inside the MLP of a block

_WIDEST, _DEEPEST = 1 << 14, 64
"""Beyond that a file is damaged: it shall not ask for all of the memory."""


@dataclass(frozen=True)
class FusedSpec(Spec):
    """What WeCLIP and WeCLIP+ have to know to be built for their weights; sizes as published.

    Attributes:
        classes: Class names in mask order, without the background.
        width: Channels inside.
        blocks: Transformer blocks.
        heads: Attention heads of a block.
        dropout: Share of the fused channels that is dropped in training.
        side: Longer side, in pixels, at which an image is looked at.
        normalise: Of ``clipes.choices.Normalise``: the colours that CLIP sees.
        digests: sha256 of the towers' weights, by the name of the tower.
    """

    crf: ClassVar[CrfParams] = WECLIP_CRF

    classes: tuple[str, ...]
    width: int = 256
    blocks: int = 3
    heads: int = 8
    dropout: float = 0.1
    side: int = 512
    normalise: str = Normalise.imagenet.value
    digests: Mapping[str, str] = field(default_factory=dict)

    def towers(self) -> Mapping[str, str]:
        """Return the sha256 of the frozen towers' weights that the model goes with, by name."""
        return self.digests

    def size_problem(self, widths: Sequence[int], depths: Sequence[int]) -> str:
        """Return why no decoder of such a size can be built; empty if one can.

        Args:
            widths: Channels of the tokens that it reads.
            depths: Numbers of layers beside the blocks, each 1 at least.
        """
        sizes = (self.width, self.heads, self.side, *widths)
        layers = (1 + self.blocks, *depths)
        if min(*sizes, *layers) < 1 or max(sizes) > _WIDEST or max(layers) > _DEEPEST:
            return "its decoder is of no size that there is"
        if self.width % self.heads or not 0 <= self.dropout < 1:
            return f"there is no decoder of {self.width} channels and {self.heads} heads"
        if self.normalise not in Normalise.names():
            return "it was trained on colours of another clipes"
        return ""


@dataclass(frozen=True)
class WeClipSpec(FusedSpec):
    """Of WeCLIP's decoder.

    Attributes:
        layers: Blocks of CLIP that are read: 1 to ``layers``.
        channels: Of CLIP's tokens.
    """

    kind: ClassVar[str] = "weclip"

    layers: int = 11
    channels: int = 768

    @property
    def name(self) -> str:
        """The model's name, in a few words."""
        return f"WeCLIP's decoder on {self.layers} blocks"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tokens that the decoder reads, in order."""
        return tuple(f"clip.{block}" for block in range(1, 1 + self.layers))

    def build(self) -> WeClip:
        """Return the model with random weights, on the CPU."""
        return WeClip(self)

    def problem(self) -> str:
        """Return why no such model can be built; empty if one can."""
        return self.size_problem([self.channels], [self.layers])


def require_scales(scales: Sequence[float]) -> None:
    """Refuse scales of prediction beyond ``LARGEST_SCALE``.

    Raises:
        UsageError: One is.
    """
    if max(scales) > LARGEST_SCALE:
        raise UsageError(
            f"WeCLIP is not asked at a scale of {max(scales):g}",
            f"choose scales up to {LARGEST_SCALE:g}",
        )


class WeClip(Model):
    """Reads and fuses the tokens of all blocks, lets patches attend to each other, scores labels.

    No position is told apart: what is permuted in comes permuted out. The 1 x 1 convolutions of the
    paper are linear layers here, which are the same, first weights included.

    Attributes:
        spec: What it was built from.
    """

    spec: WeClipSpec

    def __init__(self, spec: WeClipSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.readers = nn.ModuleList(
            nn.Sequential(nn.Linear(spec.channels, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(spec.layers)
        )
        self.fuse = nn.Linear(spec.layers * width, width)
        self.dropout = nn.Dropout1d(spec.dropout)  # drops a channel at all patches of an image
        self.blocks = nn.Sequential(*(Block(width, spec.heads) for _ in range(spec.blocks)))
        self.classify = nn.Linear(width, value_count(len(spec.classes)))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return what patches show, and which of them belong together.

        Args:
            tokens: (B, L, h, w, D) of blocks 1 to L, as they leave them.

        Returns:
            Logits (B, 1 + C, h, w) of background and classes, and the affinity (B, N, N) in (0, 1)
            of N = h * w patches, float32: sigmoid of the products of fused tokens.
        """
        grid = (tokens.shape[2], tokens.shape[3])
        layers = tokens.flatten(2, 3).float().unbind(1)
        read = [reader(one) for reader, one in zip(self.readers, layers, strict=True)]
        fused = self.dropout(self.fuse(torch.cat(read, -1)).mT).mT
        logits = self.classify(self.blocks(fused)).mT.unflatten(2, grid)
        with torch.autocast(tokens.device.type, enabled=False):
            exact = fused.float()
            affinity = (exact @ exact.mT).sigmoid()
        return logits, affinity

    def score(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return the logits (1, 1 + C, h, w) of one image.

        Args:
            tokens: (h, w, D) of each of ``spec.inputs``.
        """
        logits: Tensor = self(torch.stack([tokens[name] for name in self.spec.inputs])[None])[0]
        return logits


class Block(nn.Module):
    """A pre-norm transformer block without dropout.

    Args:
        width: Channels.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, _MLP * width), QuickGELU(), nn.Linear(_MLP * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, N, D) for (B, N, D)."""
        normed = self.norm_1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        output: Tensor = tokens + self.mlp(self.norm_2(tokens))
        return output
