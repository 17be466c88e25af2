"""The labels that WeCLIP learns, made as it learns: by frozen CLIP, refined by what was learnt.

CLIP looks at a view once, for the tokens that the decoder reads as well as for GradCAM and
attention. Shapes: B views, N = h * w patches, M blocks, K classes in a view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipes.config import CamParams, WeClipPreset
from clipes.maps.affinity import propagate, sinkhorn
from clipes.maps.evidence import gradient_sources
from clipes.maps.rfm import refined_attention
from clipes.maps.vectors import WordVectors
from clipes.masks.par import par
from clipes.masks.values import value_of
from clipes.seg.resize import resize
from clipes.towers.clip import Backbone
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
        """How many blocks a decoder reads: all but the last."""
        return self.clip.depth - 1

    @property
    def channels(self) -> int:
        """D, of the tokens."""
        return len(self.clip.visual.class_embedding)

    def look(
        self, views: Tensor, present: Tensor, preset: WeClipPreset
    ) -> tuple[Tensor, list[Seen]]:
        """Look at views of one size.

        Args:
            views: (B, 3, H, W) float32, normalised.
            present: (B, C) bool, the classes of each image; one at least.
            preset: Says how many blocks' attention is needed.

        Returns:
            The tokens (B, L, h, w, D) of all blocks but the last, and what is seen in each view.
        """
        blocks = max(preset.affinity_blocks, preset.refine_blocks)
        taps = Taps(
            tokens=tuple(range(1, 1 + self.layers)),
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


@torch.no_grad()
def make_labels(
    seen: Sequence[Seen], views: Tensor, affinity: Tensor | None, preset: WeClipPreset
) -> Tensor:
    """Return the labels of views: (B, H, W) int64, 0 background, 1..C classes that are present.

    Args:
        seen: What CLIP says of each.
        views: (B, 3, H, W) float32.
        affinity: (B, N, N) learnt, in [0, 1]; None for CLIP's attention alone.
        preset: Settings.
    """
    # Called where the network runs, perhaps at lower precision.
    with torch.autocast(views.device.type, enabled=False):
        learnt = [None] * len(seen) if affinity is None else list(affinity)
        return torch.stack(
            [_labels(*parts, preset) for parts in zip(seen, views, learnt, strict=True)]
        )


def _labels(seen: Seen, view: Tensor, affinity: Tensor | None, preset: WeClipPreset) -> Tensor:
    """Return the labels (H, W) of a view (3, H, W)."""
    params = CamParams(box_threshold=preset.box_threshold, last_row_in_box=False)
    if affinity is None:
        attention = seen.attention[-preset.affinity_blocks :].mean(0)
    else:
        candidates = seen.attention[-preset.refine_blocks :]
        attention = refined_attention(candidates, affinity, absolute=preset.refine_absolute)
    walk = sinkhorn(attention, params.sinkhorn_iterations)
    refined = torch.from_numpy(propagate(walk, seen.sources, params, params.walk_power))
    maps = resize(refined[None].to(view.device), (view.shape[1], view.shape[2]))[0]
    scores = torch.cat([1 - maps.amax(0, keepdim=True), maps])
    values = torch.cat([seen.values.new_zeros(1), seen.values])
    return values[par(view, scores).argmax(0)]
