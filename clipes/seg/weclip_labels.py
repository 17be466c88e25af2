"""The labels that WeCLIP and WeCLIP+ learn, made as they learn: by frozen CLIP, refined by these.

CLIP looks at a view once, for the tokens that the decoder reads as well as for GradCAM and
attention. Shapes: B views, N = h * w patches, M blocks, K classes in a view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipes.config import IMAGENET_MEAN, IMAGENET_STD, CamParams, WeClipPlusPreset, WeClipPreset
from clipes.maps.affinity import boxed, sinkhorn, walked
from clipes.maps.evidence import gradient_sources
from clipes.maps.gradcam import min_max
from clipes.maps.rfm import refined_attention
from clipes.maps.vectors import WordVectors
from clipes.masks.par import par
from clipes.masks.values import value_of
from clipes.seg.resize import resize
from clipes.towers.clip import Backbone
from clipes.towers.dinov2 import DinoTower
from clipes.towers.taps import Taps
from clipes.types import Float32Array


@dataclass(frozen=True)
class Seen:
    """What frozen CLIP says of a view, whatever is learnt.

    Attributes:
        values: (K,) int64 mask values of its classes.
        sources: (K, h, w) float32 in [0, 1], GradCAM of these classes.
        attention: (M, N, N) of the last blocks, heads averaged.
    """

    values: Tensor
    sources: Float32Array
    attention: Tensor


@dataclass(frozen=True)
class Teacher:
    """Frozen CLIP and the words of a run.

    Attributes:
        clip: The tower.
        vectors: The words.
        mean: Channel means that are taken off a view, RGB in [0, 1].
        std: Channel deviations, likewise.
        digests: sha256 of the towers' weights, by the name of the tower.
    """

    clip: Backbone
    vectors: WordVectors
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digests: Mapping[str, str]

    @property
    def layers(self) -> int:
        """How many blocks there are but the last; WeCLIP reads all of them, WeCLIP+ the last."""
        return self.clip.depth - 1

    @property
    def channels(self) -> int:
        """D, of the tokens."""
        return len(self.clip.visual.class_embedding)

    @property
    def read(self) -> tuple[int, ...]:
        """The blocks that a decoder reads."""
        return tuple(range(1, 1 + self.layers))

    def look(
        self, views: Tensor, present: Tensor, preset: WeClipPreset
    ) -> tuple[Tensor, list[Seen]]:
        """Look at views of one size.

        Args:
            views: (B, 3, H, W) float32, normalised.
            present: (B, C) bool, the classes of each image; one at least.
            preset: Says how many blocks' attention is needed.

        Returns:
            The tokens (B, L, h, w, D) of the blocks that are read, and what is seen in each view.
        """
        blocks = max(preset.affinity_blocks, preset.refine_blocks)
        taps = Taps(
            tokens=self.read,
            attention=self.clip.last_blocks(blocks),
            each=True,
            last="gradient",
        )
        encoded = self.clip.encode(views, taps)
        # Stacked here, outside of inference mode, they may be learnt from.
        tokens = torch.stack([encoded.tokens[block][:, 1:] for block in taps.tokens], 1)
        seen = []
        for image, last in enumerate(encoded.gradients):
            labels = self.vectors.by_name(present[image].nonzero()[:, 0].tolist())
            values = torch.tensor([value_of(label) for label in labels], device=views.device)
            sources = gradient_sources(self.clip, self.vectors, last, encoded.grid, labels)
            seen.append(Seen(values, sources, encoded.attention[image]))
        return tokens.unflatten(2, encoded.grid), seen


@dataclass(frozen=True)
class PlusTeacher(Teacher):
    """CLIP, the words, and DINOv2 beside them.

    Attributes:
        dino: The second tower.
    """

    dino: DinoTower

    @property
    def read(self) -> tuple[int, ...]:
        """The one block of CLIP that a decoder reads: the last but one."""
        return (self.layers,)

    def look_again(self, views: Tensor) -> Tensor:
        """Return what DINOv2 sees of views (B, 3, H, W) as CLIP sees them: (B, h', w', D).

        It sees them on a grid of its own, of as many patches as fit.
        """
        own, theirs = (
            [torch.tensor(one, device=views.device)[:, None, None] for one in colours]
            for colours in ((self.mean, self.std), (IMAGENET_MEAN, IMAGENET_STD))
        )
        side = self.dino.patch
        grid = (views.shape[2] // side, views.shape[3] // side)
        coloured = (views * own[1] + own[0] - theirs[0]) / theirs[1]
        tokens = self.dino.encode(resize(coloured, (grid[0] * side, grid[1] * side)))
        # Copied outside of inference mode, they may be learnt from.
        copied: Tensor = tokens.clone().unflatten(1, grid)
        return copied


@torch.no_grad()
def make_labels(
    seen: Sequence[Seen],
    views: Tensor,
    affinity: Tensor | None,
    preset: WeClipPreset,
    probs: Tensor | None = None,
) -> Tensor:
    """Return the labels of views: (B, H, W) int64, 0 background, 1..C classes that are present.

    Args:
        seen: What CLIP says of each.
        views: (B, 3, H, W) float32.
        affinity: (B, N, N) learnt, in [0, 1]; None for CLIP's attention alone.
        preset: Settings.
        probs: (B, 1 + C, h, w), what the decoder takes patches for, which maps are multiplied by;
            None for maps of CLIP alone.
    """
    # Called where the network runs, perhaps at lower precision.
    with torch.autocast(views.device.type, enabled=False):
        learnt = [None] * len(seen) if affinity is None else list(affinity)
        taken = [None] * len(seen) if probs is None else list(probs.float())
        parts = zip(seen, views, learnt, taken, strict=True)
        return torch.stack([_labels(*part, preset) for part in parts])


@torch.no_grad()
def labels_of_the_sure(labels: Tensor, logits: Tensor, sure: float) -> Tensor:
    """Return labels, but of pixels of which the decoder is sure what it takes them for.

    Args:
        labels: (B, H, W) int64.
        logits: (B, 1 + C, h, w).
        sure: Probability above which it is.
    """
    size = (labels.shape[1], labels.shape[2])
    best = resize(logits.float(), size).softmax(1).max(1)
    return torch.where(best.values > sure, best.indices, labels)


def _labels(
    seen: Seen,
    view: Tensor,
    affinity: Tensor | None,
    probs: Tensor | None,
    preset: WeClipPreset,
) -> Tensor:
    """Return the labels (H, W) of a view (3, H, W)."""
    params = CamParams(box_threshold=preset.box_threshold, last_row_in_box=False)
    sources = seen.sources
    if not isinstance(preset, WeClipPlusPreset) or preset.boxes:
        sources = boxed(sources, params)  # of CLIP's maps alone, so that no class is lost for good
    if probs is not None:
        sources = sources * probs[seen.values].cpu().numpy()
    if affinity is None:
        attention = seen.attention[-preset.affinity_blocks :].mean(0)
    else:
        candidates = seen.attention[-preset.refine_blocks :]
        attention = refined_attention(candidates, affinity, absolute=preset.refine_absolute)
    walk = sinkhorn(attention, params.sinkhorn_iterations)
    refined = torch.from_numpy(min_max(walked(walk, sources, params.walk_power)))
    maps = resize(refined[None].to(view.device), (view.shape[1], view.shape[2]))[0]
    scores = torch.cat([1 - maps.amax(0, keepdim=True), maps])
    values = torch.cat([seen.values.new_zeros(1), seen.values])
    return values[par(view, scores).argmax(0)]
