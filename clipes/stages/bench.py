"""All measurements of ``clipes bench`` as plain data."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from clipes.bench.cam import CamTimes, compare_cam
from clipes.bench.crf import compare_crf, synthetic_image
from clipes.bench.kernels import compare_without
from clipes.errors import BackendError
from clipes.listener import Listener

_CRF_LABELS = (3, 21)


def run_bench(threads: Sequence[int], rounds: int, listener: Listener) -> dict[str, Any]:
    """Measure the CAM stage and the CRF against their baselines.

    Args:
        threads: Numbers of threads to measure the CAM stage with; the last one's results
            stand at the top level.
        rounds: Measurements of each.
        listener: Who is told what is not measured, and how it goes.

    Returns:
        ``cam_speedup_by_classes``, ``crf_speedup_vs_pydensecrf2`` and the rest, as plain data.
    """
    cam = {}
    for count in threads:
        with listener.progress(f"cam, {count} thread{'s' if count > 1 else ''}") as bar:
            cam[count] = compare_cam(count, rounds, bar)
    crf = _crf(rounds, listener)
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "rounds": rounds,
        "cam_speedup_by_classes": _text_keys(cam[threads[-1]].speedup),
        "crf_speedup_vs_pydensecrf2": {labels: row["speedup"] for labels, row in crf.items()},
        "cam": {str(count): _cam_report(times) for count, times in cam.items()},
        "crf": crf,
    }


def run_without(kernel: str, rounds: int, listener: Listener) -> dict[str, Any]:
    """Measure what a kernel is worth to the preset ``default``; see ``compare_without``."""
    with listener.progress(f"default without {kernel}") as bar:
        return compare_without(kernel, rounds, bar)


def _cam_report(times: CamTimes) -> dict[str, Any]:
    return {
        "speedup": _text_keys(times.speedup),
        "seconds_literal": _text_keys(times.literal),
        "seconds": _text_keys(times.ours),
        "seconds_one_at_a_time": _text_keys(times.one_at_a_time),
        "seconds_fast": _text_keys(times.fast),
        "stages_at_most_classes": times.stages,
        "encoder_gflop": times.encoder_gflop,
        "encoder_gflops": times.encoder_gflops,
        "gemm_peak_gflops": times.gemm_peak,
        "encoder_share_of_peak": times.encoder_share_of_peak,
        "bytes": _text_keys(times.bytes_ours),
        "bytes_literal": _text_keys(times.bytes_literal),
        "largest_difference": times.largest_difference,
    }


def _crf(rounds: int, listener: Listener) -> dict[str, dict[str, float]]:
    image = synthetic_image()
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    try:
        if affinity:
            os.sched_setaffinity(0, {min(affinity)})  # both on one core
        return {str(labels): compare_crf(image, labels, rounds) for labels in _CRF_LABELS}
    except BackendError as error:
        listener.say(f"crf: not compared: {error}")
        return {}
    finally:
        if affinity:
            os.sched_setaffinity(0, affinity)


def _text_keys(values: dict[int, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}
