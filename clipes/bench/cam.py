"""Time of the CAM stage against the literal way, stage by stage, and against the processor."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

import numpy as np
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from clipes.bench import literal
from clipes.choices import Precision
from clipes.config import CamParams, PatchParams
from clipes.device import keep_freed_memory
from clipes.kernels.choose import Kernels
from clipes.kernels.linear import has_onednn, make_linear
from clipes.maps.affinity import propagate, sinkhorn
from clipes.maps.gradcam import softmax_gradcam
from clipes.maps.patches import compare, patch_features
from clipes.towers.clip import Backbone
from clipes.towers.dinov2 import DinoTower
from clipes.towers.taps import Taps
from clipes.types import Progress, UInt8Array

CLASSES = (1, 2, 4, 8)
"""Numbers of classes per image that are timed."""

_BACKGROUND_WORDS = 25
_SIZE = (375, 500)  # VOC's most common
_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class CamTimes:
    """What one comparison found; seconds are medians over the rounds.

    Attributes:
        threads: Threads that compute at once.
        literal: Seconds per image of the literal way, one image on all threads, by number of
            classes.
        ours: Seconds per image as ``clipes cam`` works: as many images as threads at once.
        one_at_a_time: Seconds per image of our way with one image on all threads.
        fast: Seconds per image of preset ``fast``, as many images as threads at once. The literal
            way has no counterpart to it.
        stages: Seconds of each step in one thread of ``ours``, at the largest number of classes.
        encoder_gflop: Floating-point operations of the encoder for one image, in 10^9.
        gemm_peak: Measured GFLOP/s of the fastest fp32 matrix product.
        bytes_ours: Size of the file with the maps of one image, by number of classes.
        bytes_literal: Size of the full-size fp16 arrays the reference saves, likewise.
        largest_difference: Of the two ways' refined maps, in [0, 1]. 0.02 is to be expected on any
            processor, and with torch's own products as well: random weights attend almost evenly,
            so that refined maps span 1e-4 of their maximum before they are scaled to [0, 1], which
            magnifies the rounding of sums in fp32 ten thousand times. No box differs, nothing is
            rounded to fewer bits, and before the walk the maps agree to 3e-6. Maps of real weights
            span most of their range (``tests/golden``: 1e-5).
    """

    threads: int
    literal: dict[int, float]
    ours: dict[int, float]
    one_at_a_time: dict[int, float]
    fast: dict[int, float]
    stages: dict[str, float]
    encoder_gflop: float
    gemm_peak: float
    bytes_ours: dict[int, int]
    bytes_literal: dict[int, int]
    largest_difference: float

    @property
    def speedup(self) -> dict[int, float]:
        """Literal time over ours, by number of classes."""
        return {k: self.literal[k] / self.ours[k] for k in self.ours}

    @property
    def encoder_share_of_peak(self) -> float:
        """Share of the measured GEMM peak that the encoder reaches."""
        return self.encoder_gflops / self.gemm_peak

    @property
    def encoder_gflops(self) -> float:
        """GFLOP/s of the encoder, over all threads."""
        return self.threads * self.encoder_gflop / self.stages["encode"]


def random_tower() -> VisionTransformer:
    """Return a ViT-B/16 with random weights, the same each time."""
    torch.manual_seed(0)
    visual = VisionTransformer(224, 16, 768, 12, 12, 4.0, output_dim=512, act_layer=QuickGELU)
    return visual.eval().requires_grad_(False)


def random_backbone(
    device: torch.device | str = "cpu",
    precision: Precision = Precision.fp32,
    kernels: Kernels | None = None,
) -> Backbone:
    """Return that tower ready for maps: as fast as the real one; arguments as ``Backbone``."""
    half = (0.5, 0.5, 0.5)
    visual = random_tower().to(device)
    return Backbone(visual, _LOGIT_SCALE, half, half, precision=precision, kernels=kernels)


def random_dino(kernels: Kernels | None = None) -> DinoTower:
    """Return a DINOv2 ViT-S/14 of random weights on the processor; arguments as ``DinoTower``."""
    torch.manual_seed(0)
    module = timm_vit.VisionTransformer(
        img_size=518, patch_size=14, embed_dim=384, depth=12, num_heads=6, num_classes=0
    )
    return DinoTower(module, "random", kernels=kernels)


def compare_cam(threads: int, rounds: int, progress: Progress) -> CamTimes:
    """Time both ways in turns on random weights and a random image.

    Args:
        threads: How many threads compute at once.
        rounds: Measurements of each.
        progress: Called after each measurement.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        with ThreadPoolExecutor(threads) as pool:
            return _compare(random_backbone(), pool, threads, rounds, progress)
    finally:
        torch.set_num_threads(before)


