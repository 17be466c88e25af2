"""A segmenter small enough for a test to train, and data for it without files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipes.seg.backbones import Features
from clipes.seg.deeplab import DeepLab, DeepLabSpec, SummedAspp
from clipes.seg.recipes import Batch, Examples

SIDE = 32
SPEC = DeepLabSpec("deeplabv2", "resnet18", 8, ("a", "b"))


class TinyBackbone(Features):
    """Two strided convolutions in the place of a ResNet's hundred."""

    def __init__(self, channels: int) -> None:
        nn.Module.__init__(self)
        self.conv1 = nn.Conv2d(3, channels, 5, stride=4, padding=2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low = self.bn1(self.conv1(images)).relu()
        return low, self.conv2(low).relu()


class TinySegmenter(DeepLab):
    """DeepLab-v2 on a ``TinyBackbone``; everything but its layers is the real thing."""

    def __init__(self, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.spec = SPEC
        self.backbone = TinyBackbone(8)
        self.head = (
            nn.Sequential(nn.Dropout(dropout), SummedAspp(8, 3)) if dropout else SummedAspp(8, 3)
        )


class Views(Examples):
    """Random views by position; ``label`` makes every pixel the same."""

    def __init__(self, label: int | None = None) -> None:
        self._label = label

    def __getitem__(self, position: int) -> Batch:
        generator = torch.Generator().manual_seed(position)
        image = torch.randn(3, SIDE, SIDE, generator=generator)
        labels = torch.randint(0, 3, (SIDE, SIDE), generator=generator)
        if self._label is not None:
            labels.fill_(self._label)
        return image, labels, torch.rand(SIDE, SIDE, generator=generator)
