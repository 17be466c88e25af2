"""How DeepLab is trained: SGD at a polynomial rate on random views, at several scales at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from clipes.choices import Arch
from clipes.config import IMAGENET_MEAN, IMAGENET_STD, SegmenterPreset
from clipes.errors import UsageError
from clipes.masks.values import value_count
from clipes.seg.data import TrainingPair, TrainingSet
from clipes.seg.deeplab import DeepLab, DeepLabSpec, MultiScale, branch_sizes, freeze_norms
from clipes.seg.loss import Guidance, branch_targets, weighted_loss
from clipes.seg.panels import SHOWN, below_each_other, row
from clipes.seg.recipes import Batch, Part, Recipe
from clipes.seg.resize import shrink
from clipes.seg.weights import load_backbone
from clipes.types import IGNORE, UInt8Array


@dataclass(frozen=True)
class Views(Part):
    """Views on their way through the network.

    Attributes:
        labels: (N, H, W) int64, what they are trained on.
        targets: Labels and weights, (N, h, w), of each branch of the logits.
    """

    labels: Tensor
    targets: Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DeepLabRecipe(Recipe[DeepLab, Views]):
    """DeepLab's recipe.

    Attributes:
        preset: Model, views, rates.
        classes: Class names in mask order.
        guidance: How confidence counts.
    """

    made = DeepLabSpec

    preset: SegmenterPreset
    classes: tuple[str, ...]
    guidance: Guidance = field(default_factory=Guidance)

    @property
    def reads_labels(self) -> bool:
        """Whether the labels of an image change what is learnt: they say what is drawn evenly."""
        return self.preset.even_classes

    @property
    def spec(self) -> DeepLabSpec:
        """What the model is built from."""
        preset = self.preset
        return DeepLabSpec(preset.arch, preset.backbone, preset.output_stride, self.classes)

    def check_part(self, images: int) -> None:
        """Refuse single images where a batch is normalised together."""
        if images == 1 and self.preset.arch != Arch.deeplabv2:
            raise UsageError(
                f"{self.preset.arch} normalises over a batch and cannot learn from one image at a "
                "time",
                "use a larger --batch, or --arch deeplabv2",
            )

    def initialise(self, model: DeepLab, source: str, say: Callable[[str], None]) -> DeepLabRecipe:
        """Load the backbone; random normalisation is not worth freezing."""
        origin = load_backbone(model.backbone, self.preset.backbone, source, say=say)
        return self if origin != "none" else self._with_norms(frozen=False)

    def state(self) -> Mapping[str, Any]:
        """Return whether the backbone's normalisation stays."""
        return {"freeze_norms": self.preset.freeze_norms}

    def resume(self, state: Mapping[str, Any]) -> DeepLabRecipe:
        """Return the recipe whose ``state`` a checkpoint holds."""
        return self._with_norms(frozen=bool(state.get("freeze_norms")))

    def network(self, model: DeepLab) -> MultiScale:
        """Return the model at the training scales."""
        model.train()
        if self.preset.freeze_norms:
            freeze_norms(model.backbone)
        return MultiScale(model, self.preset.train_scales)

    def optimizer(self, model: DeepLab) -> SGD:
        """Return SGD on three groups: backbone, the head's weights, the head's biases.

        As in DeepLab's Caffe recipe, biases learn twice as fast as weights and do not decay.
        """
        preset, head = self.preset, list(model.head.named_parameters())
        weights = [parameter for name, parameter in head if not name.endswith("bias")]
        biases = [parameter for name, parameter in head if name.endswith("bias")]
        trained = [one for one in model.backbone.parameters() if one.requires_grad]
        decay = preset.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": trained, "factor": 1.0, "weight_decay": decay},
            {"params": weights, "factor": preset.head_lr, "weight_decay": decay},
            {"params": biases, "factor": 2 * preset.head_lr, "weight_decay": 0.0},
        ]
        return SGD(groups, lr=preset.lr, momentum=preset.momentum)

    def rate(self, iteration: int) -> float:
        """Return the backbone's learning rate."""
        left = 1 - iteration / self.preset.iterations
        return self.preset.lr * math.pow(left, self.preset.power)

    def examples(self, pairs: Sequence[TrainingPair], seed: int) -> TrainingSet:
        """Return random views: image (3, H, W), labels (H, W), confidence (H, W)."""
        return TrainingSet(pairs, value_count(len(self.classes)), self.preset, seed)

    def part(self, batch: Batch) -> Views:
        """Return views with the targets of each branch."""
        images, labels, confidence = batch
        cut, weights = self.guidance.weigh(labels, confidence)
        side = self.preset.crop
        sizes = branch_sizes(self.spec, self.preset.train_scales, (side, side))
        targets = branch_targets(cut, weights, sizes)
        return Views(
            (images,),
            torch.stack([weight.sum() for _, weight in targets]),
            (labels != IGNORE).sum(),
            (cut != IGNORE).sum(),
            cut,
            targets,
        )

    def losses(self, outputs: Sequence[Tensor], part: Views) -> list[Tensor]:
        """Return the weighted cross-entropy of each branch."""
        return [
            weighted_loss(logits, labels, weights)
            for logits, (labels, weights) in zip(outputs, part.targets, strict=True)
        ]

    def answers(self, outputs: Sequence[Tensor], part: Views) -> list[tuple[Tensor, Tensor]]:
        """Return labels and answer of each view, at its size."""
        size = (part.labels.shape[1], part.labels.shape[2])
        return list(zip(part.labels, shrink(outputs[0].argmax(1), size), strict=True))

    def picture(self, outputs: Sequence[Tensor], part: Views) -> UInt8Array:
        """Return rows of view, trained labels and answer, side by side: (n H, 3 W, 3) uint8."""
        images = part.inputs[0][:SHOWN]
        colours = images.cpu() * torch.tensor(IMAGENET_STD)[:, None, None]
        colours = (colours + torch.tensor(IMAGENET_MEAN)[:, None, None]).clamp(0, 1) * 255
        views = colours.round().byte().permute(0, 2, 3, 1).numpy()
        pairs = zip(views, self.answers(outputs, part), strict=False)
        return below_each_other([row(pair, view) for view, pair in pairs])

    def _with_norms(self, *, frozen: bool) -> DeepLabRecipe:
        return replace(self, preset=replace(self.preset, freeze_norms=frozen))
