"""Image classifiers of torchvision as dense feature extractors.

Parameter names stay those of torchvision's classifiers, so their checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torchvision
from torch import Tensor, nn

from clipes.choices import SegmenterBackbone
from clipes.config import OUTPUT_STRIDES

_CLASSIFIERS = ("avgpool", "fc", "classifier")
_LOW_LEVEL = {"resnet": 4, "mobilenet": 3}  # the last step at a quarter of the input's size


class Features(nn.Module):
    """The layers of a classifier in front of its pooling, with strides turned into dilation.

    Attributes:
        channels: Channels of the features.
        low_channels: Channels of the low-level features.
    """

    def __init__(self, classifier: nn.Module, low_step: int) -> None:
        super().__init__()
        for name, child in classifier.named_children():
            if name not in _CLASSIFIERS:
                self.add_module(name, child)
        self._low_step = low_step
        steps = list(self.steps())
        self.channels = _last_width(steps)
        self.low_channels = _last_width(steps[: low_step + 1])

    def steps(self) -> Iterator[nn.Module]:
        """Yield the modules that an image runs through, one after the other."""
        for name, child in self.named_children():
            if name == "features":
                yield from child.children()
            else:
                yield child

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return low-level and final features.

        Args:
            images: (N, 3, H, W) RGB, normalised with ImageNet's mean and deviation.

        Returns:
            (N, c, H / 4, W / 4) and (N, C, H / s, W / s) at output stride s, sizes rounded up.
        """
        low = features = images
        for index, step in enumerate(self.steps()):
            features = step(features)
            if index == self._low_step:
                low = features
        return low, features


def build_backbone(name: str, output_stride: int) -> Features:
    """Return a backbone with random weights.

    Args:
        name: One of ``clipes.choices.SegmenterBackbone``.
        output_stride: Pixels of the image per feature, one of ``OUTPUT_STRIDES``.

    Raises:
        ValueError: One of the two is not known.
    """
    if name not in SegmenterBackbone.names() or output_stride not in OUTPUT_STRIDES:
        raise ValueError(f"no backbone {name} of output stride {output_stride}")
    classifier = torchvision.models.get_model(name.removesuffix("_v1"), weights=None)
    if name.endswith("_v1"):
        _stride_first(classifier)
    backbone = Features(classifier, _LOW_LEVEL["mobilenet" if "mobile" in name else "resnet"])
    _dilate(backbone, output_stride)
    return backbone


def _stride_first(resnet: nn.Module) -> None:
    for module in resnet.modules():
        if isinstance(module, torchvision.models.resnet.Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride


def _dilate(backbone: Features, output_stride: int) -> None:
    """Take out the strides beyond ``output_stride`` and spread later kernels instead.

    Every second (fourth) feature is then what the strided network computes: weights keep their
    meaning. torchvision's own options do not cover BasicBlock, the ``_v1`` layout or MobileNet at
    stride 8.
    """
    stride, rate, dense = 1, 1, False
    for step in backbone.steps():
        if isinstance(step, nn.MaxPool2d):
            stride *= 2
        for name, module in step.named_modules():
            if not isinstance(module, nn.Conv2d):
                continue
            size = module.kernel_size[0]
            module.dilation = (rate, rate)
            module.padding = (rate * (size // 2), rate * (size // 2))
            if module.stride == (1, 1):
                continue
            if "downsample" in name:  # runs beside the block's convolutions, which come first
                module.stride = (1, 1) if dense else module.stride
                continue
            dense = stride >= output_stride
            if dense:
                module.stride = (1, 1)
                rate *= 2
            else:
                stride *= 2


def _last_width(steps: list[nn.Module]) -> int:
    widths = [
        module.num_features
        for step in steps
        for module in step.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    return widths[-1]
