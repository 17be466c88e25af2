"""Classes that few images of a run show: masks of `default` against those of `fast`.

    python benchmarks/rare.py [--data voc_sample] [--images 1 2 5] [--draws 1] [--dino SOURCE]

`fast` looks at each image alone; `default` learns from them what classes look like, which might be
worse than nothing where there are few. Runs are made thin on purpose: of a quarter of the classes
at a time, all images but some that are drawn at random are left out. Printed is the IoU of those
classes in %, each over the images that were left of it, where there are that many: the mean over
classes and draws, how many are worse by more than a point, and the three that lose most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ablation import DATA, load_maker, load_photos, row_of
from tapes import Row, Tape, learnt, tape_all, tape_mask

from clipes.device import keep_freed_memory
from clipes.disk.images import read_mask
from clipes.maps.maker import CamMaker
from clipes.masks.scores import ConfusionMatrix
from clipes.masks.values import value_count, value_of
from clipes.types import UInt8Array

PARTS = 4
"""So many runs share out the classes that are made rare."""


@dataclass(frozen=True)
class Rare:
    """A class of a thin run: IoU, in [0, 1], over the images that show it."""

    label: int
    images: int
    draw: int
    fast: float
    default: float


class Thin:
    """Makes thin runs of encoded images.

    Args:
        tapes: The images.
        maker: Of preset ``default``; knows nothing yet.
        row: Its settings.
        alone: Of preset ``fast``, and its settings.
        classes: Number of classes.
    """

    def __init__(
        self,
        tapes: Sequence[Tape],
        maker: CamMaker,
        row: Row,
        alone: tuple[CamMaker, Row],
        classes: int,
    ) -> None:
        self._tapes, self._maker, self._row, self._classes = tapes, maker, row, classes
        self._alone = alone
        self._fast: dict[int, UInt8Array] = {}

    def measure(self, images: int, draw: int) -> Iterator[Rare]:
        """Yield the classes, each rare in one of the runs: of so many images, drawn by a seed."""
        for part in range(PARTS):
            rare = range(part, self._classes, PARTS)
            kept = thinned([tape.encoded.labels for tape in self._tapes], rare, images, draw)
            yield from self._of(kept, rare, images, draw)

    def _of(
        self, kept: Sequence[int], rare: Sequence[int], images: int, draw: int
    ) -> Iterator[Rare]:
        patches = self._row.cam.patches
        assert patches is not None
        informed = learnt(self._maker, patches, [self._tapes[k].encoded for k in kept])
        for label in rare:
            chosen = [k for k in kept if label in self._tapes[k].encoded.labels]
            if len(chosen) == images:
                own = [self._default(k, informed) for k in chosen]
                fast = [self._fast_mask(k) for k in chosen]
                ious = (self._iou(label, chosen, masks) for masks in (fast, own))
                yield Rare(label, images, draw, *ious)

    def _default(self, k: int, informed: CamMaker) -> UInt8Array:
        tape = self._tapes[k]
        return tape_mask(tape, informed.maps(tape.encoded, in_statistics=True), self._row)

    def _fast_mask(self, k: int) -> UInt8Array:
        if k not in self._fast:
            tape, (maker, row) = self._tapes[k], self._alone
            self._fast[k] = tape_mask(tape, maker.maps(tape.encoded), row)
        return self._fast[k]

    def _iou(self, label: int, chosen: Sequence[int], masks: Sequence[UInt8Array]) -> float:
        matrix = ConfusionMatrix(value_count(self._classes))
        for k, mask in zip(chosen, masks, strict=True):
            path = self._tapes[k].photo.sample.mask
            assert path is not None
            matrix.update(read_mask(path), mask)
        return matrix.scores().iou[value_of(label)] or 0.0


def thinned(
    labels: Sequence[Sequence[int]], rare: Sequence[int], images: int, seed: int
) -> list[int]:
    """Return which images are left when some classes are made rare.

    Args:
        labels: Of every image.
        rare: The classes.
        images: How many are left of each, of those that show no other of them.
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    kept = {k for k, some in enumerate(labels) if not set(rare) & set(some)}
    for label in rare:
        alone = [k for k, some in enumerate(labels) if set(rare) & set(some) == {label}]
        kept |= set(rng.permutation(alone)[:images].tolist())
    return sorted(kept)


def table(found: Sequence[Rare], classes: Sequence[str]) -> str:
    """Return the table, as Markdown."""
    lines = ["| images of a class | classes | fast | default | worse | lose most |"]
    lines.append("|---|---|---|---|---|---|")
    for images in dict.fromkeys(one.images for one in found):
        some = [one for one in found if one.images == images]
        fast, default = (100 * np.mean([getattr(o, name) for o in some])
                         for name in ("fast", "default"))  # fmt: skip
        worse = sum(one.default < one.fast - 0.01 for one in some)
        worst = sorted(some, key=lambda one: one.default - one.fast)[:3]
        told = ", ".join(
            f"{classes[one.label]} {100 * one.fast:.0f} to {100 * one.default:.0f}" for one in worst
        )
        lines.append(f"| {images} | {len(some)} | {fast:.2f} | {default:.2f} | {worse} | {told} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", choices=DATA, default="voc_sample")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--dino", default="auto", help="weights of DINOv2")
    options = parser.parse_args()
    photos, classes = load_photos([options.data], None)
    if not photos:
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    kind = options.data.partition("_")[0]
    default, fast = row_of("default", kind), row_of("fast", kind)
    make = load_maker(kind, classes, default.others, options.dino)
    maker = make(default)
    thin = Thin(list(tape_all(maker, photos)), maker, default, (make(fast), fast), len(classes))
    found: list[Rare] = []
    for images in options.images:
        for draw in range(options.draws):
            found += thin.measure(images, draw)
            print(f"{images} images, draw {draw}: done", file=sys.stderr, flush=True)
    print(table(found, classes))


if __name__ == "__main__":
    main()
