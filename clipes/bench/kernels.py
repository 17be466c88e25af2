"""What a kernel is worth: time of the preset ``default`` with it and without it, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from clipes.bench.cam import random_backbone, random_dino
from clipes.bench.crf import synthetic_image
from clipes.choices import CrfBackend
from clipes.config import get_preset
from clipes.device import keep_freed_memory
from clipes.errors import UsageError
from clipes.maps.looks import Looks
from clipes.maps.maker import CamMaker
from clipes.masks.pseudo import pseudo_label
from clipes.towers.side_by_side import DINO, Towers
from clipes.types import Progress
from clipes.words.features import TextFeatures, unit_rows

KERNELS = ("linear", "attention", "lattice")
"""What can be left out: oneDNN's linear layers, attention by tiles, and the CRF's lattice."""

_LABELS = (3, 7)  # an image of VOC shows 1.5 classes
_CLASSES, _BACKGROUND_WORDS, _WIDTH = 20, 25, 512


def compare_without(kernel: str, rounds: int, progress: Progress) -> dict[str, float | str]:
    """Time everything from an image to its mask, one thread, with and without a kernel in turns.

    Args:
        kernel: One of ``KERNELS``.
        rounds: Measurements of each.
        progress: Called after each round.

    Returns:
        CPU seconds per image with it and without it, and the median of their ratios in each round,
        by name. What else the machine does disturbs CPU seconds less than others.

    Raises:
        UsageError: There is no such kernel, or this machine does not use it.
        BackendError: The lattice cannot be left out, as pydensecrf2 is not installed.
    """
    if kernel not in KERNELS:
        raise UsageError(f"unknown kernel '{kernel}'", f"choose one of {', '.join(KERNELS)}")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        ways = (_default_preset(None), _default_preset(kernel))
        for way in ways:
            way()  # compiles
        seconds = []
        for done in range(rounds):
            seconds.append([_cpu_seconds(way) for way in ways])
            progress(done + 1, rounds)
    finally:
        torch.set_num_threads(before)
    used, left_out = zip(*seconds, strict=True)
    return {
        "kernel": kernel,
        "seconds_with": median(used),
        "seconds_without": median(left_out),
        "ratio": median(without / used for used, without in seconds),
    }


def _default_preset(left_out: str | None) -> Callable[[], object]:
    """Return what makes a mask of an image, from pixels on, as the preset ``default`` does."""
    backbone = random_backbone()
    if left_out in ("linear", "attention"):
        if getattr(backbone.kernels, left_out) == "torch":
            raise UsageError(
                f"this machine computes without '{left_out}' anyway",
                "compare on an x86 processor with AVX2",
            )
        backbone = random_backbone(kernels=replace(backbone.kernels, **{left_out: "torch"}))
    crf = (CrfBackend.pydensecrf if left_out == "lattice" else CrfBackend.numba).value
    preset, image = get_preset("default"), synthetic_image()
    patches = preset.cam.patches
    assert patches is not None
    towers = Towers(backbone, {DINO: random_dino(kernels=backbone.kernels)})
    maker = CamMaker(towers, _random_text(), preset.cam)

    def run() -> object:
        (encoded,) = maker.encode([maker.prepare(image, _LABELS)])
        informed = maker
        for _ in patches.rounds:
            informed = informed.with_looks(Looks.of(informed.lesson(encoded).statistics, patches))
        cams = informed.maps(encoded, in_statistics=True)
        exponent = preset.background_exponent
        return pseudo_label(image, cams, preset.crf, background_exponent=exponent, backend=crf)

    return run


def _random_text() -> TextFeatures:
    rows = unit_rows(
        np.random.default_rng(0).standard_normal((_CLASSES + _BACKGROUND_WORDS, _WIDTH))
    )
    names = tuple(f"class {number:02}" for number in range(_CLASSES))
    words = tuple(f"word {number:02}" for number in range(_BACKGROUND_WORDS))
    return TextFeatures(names, words, rows[:_CLASSES], rows[_CLASSES:], "random")


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
