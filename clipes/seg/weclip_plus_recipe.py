"""How WeCLIP+ is trained: as WeCLIP, on two towers that teach each other, and in the end itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clipes.config import WeClipPlusPreset
from clipes.seg.frozen import TokenInput
from clipes.seg.weclip_labels import PlusTeacher, labels_of_the_sure, make_labels
from clipes.seg.weclip_loss import weclip_plus_loss
from clipes.seg.weclip_plus import WeClipPlus, WeClipPlusSpec, mean_of_both
from clipes.seg.weclip_recipe import SeenViews, ViewsRecipe
from clipes.towers.side_by_side import CLIP


@dataclass(frozen=True)
class WeClipPlusRecipe(ViewsRecipe[WeClipPlus]):
    """WeCLIP+'s recipe.

    Attributes:
        preset: As for WeCLIP, and when the decoder labels what it is sure of.
    """

    made = WeClipPlusSpec

    preset: WeClipPlusPreset

    @property
    def both(self) -> PlusTeacher:
        """Both towers and the words."""
        if not isinstance(self.teacher, PlusTeacher):
            raise TypeError(f"preset {self.preset.name} reads two towers")
        return self.teacher

    @property
    def spec(self) -> WeClipPlusSpec:
        """What the model is built from."""
        teacher = self.both
        read = (
            TokenInput(f"{CLIP}.{teacher.layers}", teacher.channels),
            TokenInput(teacher.dino.name, teacher.dino.width),
        )
        return WeClipPlusSpec(
            self.classes,
            read=read,
            side=self.preset.side,
            normalise=self.preset.normalise,
            digests=dict(teacher.digests),
        )

    def _later(self) -> list[tuple[int, str]]:
        sure = (self.preset.sure_from, "pixels that the decoder is sure of have its answer")
        return [*super()._later(), sure]

    def _inputs(self, tokens: Tensor, views: Tensor) -> tuple[Tensor, ...]:
        return tokens[:, 0], self.both.look_again(views)

    def _answer(self, outputs: Sequence[Tensor]) -> Tensor:
        clip, dino, _ = outputs
        return mean_of_both(clip, dino)

    def _labels(self, outputs: Sequence[Tensor], part: SeenViews) -> tuple[Tensor, Tensor]:
        preset, logits = self.preset, self._answer(outputs).detach()
        refined = part.updates >= preset.refine_from
        affinity, probs = (outputs[2].detach(), logits.softmax(1)) if refined else (None, None)
        cams = make_labels(part.seen, part.views, affinity, preset, probs)
        if part.updates < preset.sure_from:
            return cams, cams
        return cams, labels_of_the_sure(cams, logits, preset.sure)

    def _loss(self, outputs: Sequence[Tensor], cams: Tensor, labels: Tensor) -> Tensor:
        clip, dino, affinity = outputs
        return weclip_plus_loss(clip, dino, affinity, cams, labels)
