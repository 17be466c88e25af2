"""DeepLab: a dilated backbone and a head that looks at several ranges at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabHead

from clipes.choices import Arch, SegmenterBackbone
from clipes.config import OUTPUT_STRIDES
from clipes.masks.values import value_count
from clipes.seg.backbones import build_backbone
from clipes.seg.recipes import Model, Spec
from clipes.seg.resize import resize

_RATES_V2 = (6, 12, 18, 24)
_RATES_V3 = (12, 24, 36)  # at output stride 8; halved at 16, as in the DeepLab-v3 paper
_LOW_CHANNELS = 48  # DeepLab-v3+ paper, section 4.1
_WIDTH = 256
_PLUS_STRIDE = 4  # that of the low-level features


@dataclass(frozen=True)
class DeepLabSpec(Spec):
    """What has to be known to build a DeepLab for its weights.

    Attributes:
        arch: One of ``clipes.choices.Arch``.
        backbone: One of ``clipes.choices.SegmenterBackbone``.
        output_stride: Pixels of the image per feature: 8, 16 or 32.
        classes: Class names in mask order, without the background.
    """

    kind: ClassVar[str] = "deeplab"

    arch: str
    backbone: str
    output_stride: int
    classes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The model's name, in a few words."""
        return f"{self.arch} on {self.backbone}"

    @property
    def stride(self) -> int:
        """Pixels of the image per logit."""
        return _PLUS_STRIDE if self.arch == Arch.deeplabv3plus else self.output_stride

    def build(self) -> DeepLab:
        """Return the model with random weights, on the CPU."""
        return DeepLab(self)

    def problem(self) -> str:
        """Return why no such model can be built; empty if one can."""
        known = (
            self.arch in Arch.names()
            and self.backbone in SegmenterBackbone.names()
            and self.output_stride in OUTPUT_STRIDES
        )
        return "" if known else f"there is no {self.name} with output stride {self.output_stride}"


class DeepLab(Model):
    """A backbone and a head that scores background and classes.

    Attributes:
        spec: What it was built from.
    """

    spec: DeepLabSpec

    def __init__(self, spec: DeepLabSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = build_backbone(spec.backbone, spec.output_stride)
        channels, labels = self.backbone.channels, value_count(len(spec.classes))
        self.head: nn.Module
        if spec.arch == Arch.deeplabv2:
            self.head = SummedAspp(channels, labels)
        elif spec.arch == Arch.deeplabv3:
            self.head = DeepLabHead(channels, labels, _rates_v3(spec.output_stride))
        elif spec.arch == Arch.deeplabv3plus:
            self.head = PlusHead(channels, self.backbone.low_channels, labels, spec.output_stride)
        else:
            raise ValueError(f"no architecture {spec.arch}")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of background and classes.

        Args:
            images: (N, 3, H, W) RGB, normalised with ImageNet's mean and deviation.

        Returns:
            (N, 1 + C, h, w) with H / h = W / w = ``spec.stride``, rounded up.
        """
        low, features = self.backbone(images)
        logits: Tensor = (
            self.head(low, features) if isinstance(self.head, PlusHead) else self.head(features)
        )
        return logits


class SummedAspp(nn.Module):
    """DeepLab-v2's head: dilated 3 x 3 convolutions at four rates, summed."""

    def __init__(self, channels: int, labels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        for rate in _RATES_V2:
            branch = nn.Conv2d(channels, labels, 3, padding=rate, dilation=rate)
            nn.init.normal_(branch.weight, std=0.01)
            branch.bias = nn.Parameter(torch.zeros(labels))
            self.branches.append(branch)

    def forward(self, features: Tensor) -> Tensor:
        """Return (N, labels, h, w) logits of (N, C, h, w) features."""
        return torch.stack([branch(features) for branch in self.branches]).sum(0)


class PlusHead(nn.Module):
    """DeepLab-v3+'s decoder: ASPP features, enlarged and sharpened by low-level ones."""

    def __init__(self, channels: int, low_channels: int, labels: int, output_stride: int) -> None:
        super().__init__()
        self.aspp = ASPP(channels, _rates_v3(output_stride), _WIDTH)
        self.low = _conv_norm_relu(low_channels, _LOW_CHANNELS, 1)
        self.fuse = nn.Sequential(
            _conv_norm_relu(_WIDTH + _LOW_CHANNELS, _WIDTH, 3), _conv_norm_relu(_WIDTH, _WIDTH, 3)
        )
        self.classify = nn.Conv2d(_WIDTH, labels, 1)

    def forward(self, low: Tensor, features: Tensor) -> Tensor:
        """Return (N, labels, H / 4, W / 4) logits."""
        wide = resize(self.aspp(features), (low.shape[2], low.shape[3]))
        logits: Tensor = self.classify(self.fuse(torch.cat([wide, self.low(low)], dim=1)))
        return logits


class MultiScale(nn.Module):
    """Shows a segmenter its images at several scales, as DeepLab-v2 is trained.

    Args:
        model: The segmenter.
        scales: Factors of the input's size; the first is 1.
    """

    def __init__(self, model: DeepLab, scales: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.scales = tuple(scales)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits at each scale and, of several, their maximum at the first's size."""
        size = (images.shape[2], images.shape[3])
        logits = [
            self.model(images if scale == 1 else resize(images, _scaled(size, scale)))
            for scale in self.scales
        ]
        if len(logits) == 1:
            return logits
        full = (logits[0].shape[2], logits[0].shape[3])
        same = [logits[0], *(resize(other, full) for other in logits[1:])]
        return [*logits, torch.stack(same).amax(0)]


def branch_sizes(
    spec: DeepLabSpec, scales: Sequence[float], size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Return the heights and widths of what ``MultiScale`` returns for images of ``size``."""
    scaled = [_scaled(size, scale) for scale in scales]
    sizes = [(-(-height // spec.stride), -(-width // spec.stride)) for height, width in scaled]
    return sizes if len(sizes) == 1 else [*sizes, sizes[0]]


def freeze_norms(module: nn.Module) -> None:
    """Keep every batch normalisation below ``module`` at its statistics, scale and shift."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()
            for parameter in child.parameters():
                parameter.requires_grad = False


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, int(size[0] * scale)), max(1, int(size[1] * scale))


def _rates_v3(output_stride: int) -> list[int]:
    return [max(1, rate * 8 // output_stride) for rate in _RATES_V3]


def _conv_norm_relu(inputs: int, outputs: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
