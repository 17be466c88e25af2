"""Images per second of the CAM stage from JPEGs in memory to saved maps, and where the time goes.

    python benchmarks/throughput.py [--device cuda] [--precision bf16] [--images 4000]

Made for GPUs, where ``clipes bench`` and its literal baseline say little; it runs on processors,
too. The photos are made up, 500 x 375 pixels, and lie in a folder in memory (/dev/shm where there
is one); the tower is a ViT-B/16 with random weights, which is as fast as the real one. The stage is
run as ``clipes cam`` runs it, once to warm up on a tenth of the images and then on all. The table
below the rate is of one batch in one thread, each step waited for: what an image costs if nothing
overlaps. ``look`` is everything CLIP does; its encoder is timed once more alone (for ``reference``,
without the head that only the gradient needs).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from clipes.bench.cam import encoder_flop, random_backbone
from clipes.choices import Precision
from clipes.config import PRESETS, CamParams, get_preset
from clipes.device import batch_size, choose_device, keep_freed_memory, share_processor
from clipes.disk.images import read_image
from clipes.listener import Listener
from clipes.maps.maker import CamMaker
from clipes.run.folder import Run
from clipes.run.freshness import Freshness, looks_digest
from clipes.stages.images import ImageSource
from clipes.stages.learn_looks import learn_looks
from clipes.stages.make_cams import make_cams
from clipes.towers.clip import Backbone
from clipes.towers.side_by_side import CLIP, Towers
from clipes.towers.taps import Taps
from clipes.types import Sample
from clipes.words.features import TextFeatures, unit_rows

SIZE = (375, 500)
CLASSES, BACKGROUND = 20, 25
LABELS = ((0,), (1, 5), (2,), (3,), (4, 14))  # 1.4 classes an image, as in VOC
DISTINCT = 64
ENCODER = "encode: CLIP alone"

_Result = TypeVar("_Result")


def main() -> None:
    """Run the stage and print the rate and the table."""
    options = parse()
    device = choose_device(options.device)
    workers = share_processor(device, options.workers)
    batch = batch_size(device, options.batch)
    keep_freed_memory()
    backbone = random_backbone(device, Precision(options.precision))
    maker = CamMaker(Towers(backbone), random_text(), get_preset(options.preset).cam)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        samples = write_photos(folder, options.images)
        few = samples[: max(batch, options.images // 10)]
        how = (options.preset, workers, batch)
        run_stage(maker, few, Run(folder / "warm"), *how)
        seconds, informed = run_stage(maker, samples, Run(folder / "run"), *how)
        time_steps(informed, backbone, samples[:batch], Run(folder / "steps"))  # warms up
        steps = time_steps(informed, backbone, samples[:batch], Run(folder / "again"))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    print(f"{where}, {workers} workers, batches of {batch}, torch {torch.__version__}")
    print(f"preset {options.preset}, {options.precision}, {len(samples)} images of 500 x 375")
    print(f"{len(samples) / seconds:.1f} images/s")
    for step, spent in steps.items():
        print(f"  {step:<20}{1e3 * spent:8.2f} ms/image")
    h, w = backbone.grid(SIZE, CamParams().max_patches)
    tera = encoder_flop(backbone, h * w) / steps[ENCODER] / 1e12
    print(f"  encoder alone: {tera:.2f} TFLOP/s")


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=Precision.names())
    parser.add_argument("--preset", default="fast", choices=list(PRESETS))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--batch", type=int)
    return parser.parse_args()


def random_text() -> TextFeatures:
    """Return made-up vectors of as many classes and words as VOC has."""
    rows = unit_rows(np.random.default_rng(0).standard_normal((CLASSES + BACKGROUND, 512)))
    names = [f"{index:02}" for index in range(len(rows))]
    split = (tuple(names[:CLASSES]), tuple(names[CLASSES:]), rows[:CLASSES], rows[CLASSES:])
    return TextFeatures(*split, "random")


def write_photos(folder: Path, count: int) -> list[Sample]:
    """Write JPEGs whose size in bytes is that of photos, about 60 kB."""
    rng = np.random.default_rng(0)
    files = []
    for index in range(min(count, DISTINCT)):
        coarse = rng.integers(0, 256, (SIZE[0] // 8, SIZE[1] // 8, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC))
        noisy = smooth + rng.normal(0, 6, smooth.shape)
        files.append(folder / f"{index}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return [
        Sample(f"{index:06}", files[index % DISTINCT], LABELS[index % len(LABELS)])
        for index in range(count)
    ]


def run_stage(
    maker: CamMaker, samples: list[Sample], run: Run, preset: str, workers: int, batch: int
) -> tuple[float, CamMaker]:
    """Return the seconds of both passes, where the preset has two, and what made the maps."""
    how: dict[str, Any] = {"workers": workers, "batch": batch}
    patches, listener = get_preset(preset).cam.patches, Listener(print, print)
    start = time.perf_counter()
    ids: frozenset[str] = frozenset()
    run.root.mkdir()
    with ImageSource(run.root) as images:
        if patches is not None and patches.learns:
            maker, ids = learn_looks(samples, maker, run, patches, images, listener, **how)
        current = Freshness(run, (), cam={}, looks=looks_digest(run))
        how["learnt_from"] = ids
        summary = make_cams(samples, maker, run, current, images, listener, **how)
    assert summary.done == len(samples)
    return time.perf_counter() - start, maker


def time_steps(
    maker: CamMaker, backbone: Backbone, samples: list[Sample], run: Run
) -> dict[str, float]:
    """Return the seconds per image of each step, for one batch in one thread."""
    spent: dict[str, float] = {}

    def step(name: str, work: Callable[[], _Result]) -> _Result:
        wait(backbone.device)
        start = time.perf_counter()
        result = work()
        wait(backbone.device)
        spent[name] = (time.perf_counter() - start) / len(samples)
        return result

    images = step("decode", lambda: [read_image(sample.image) for sample in samples])
    pairs = list(zip(images, samples, strict=True))
    prepared = step("resize", lambda: [maker.prepare(image, one.labels) for image, one in pairs])
    together = torch.stack([one.pixels[CLIP] for one in prepared])
    taps = Taps(attention=backbone.last_blocks(CamParams().affinity_blocks), last="inputs")
    step(ENCODER, lambda: backbone.encode(together, taps))
    encoded = step("encode", lambda: maker.encode(prepared))
    maps = step("maps", lambda: [maker.maps(image) for image in encoded])
    made = list(zip(samples, maps, strict=True))
    step("save", lambda: [run.save_cams(one.id, cams) for one, cams in made])
    return spent


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
