"""WeakCLIP's parts: pyramid adapter, co-attention of words and pixels, text-guided decoder.

Zhu et al., "WeakCLIP: Adapting CLIP for Weakly-Supervised Semantic Segmentation", IJCV 2025, and
its code. Shapes: B images of a grid of h x w patches, N = h * w, L labels, D channels of CLIP's
tokens, E of the space that images and words share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipes.choices import Norm

_INSIDE, _HEADS, _MLP = 256, 4, 1024
"""Of a layer of the co-attention: channels, heads, channels inside of its MLP."""

_NECK = 256  # channels of the decoder

_DROPOUT = 0.1

_GROUPS = 32  # of channels that are normalised together, where it is not over the batch

_FIRST_SHARE = 0.1  # of what the co-attention adds to words and pixels


def normalisation(kind: str, channels: int) -> nn.Module:
    """Return the layer that a ``clipes.choices.Norm`` means."""
    if kind == Norm.batch:
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(_GROUPS, channels), channels)


class Adapter(nn.Module):
    """CLIP's tokens at strides 4, 8, 16 and 32, or the last of these; first weights are torch's.

    Args:
        strides: Of 4, 8, 16, 32, ascending.
        channels: D.
        norm: Of ``clipes.choices.Norm``.
    """

    def __init__(self, strides: Sequence[int], channels: int, norm: str) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, channels), *_resized(stride, channels, norm))
            for stride in strides
        )

    def forward(self, tokens: Iterable[Tensor]) -> list[Tensor]:
        """Return (B, D, 16 h / stride, 16 w / stride) for (B, D, h, w) of each level.

        At stride 32 the last row or column of an odd number is a row or column of its own.
        """
        return [level(one) for level, one in zip(self.levels, tokens, strict=True)]


def _resized(stride: int, channels: int, norm: str) -> list[nn.Module]:
    """Return what brings patches, of stride 16, to another stride."""

    def doubled() -> nn.Module:
        return nn.ConvTranspose2d(channels, channels, 2, stride=2)

    if stride == 4:
        return [doubled(), normalisation(norm, channels), nn.GELU(), doubled()]
    if stride == 8:
        return [doubled()]
    return [nn.MaxPool2d(2, ceil_mode=True)] if stride == 32 else []


class CoAttention(nn.Module):
    """Words look at pixels, pixels at words; a learnt share of what is seen is added to each.

    Args:
        channels: E.
        layers: Of either side.
        chained: Whether a layer reads what the one before returns. Else, as in the published code,
            all read the same and only the last one counts: the others never get a gradient.
    """

    def __init__(self, channels: int, layers: int, *, chained: bool) -> None:
        super().__init__()
        self._chained = chained
        self.read_pixels = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, _INSIDE), nn.LayerNorm(_INSIDE)
        )
        self.read_words = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, _INSIDE))
        self.of_words = nn.ModuleList(MatchingLayer() for _ in range(layers))
        self.of_pixels = nn.ModuleList(MatchingLayer() for _ in range(layers))
        self.write_words = nn.Sequential(nn.LayerNorm(_INSIDE), nn.Linear(_INSIDE, channels))
        self.write_pixels = nn.Sequential(nn.LayerNorm(_INSIDE), nn.Linear(_INSIDE, channels))
        self.apply(_truncated)
        self.gamma = nn.Parameter(torch.full((channels,), _FIRST_SHARE))
        self.beta = nn.Parameter(torch.full((channels,), _FIRST_SHARE))

    def forward(self, words: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, changed.

        Args:
            words: (B, L, E), not of length 1.
            pixels: (B, 1 + N, E), the image as a whole first; likewise.
        """
        text, image = self.read_words(words), self.read_pixels(pixels)
        seen = self.write_words(self._through(self.of_words, text, image))
        known = self.write_pixels(self._through(self.of_pixels, image, text))
        return words + self.gamma * seen, pixels + self.beta * known

    def unused(self) -> list[nn.Module]:
        """Return the layers that no output depends on."""
        if self._chained:
            return []
        return [*self.of_words[:-1], *self.of_pixels[:-1]]

    def _through(self, layers: nn.ModuleList, tokens: Tensor, memory: Tensor) -> Tensor:
        for layer in layers if self._chained else layers[-1:]:
            tokens = layer(tokens, memory)
        return tokens


