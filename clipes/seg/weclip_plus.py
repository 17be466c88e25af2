"""WeCLIP+'s decoder (Zhang et al., TPAMI 2025): one for the tokens of CLIP and of DINOv2.

Each tower is read by itself, then the same blocks answer for both; where they agree the answer is
right more often, and each is taught by the other. See ``clipes.seg.weclip_plus_recipe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clipes.masks.values import value_count
from clipes.seg.frozen import TokenInput
from clipes.seg.recipes import Model
from clipes.seg.resize import resize
from clipes.seg.weclip import Block, FusedSpec
from clipes.towers.side_by_side import CLIP, DINO


@dataclass(frozen=True)
class WeClipPlusSpec(FusedSpec):
    """Of WeCLIP+'s decoder, whose blocks both towers share.

    Attributes:
        read: The tokens that are read: CLIP's after its last block but one, and DINOv2's.
    """

    kind: ClassVar[str] = "weclip-plus"

    read: tuple[TokenInput, ...] = ()

    @property
    def name(self) -> str:
        """The model's name, in a few words."""
        return f"WeCLIP+'s decoder on {' and '.join(self.inputs)}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tokens that the decoder reads, in order."""
        return tuple(one.name for one in self.read)

    def build(self) -> WeClipPlus:
        """Return the model with random weights, on the CPU."""
        return WeClipPlus(self)

    def problem(self) -> str:
        """Return why no such model can be built; empty if one can."""
        towers = [one.name.split(".")[0] for one in self.read]
        if towers != [CLIP, DINO]:
            return f"its decoder reads {', '.join(towers) or 'no tower'}"
        return self.size_problem([one.width for one in self.read], [])


class WeClipPlus(Model):
    """Reads the tokens of two towers, lets patches attend to each other, scores labels twice.

    Attributes:
        spec: What it was built from.
    """

    spec: WeClipPlusSpec

    def __init__(self, spec: WeClipPlusSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.readers = nn.ModuleList(
            nn.Sequential(nn.Linear(one.width, width), nn.ReLU(), nn.Linear(width, width))
            for one in spec.read
        )
        self.fuse = nn.ModuleList(nn.Linear(width, width) for _ in spec.read)
        self.dropout = nn.Dropout1d(spec.dropout)  # drops a channel at all patches of an image
        self.blocks = nn.Sequential(*(Block(width, spec.heads) for _ in range(spec.blocks)))
        self.classify = nn.Linear(width, value_count(len(spec.classes)))

    def forward(self, clip: Tensor, dino: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what patches show to each tower, and which of them belong together.

        Args:
            clip: (B, h, w, D) of CLIP.
            dino: (B, h', w', D') of DINOv2, brought to the grid of CLIP once they are read.

        Returns:
            Logits (B, 1 + C, h, w) of background and classes by CLIP and by DINOv2, and the
            affinity (B, N, N) in (0, 1) of N = h * w patches, float32: sigmoid of the products of
            what was read of both, side by side.
        """
        grid = (clip.shape[1], clip.shape[2])
        fused = [
            self._read(number, tokens, grid).flatten(2)
            for number, tokens in enumerate((clip, dino))
        ]
        logits = [self.classify(self.blocks(one.mT)).mT.unflatten(2, grid) for one in fused]
        with torch.autocast(clip.device.type, enabled=False):
            exact = torch.cat(fused, 1).float()
            affinity = (exact.mT @ exact).sigmoid()
        return logits[0], logits[1], affinity

    def _read(self, number: int, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return (B, width, h, w) of a tower's tokens (B, h', w', D)."""
        read = self.fuse[number](self.readers[number](tokens.float().flatten(1, 2)))
        dropped = self.dropout(read.mT)
        return resize(dropped.unflatten(2, (tokens.shape[1], tokens.shape[2])), grid)

    def score(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return the logits (1, 1 + C, h, w) of one image, the mean of both towers'.

        Args:
            tokens: (h, w, D) of each of ``spec.inputs``; each may have a grid of its own.
        """
        clip, dino, _ = self(*(tokens[name][None] for name in self.spec.inputs))
        return mean_of_both(clip, dino)


def mean_of_both(clip: Tensor, dino: Tensor) -> Tensor:
    """Return the answer of two towers of the same shape."""
    return (clip.float() + dino.float()) / 2
