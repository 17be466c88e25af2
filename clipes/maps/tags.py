"""What an image says of the classes of a vocabulary, where nobody said which it shows.

Three looks, all CLIP's. *Patches* of the whole image, as for maps, and those of a small copy, in
which values are mixed by how alike keys are (SCLIP, arXiv:2312.01597; ClearCLIP, arXiv:2407.12442),
say which classes may be there. *The image* as CLIP was trained to see it says what it is of. *The
box* around the patches of each class that may be there, cut out and enlarged, shows what is small
(as in TagCLIP, arXiv:2312.12828). Beside these log-odds stands what the patches of such a class
look like to DINOv2, for ``clipes.maps.tag_odds``, which decides over all images of a run.
Shapes as in ``clipes.towers.taps``; C classes, B background words, E the width of the features; K
candidates, D channels of DINOv2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from clipes.config import CamParams, TagParams
from clipes.maps.patches import compare, in_joint_space, patch_features
from clipes.towers.clip import Backbone
from clipes.towers.side_by_side import CLIP, DINO, Towers
from clipes.towers.taps import Encoded, LastInput, Taps
from clipes.types import Float32Array, Int64Array, UInt8Array
from clipes.words.features import TextFeatures

_LEAST = 1e-5  # probability: below it, one says no more than another
_SMALLEST_BOX = 48  # pixels: enlarged further, a cut-out is a blur


@dataclass(frozen=True)
class Candidates:
    """The classes that an image may show.

    Attributes:
        labels: (K,) 0-based, the likeliest first by its patches.
        patches: (K,) float32, log-odds by the patches alone.
        words: (K,) float32, weighted log-odds of all looks.
        regions: (K, D) float16, what the patches that show each best look like.
        background: (D,) float16, what those look like that show none.
    """

    labels: Int64Array
    patches: Float32Array
    words: Float32Array
    regions: Float32Array
    background: Float32Array


@torch.inference_mode()
def key_key_features(backbone: Backbone, last: LastInput) -> Tensor:
    """Return what each patch shows, in the space of the text features: (N, E) unit rows."""
    key, value = last.key[:, 1:], last.value[:, 1:]
    return in_joint_space(backbone, backbone.mix_patches(key, key, value))


class Tagger:
    """Finds the classes of a vocabulary that an image may show.

    Args:
        towers: CLIP, and DINOv2 beside it.
        text: Vectors of the classes and of the background words.
        params: Settings.
    """

    def __init__(self, towers: Towers, text: TextFeatures, params: TagParams) -> None:
        self._clip, self._dino = towers.clip, towers.others[DINO]
        self._towers = Towers(towers.clip, {DINO: self._dino})
        self._params = params
        device = towers.device
        self._classes = torch.from_numpy(text.class_vectors).to(device).float()
        self._background = torch.from_numpy(text.background_vectors).to(device).float()

    @torch.inference_mode()
    def __call__(self, image: UInt8Array) -> Candidates:
        """Look at ``image`` (H0, W0, 3) RGB uint8."""
        params = self._params
        pixels = self._towers.prepare(image, CamParams().max_patches)
        encoded = self._clip.encode(pixels[CLIP][None], Taps(last="inputs"))
        shown = self._shown(encoded)
        whole = self._look([image])
        patches = self._by_patches(shown, whole)
        count = params.count(len(self._classes))
        labels = patches.argsort(descending=True, stable=True)[:count]
        maps = shown[:, 1:][:, labels].T
        by_image = log_odds(self._probabilities(self._feature(whole))[0, labels])
        height, width = encoded.grid
        cuts = [
            cut_out(image, row.view(height, width).cpu().numpy(), params.box_margin) for row in maps
        ]
        boxes = self._probabilities(self._feature(self._look(cuts)))
        by_box = log_odds(boxes.gather(1, labels[:, None])[:, 0])
        words = (
            params.patches_weight * patches[labels]
            + params.image_weight * by_image
            + params.box_weight * by_box
        )
        tokens = self._dino.encode(pixels[DINO][None])[0]
        nothing = shown[:, 0]
        return Candidates(
            labels.cpu().numpy(),
            patches[labels].cpu().numpy(),
            words.cpu().numpy(),
            _halved(mean_shown(tokens, maps, params.region_share)),
            _halved(tokens[nothing >= min(params.nothing, float(nothing.max()))].mean(0)),
        )

    def _shown(self, encoded: Encoded) -> Tensor:
        """Return (N, 1 + C): how likely each patch shows no class, and each."""
        features = patch_features(self._clip, encoded.last.of(0))
        temperature = self._params.temperature
        _, shown = compare(features, self._classes, self._background, encoded.grid, temperature)
        return shown.exp().T

    def _by_patches(self, shown: Tensor, whole: Encoded) -> Tensor:
        """Return (C,) log-odds by the patches of the image, and by those of its small copy."""
        alike = self._probabilities(key_key_features(self._clip, whole.last.of(0)))
        large = log_odds(best_mean(shown[:, 1:], self._params.patch_share))
        return (large + log_odds(best_mean(alike, self._params.copy_share))) / 2

    def _look(self, images: Sequence[UInt8Array]) -> Encoded:
        """Look at images at the size that CLIP was trained with, whatever their shape."""
        side = self._clip.visual.grid_size
        pixels = [self._clip.prepare(image, 0, (int(side[0]), int(side[1]))) for image in images]
        return self._clip.encode(
            torch.stack(pixels), Taps(tokens=(self._clip.depth,), last="inputs")
        )

    def _feature(self, encoded: Encoded) -> Tensor:
        """Return (B, E) unit rows: the images, as CLIP was trained to compare them with texts."""
        visual = self._clip.visual
        token = encoded.tokens[self._clip.depth][:, 0]
        return F.normalize((visual.ln_post(token) @ visual.proj).float(), dim=-1)

    def _probabilities(self, features: Tensor) -> Tensor:
        """Compare (N, E) with all words: (N, C) probabilities of the classes."""
        words = torch.cat([self._classes, self._background])
        logits = self._clip.logit_scale * (features @ words.T)
        return logits.softmax(-1)[:, : len(self._classes)]


def best_mean(probabilities: Tensor, share: float) -> Tensor:
    """Return the (C,) means of (N, C) over the share of the patches with the highest of each."""
    best = max(1, int(share * len(probabilities)))
    return probabilities.topk(best, dim=0).values.mean(0)


def log_odds(probabilities: Tensor) -> Tensor:
    """Return log(p / (1 - p)), of p no nearer to 0 and 1 than tells anything."""
    return probabilities.clamp(_LEAST, 1 - _LEAST).logit()


def cut_out(image: UInt8Array, shown: Float32Array, margin: float) -> UInt8Array:
    """Cut the box out of an image that holds what a map shows.

    Args:
        image: (H0, W0, 3).
        shown: (h, w), how likely each patch shows it; above half of the largest it does.
        margin: Share of the longer side to add all around.

    Returns:
        A part of the image, a square as far as it holds one.
    """
    strong = shown >= shown.max() / 2
    sides, parts = [], []
    for axis, length in enumerate(image.shape[:2]):
        where = np.flatnonzero(strong.any(1 - axis))
        scale = length / shown.shape[axis]
        parts.append(((where[0] + where[-1] + 1) / 2 * scale, length))
        sides.append((where[-1] + 1 - where[0]) * scale)
    side = max(max(sides) * (1 + 2 * margin), _SMALLEST_BOX)
    rows, columns = (_span(centre, side, length) for centre, length in parts)
    return image[rows, columns]


def _span(centre: float, side: float, length: int) -> slice:
    size = min(round(side), length)
    start = min(max(round(centre - size / 2), 0), length - size)
    return slice(start, start + size)


def mean_shown(tokens: Tensor, maps: Tensor, share: float) -> Tensor:
    """Return the mean token of the patches that show each class best: (K, D).

    Args:
        tokens: (N, D).
        maps: (K, N), how likely each patch shows it, by which it counts.
        share: Of the largest, from which on a patch does.
    """
    weights = maps * (maps >= share * maps.max(1, keepdim=True).values)
    return (weights @ tokens) / weights.sum(1, keepdim=True)


def _halved(values: Tensor) -> Float32Array:
    halved: Float32Array = values.half().cpu().numpy()
    return halved