def _compare(
    backbone: Backbone,
    pool: ThreadPoolExecutor,
    threads: int,
    rounds: int,
    progress: Progress,
) -> CamTimes:
    params = CamParams()
    image = np.random.default_rng(0).integers(0, 256, (*_SIZE, 3), dtype=np.uint8)
    texts = {k: _unit_rows(k, seed=k) for k in CLASSES}
    background = _unit_rows(_BACKGROUND_WORDS, seed=0)
    stage_times: list[dict[str, float]] = []
    tower = random_tower()  # a backbone's activation function is not the published one any more

    def run_literal(k: int) -> np.ndarray:
        prepared = backbone.prepare(image, params.max_patches)
        return literal.refined_maps(tower, prepared, texts[k], background, _LOGIT_SCALE, params)

    def run_ours(k: int) -> np.ndarray:
        maps, times = _timed_stages(backbone, image, texts[k], background, params)
        if k == CLASSES[-1]:
            stage_times.append(times)
        return maps

    def run_together(k: int) -> None:
        _timed_stages(backbone, image, texts[k], background, params)

    def run_fast(k: int) -> np.ndarray:
        taps = Taps(attention=backbone.last_blocks(params.affinity_blocks), last="inputs")
        encoded = backbone.encode(backbone.prepare(image, params.max_patches)[None], taps)
        features = patch_features(backbone, encoded.last.of(0))
        temperature = PatchParams().temperature
        sources, _ = compare(features, texts[k], background, encoded.grid, temperature)
        return _spread(encoded.attention[0], sources, params)

    def several(run: Callable[[int], np.ndarray], k: int) -> None:
        list(pool.map(run, [k] * threads))

    # Name, torch's threads, what to time, images it does.
    ways: tuple[tuple[str, int, Callable[[int], object], int], ...] = (
        ("literal", threads, run_literal, 1),
        ("ours", 1, partial(several, run_ours), threads),
        ("one at a time", threads, run_together, 1),
        ("fast", 1, partial(several, run_fast), threads),
    )
    difference = max(float(np.abs(run_ours(k) - run_literal(k)).max()) for k in CLASSES)
    several(run_ours, CLASSES[-1])
    several(run_fast, CLASSES[-1])
    stage_times.clear()  # the first runs measure warming up
    seconds: dict[tuple[str, int], list[float]] = {}
    peaks = []
    total, done = rounds * len(ways) * len(CLASSES), 0
    for _ in range(rounds):
        torch.set_num_threads(threads)
        peaks.append(_gemm_peak())
        for k in CLASSES:
            for name, count, run, images in ways:
                torch.set_num_threads(count)
                seconds.setdefault((name, k), []).append(_seconds(partial(run, k)) / images)
                done += 1
                progress(done, total)
    h, w = backbone.grid(_SIZE, params.max_patches)
    literally, ours, alone, fast = (
        {k: median(seconds[way[0], k]) for k in CLASSES} for way in ways
    )
    return CamTimes(
        threads=threads,
        literal=literally,
        ours=ours,
        one_at_a_time=alone,
        fast=fast,
        stages={name: median(row[name] for row in stage_times) for name in stage_times[0]},
        encoder_gflop=encoder_flop(backbone, h * w) / 1e9,
        gemm_peak=max(peaks),
        bytes_ours={k: _file_size(k, h, w) for k in CLASSES},
        bytes_literal={k: 2 * k * _SIZE[0] * _SIZE[1] for k in CLASSES},
        largest_difference=difference,
    )


def encoder_flop(backbone: Backbone, patches: int) -> float:
    """Return the floating-point operations of one pass over one image: products alone."""
    width, blocks = backbone.visual.proj.shape[0], len(backbone.blocks)
    tokens = patches + 1
    linear = 2 * tokens * 12 * width**2  # query, key, value, output, and the MLP's 4 + 4
    attention = 2 * 2 * tokens**2 * width
    embed = 2 * patches * width * 3 * backbone.patch**2
    return float(blocks * (linear + attention) + embed)


def _timed_stages(
    backbone: Backbone, image: UInt8Array, text: Tensor, background: Tensor, params: CamParams
) -> tuple[np.ndarray, dict[str, float]]:
    marks = [time.perf_counter()]
    prepared = backbone.prepare(image, params.max_patches)
    marks.append(time.perf_counter())
    taps = Taps(attention=backbone.last_blocks(params.affinity_blocks), last="gradient")
    encoded = backbone.encode(prepared[None], taps)
    marks.append(time.perf_counter())
    cams = softmax_gradcam(backbone, encoded.gradients[0], encoded.grid, text, background)
    marks.append(time.perf_counter())
    maps = _spread(encoded.attention[0], cams, params)
    marks.append(time.perf_counter())
    names = ("prepare", "encode", "gradcam", "affinity")
    spans = (after - start for start, after in pairwise(marks))
    return maps, dict(zip(names, spans, strict=True))


def _spread(attention: Tensor, sources: np.ndarray, params: CamParams) -> np.ndarray:
    walk = sinkhorn(attention, params.sinkhorn_iterations)
    return propagate(walk, sources, params, params.walk_power)


def _unit_rows(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 512, generator=generator), dim=1)


def _gemm_peak() -> float:
    x, weight = torch.randn(1024, 768), nn.Parameter(torch.randn(3072, 768), requires_grad=False)
    flop = 2 * x.shape[0] * weight.numel()
    ways = [make_linear(name) for name in ("torch", "onednn") if name == "torch" or has_onednn()]
    with torch.inference_mode():
        best = min(_seconds(partial(way, x, weight, None)) for way in ways for _ in range(5))
    return flop / best / 1e9


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _file_size(classes: int, h: int, w: int) -> int:
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    maps = rng.random((classes, h, w)).astype(np.float16)  # noise: real maps pack better
    np.savez_compressed(file, labels=np.arange(classes), maps=maps, size=np.array(_SIZE))
    return len(file.getvalue())
