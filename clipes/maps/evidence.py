"""What an image says before anything is learnt from a run: one pass of the towers, two methods.

``by_gradient`` is the paper's softmax-GradCAM (section 3.1), ``by_patches`` compares patches with
words. Which of them a preset means is chosen once, by ``evidence_of``; both leave an activation map
of every class and what patches have to do with one another. Shapes as in ``clipes.towers.taps``; K
classes present in an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipes.config import CamParams, PatchParams
from clipes.maps.affinity import TiledWalk, Walk, joint_walk, propagate, sinkhorn
from clipes.maps.gradcam import softmax_gradcam
from clipes.maps.patches import compare, patch_features
from clipes.maps.vectors import WordVectors
from clipes.masks.mosaic import Tiles, Window
from clipes.towers.clip import Backbone
from clipes.towers.side_by_side import CLIP, TokenTower, Towers
from clipes.towers.taps import Grid, LastBlock, Taps
from clipes.types import Float32Array

FINE = "fine"
"""Name of the pixels for a closer look of a tower, beside the names of towers."""

Pixels: TypeAlias = Mapping[str, Tensor]
"""(B, 3, H, W) of images of one size, by the name of the tower that they were prepared for."""

EvidenceOf: TypeAlias = Callable[[Pixels, Sequence[Sequence[int]]], "list[Evidence]"]
"""``encode(pixels, labels)``: labels of each image, 0-based, in the order of the names."""


@dataclass(frozen=True)
class Evidence:
    """What an image says.

    Attributes:
        sources: (K, h, w) float32 in [0, 1], where the maps spread from.
        attention: (N, N) CLIP's, mean over heads and over the last blocks, up to a factor.
    """

    sources: Float32Array
    attention: Tensor


@dataclass(frozen=True)
class CloserLook:
    """What a tower sees on two grids, half way up; see ``clipes.maps.finer``.

    Attributes:
        tokens: (N, D) float16, of the patches of the grid.
        fine: (h', w', D) float16, of those of a finer one.
    """

    tokens: Tensor
    fine: Tensor


@dataclass(frozen=True)
class PatchEvidence(Evidence):
    """What an image says when its patches are compared with words, and can be learnt from.

    What is large is rounded to float16 at once, so that maps do not depend on whether it was kept
    from one round to the next or made again.

    Attributes:
        tokens: (N, D) float16 of each tower, by its name; CLIP's after ``ln_1`` of the last block.
        log_words: (1 + K, N) float32, log-probability of the background and of each class.
        tiles: Of a picture that was looked at in tiles, those, in patches: ``attention`` is (T, n,
            n) then, of n patches in each of T tiles. None for a picture that was seen whole.
        closer: A closer look; None without one.
    """

    tokens: Mapping[str, Tensor]
    log_words: Tensor
    tiles: Tiles | None = None
    closer: CloserLook | None = None

    @property
    def grid(self) -> Grid:
        """(h, w) of the patches."""
        height, width = self.sources.shape[1:]
        return height, width

    def of(self, towers: Sequence[str]) -> Tensor:
        """Return the tokens of some towers side by side: (N, D) float32."""
        return torch.cat([self.tokens[name].float() for name in towers], 1)

    def of_tile(self, number: int, tile: Window) -> PatchEvidence:
        """Return what a tile says, by its number and its place."""
        tokens = {
            name: part.unflatten(0, self.grid)[tile].flatten(0, 1)
            for name, part in self.tokens.items()
        }
        words = self.log_words.unflatten(1, self.grid)[:, tile[0], tile[1]].flatten(1)
        return PatchEvidence(
            self.sources[:, tile[0], tile[1]], self.attention[number], tokens, words
        )

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all of it as arrays, to be kept."""
        tokens = {f"tokens.{name}": part for name, part in self.tokens.items()}
        tensors = {"attention": self.attention, "log_words": self.log_words, **tokens}
        if self.closer is not None:
            tensors |= {"near": self.closer.tokens, "fine": self.closer.fine}
        side = {} if self.tiles is None else {"side": np.array(self.tiles.side)}
        arrays = {k: part.cpu().numpy() for k, part in tensors.items()}
        return {"sources": self.sources, **side, **arrays}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, npt.NDArray[Any]], device: torch.device
    ) -> PatchEvidence:
        """Return what ``to_arrays`` was made of, on a device."""
        tensors = {
            name: torch.from_numpy(array).to(device)
            for name, array in arrays.items()
            if name not in ("sources", "side")
        }
        tokens = {
            name.removeprefix("tokens."): part
            for name, part in tensors.items()
            if name.startswith("tokens.")
        }
        sources, tiles = arrays["sources"], None
        if "side" in arrays:
            tiles = Tiles.of((sources.shape[1], sources.shape[2]), int(arrays["side"]))
        closer = CloserLook(tensors["near"], tensors["fine"]) if "fine" in tensors else None
        seen = tensors["attention"], tokens, tensors["log_words"]
        return cls(sources, *seen, tiles, closer)