class MatchingLayer(nn.Module):
    """A pre-norm layer of a transformer's decoder, without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(_INSIDE) for _ in range(3))
        self.own, self.other = Attention(), Attention()
        self.mlp = nn.Sequential(
            nn.Linear(_INSIDE, _MLP),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(_MLP, _INSIDE),
            nn.Dropout(_DROPOUT),
        )

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Return (B, T, 256) for (B, T, 256), with a look at (B, M, 256)."""
        normed = self.norm_1(tokens)
        tokens = tokens + self.own(normed, normed)
        tokens = tokens + self.other(self.norm_2(tokens), memory)
        output: Tensor = tokens + self.mlp(self.norm_3(tokens))
        return output


class Attention(nn.Module):
    """Attention with four heads; what projects in has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            nn.Linear(_INSIDE, _INSIDE, bias=False) for _ in range(3)
        )
        self.mix = nn.Sequential(nn.Linear(_INSIDE, _INSIDE), nn.Dropout(_DROPOUT))

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Return (B, T, 256) of (B, T, 256) that look at (B, M, 256)."""
        parts = (self.query(tokens), self.key(memory), self.value(memory))
        query, key, value = (one.unflatten(2, (_HEADS, -1)).transpose(1, 2) for one in parts)
        seen = functional.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.mix(seen.transpose(1, 2).flatten(2))
        return output


class Decoder(nn.Module):
    """A feature pyramid and a semantic head; words guide it, for it reads the score map, too.

    So may the tokens of another tower, which stand beside the scores on every level.

    Args:
        strides: As for ``Adapter``.
        channels: D.
        labels: L.
        norm: Of ``clipes.choices.Norm``.
        beside: Channels of another tower's tokens; 0 for none.
    """

    def __init__(
        self, strides: Sequence[int], channels: int, labels: int, norm: str, beside: int = 0
    ) -> None:
        super().__init__()
        read = channels + labels + beside
        self.laterals = nn.ModuleList(nn.Conv2d(read, _NECK, 1) for _ in strides)
        self.smooth = nn.ModuleList(nn.Conv2d(_NECK, _NECK, 3, padding=1) for _ in strides)
        self.scales = nn.ModuleList(_scale(stride, strides[0], norm) for stride in strides)
        self.apply(_kaiming)
        self.dropout = nn.Dropout2d(_DROPOUT)
        self.classify = nn.Conv2d(_NECK, labels, 1)

    def forward(self, levels: Sequence[Tensor], guide: Tensor) -> Tensor:
        """Return logits (B, L, h', w') at the finest level's size.

        Args:
            levels: (B, D, h', w') of each stride.
            guide: (B, L, h, w) scores; with what stands beside them (B, L + ``beside``, h, w).
        """
        features = [
            lateral(torch.cat([level, _aligned(guide, level)], 1))
            for lateral, level in zip(self.laterals, levels, strict=True)
        ]
        for finer in reversed(range(len(features) - 1)):
            size = (features[finer].shape[2], features[finer].shape[3])
            above = functional.interpolate(features[finer + 1], size=size, mode="nearest")
            features[finer] = features[finer] + above
        size = (features[0].shape[2], features[0].shape[3])
        total = torch.zeros_like(features[0])
        for smooth, scale, one in zip(self.smooth, self.scales, features, strict=True):
            total = total + _enlarged(scale(smooth(one)), size)
        output: Tensor = self.classify(self.dropout(total))
        return output


def _scale(stride: int, finest: int, norm: str) -> nn.Sequential:
    """Return what brings a level to the finest one's size."""
    steps = round(math.log2(stride / finest))
    layers: list[nn.Module] = []
    for _ in range(max(1, steps)):
        layers += [
            nn.Conv2d(_NECK, _NECK, 3, padding=1, bias=False),
            normalisation(norm, _NECK),
            nn.ReLU(),
        ]
        if steps:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)


def _aligned(guide: Tensor, level: Tensor) -> Tensor:
    """Return scores and the like at a level's size, corners aligned as in the published code."""
    size = (level.shape[2], level.shape[3])
    return functional.interpolate(guide, size=size, mode="bilinear", align_corners=True)


def _enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps at exactly ``size``: doubled odd numbers are a row or column too long."""
    return maps if maps.shape[2:] == size else maps[..., : size[0], : size[1]]


def _truncated(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _kaiming(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