def evidence_of(towers: Towers, vectors: WordVectors, params: CamParams) -> EvidenceOf:
    """Return what turns images into evidence with the settings of a preset."""
    method = by_gradient if params.patches is None else by_patches
    return partial(method, towers, vectors, params)


def by_gradient(
    towers: Towers,
    vectors: WordVectors,
    params: CamParams,
    pixels: Pixels,
    labels: Sequence[Sequence[int]],
) -> list[Evidence]:
    """Return the evidence of the paper's method.

    Args:
        towers: CLIP alone is asked.
        vectors: The words.
        params: Settings.
        pixels: Of B images.
        labels: Of each of them, 0-based, in the order of the names.
    """
    clip = towers.clip
    taps = Taps(attention=clip.last_blocks(params.affinity_blocks), last="gradient")
    encoded = clip.encode(pixels[CLIP], taps)
    return [
        Evidence(gradient_sources(clip, vectors, last, encoded.grid, chosen), attention)
        for last, chosen, attention in zip(
            encoded.gradients, labels, encoded.attention, strict=True
        )
    ]


def gradient_sources(
    clip: Backbone, vectors: WordVectors, last: LastBlock, grid: Grid, labels: Sequence[int]
) -> Float32Array:
    """Return the softmax-GradCAM of an image's classes: (K, h, w) in [0, 1].

    Args:
        clip: The tower.
        vectors: The words.
        last: Of the image, from ``clip``.
        grid: Of the image.
        labels: (K,) 0-based, in the order of the names.
    """
    make = partial(softmax_gradcam, clip, last, grid)
    return vectors.fused(make(vectors.of(labels), vectors.background), make, labels)


def by_patches(
    towers: Towers,
    vectors: WordVectors,
    params: CamParams,
    pixels: Pixels,
    labels: Sequence[Sequence[int]],
) -> list[Evidence]:
    """Return the evidence of patches compared with words; arguments as for ``by_gradient``."""
    assert params.patches is not None
    found: list[Evidence] = []
    for seen, chosen in zip(look(towers, params, pixels), labels, strict=True):
        sources, log_words = compared(
            seen.features, vectors, chosen, seen.grid, params.patches.temperature
        )
        tokens = {name: _rounded(part) for name, part in seen.tokens.items()}
        found.append(PatchEvidence(sources, seen.attention, tokens, log_words, closer=seen.closer))
    return found


@dataclass(frozen=True)
class Seen:
    """What the towers see in an image before any word is said.

    Attributes:
        grid: (h, w) of the patches.
        features: What each patch shows, two ways; see ``patch_features``.
        tokens: (N, D) of each tower, by its name.
        attention: As in ``PatchEvidence``.
        closer: Likewise.
    """

    grid: Grid
    features: tuple[Tensor, Tensor]
    tokens: Mapping[str, Tensor]
    attention: Tensor
    closer: CloserLook | None = None


def look(towers: Towers, params: CamParams, pixels: Pixels) -> list[Seen]:
    """Return what the towers see in images of one size; arguments as for ``by_gradient``."""
    clip = towers.clip
    taps = Taps(attention=clip.last_blocks(params.affinity_blocks), last="inputs")
    encoded = clip.encode(pixels[CLIP], taps)
    tokens = {CLIP: encoded.last.activations}
    closer: Sequence[CloserLook | None] = [None] * len(encoded.last.activations)
    for name, tower in towers.others.items():
        if FINE in pixels and params.patches is not None and name == params.patches.likeness_of:
            tokens[name], closer = look_closer(tower, params.patches, pixels)
        else:
            tokens[name] = tower.encode(pixels[name])
    first, second = patch_features(clip, encoded.last)
    return [
        Seen(
            encoded.grid,
            (first[image], second[image]),
            {name: part[image] for name, part in tokens.items()},
            _rounded(encoded.attention[image] * len(first[image])),
            closer[image],
        )
        for image in range(len(first))
    ]


def look_closer(
    tower: TokenTower, patches: PatchParams, pixels: Pixels
) -> tuple[Tensor, list[CloserLook]]:
    """Return the final tokens (B, N, D) of a tower, and what it sees of each image on two grids.

    Args:
        tower: The one that ``patches`` says.
        patches: Settings.
        pixels: As for ``by_gradient``, and those for the closer look.
    """
    block = patches.finer_block
    near, final = tower.after(pixels[patches.likeness_of], (block, tower.depth))
    fine = _rounded(tower.closer(pixels[FINE], block, patches.finer_parts))
    return final, [CloserLook(*pair) for pair in zip(_rounded(near), fine, strict=True)]


def first_maps(evidence: Evidence, params: CamParams) -> Float32Array:
    """Spread what the words say over the objects: (K, h, w) float32 in [0, 1]."""

    def walk(part: Evidence) -> Walk:
        return sinkhorn(part.attention.float(), params.sinkhorn_iterations)

    return propagate(_tile_by_tile(walk, evidence), evidence.sources, params, params.walk_power)


def walk_of(evidence: PatchEvidence, params: CamParams, weight: float) -> Walk | TiledWalk:
    """Return the affinity of an image's patches.

    Args:
        evidence: The image.
        params: Settings.
        weight: Of the likeness of tokens; the rest is CLIP's attention.
    """
    assert params.patches is not None
    patches = params.patches

    def walk(part: PatchEvidence) -> Walk:
        alike = part.of((patches.likeness_of,)) if weight else None
        temperature, iterations = patches.likeness_temperature, params.sinkhorn_iterations
        return joint_walk(part.attention.float(), alike, weight, temperature, iterations)

    return _tile_by_tile(walk, evidence)


def _tile_by_tile(walk: Callable[[Any], Walk], evidence: Evidence) -> Walk | TiledWalk:
    if not isinstance(evidence, PatchEvidence) or evidence.tiles is None:
        return walk(evidence)
    return TiledWalk(
        evidence.tiles,
        lambda number, tile: walk(evidence.of_tile(number, tile)),
        evidence.attention.device,
    )


def compared(
    features: tuple[Tensor, Tensor],
    vectors: WordVectors,
    labels: Sequence[int],
    grid: Grid,
    temperature: float,
) -> tuple[Float32Array, Tensor]:
    """Compare what patches show with words; see ``compare``, and ``WordVectors.fused``.

    Args:
        features: As for ``compare``.
        vectors: The words.
        labels: (K,) 0-based, in the order of the names.
        grid: As for ``compare``.
        temperature: As for ``compare``.
    """

    def make(text: Tensor, background: Tensor) -> tuple[Float32Array, Tensor]:
        return compare(features, text, background, grid, temperature)

    maps, log_words = make(vectors.of(labels), vectors.background)
    return vectors.fused(maps, lambda *words: make(*words)[0], labels), log_words


def _rounded(part: Tensor) -> Tensor:
    return part.to(torch.float16)
