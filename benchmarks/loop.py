"""What it is worth to correct the masks that the review queue names first, rather than any.

    python benchmarks/loop.py [--run RUN | --preset default] [--orders 200]

Takes a finished run of voc_sample (or of anything with ground truth), else makes one as
``benchmarks/voc_sample.py`` does. Ground truth stands in for the person: the masks of the first 5,
10 and 20 % of the images are replaced by it. Printed is the mIoU of all masks then: in the order of
the queue; in random orders, the mean and the best of them; and from the lowest mIoU of an image,
which only ground truth tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from common import run_options, run_to_look_at

from clipes.cli.console import progress_bar
from clipes.disk.images import read_mask
from clipes.masks.scores import ConfusionMatrix
from clipes.masks.values import value_count
from clipes.report.measure import Row, review_queue
from clipes.run.folder import Run
from clipes.run.reopen import reopen
from clipes.stages.report import measure_run
from clipes.types import Int64Array, Sample

BUDGETS = (0.0, 0.05, 0.1, 0.2)
"""Shares of the images that are corrected."""


@dataclass(frozen=True)
class Point:
    """mIoU, in [0, 1], of all masks after a share of the images was corrected, by the order."""

    share: float
    images: int
    queue: float
    random: float
    best_random: float
    known: float


def main() -> None:
    """Print the table."""
    parser = run_options(__doc__)
    parser.add_argument("--orders", type=int, default=200, help="random ones")
    options = parser.parse_args()
    with run_to_look_at(options) as run:
        if run is not None:
            print(table(curve(run, options.orders)))


def curve(run: Run, orders: int) -> list[Point]:
    """Return what correcting is worth, at each budget.

    Args:
        run: A run with masks; images without one, or without ground truth, are left out.
        orders: Number of random orders.
    """
    data = reopen(run, None)
    samples = [one for one in data.samples if one.mask is not None and run.has_pseudo(one.id)]
    with progress_bar("measure") as progress:
        rows, _ = measure_run(run, samples, data.classes, None, progress, use_corrected=False)
    before, after = _counts(run, samples, value_count(len(data.classes)))
    place = {one.id: index for index, one in enumerate(samples)}
    queue = [place[row.id] for row in review_queue(rows)]
    known = [place[row.id] for row in sorted(rows, key=_own_miou)]
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(len(samples)).tolist() for _ in range(orders)]

    def corrected(order: Sequence[int], count: int) -> float:
        changed = order[:count]
        counts = before.sum(0) + (after[changed] - before[changed]).sum(0)
        return ConfusionMatrix.of(counts).scores().miou

    points = []
    for share in BUDGETS:
        count = round(share * len(samples))
        random = [corrected(order, count) for order in shuffled]
        mean, best = float(np.mean(random)), max(random)
        points.append(
            Point(share, count, corrected(queue, count), mean, best, corrected(known, count))
        )
    return points


def table(points: Sequence[Point]) -> str:
    """Return the table, as Markdown."""
    lines = [
        "| corrected | images | in the queue's order | in random order | the best of these | "
        "from the lowest mIoU |",
        "|---|---|---|---|---|---|",
    ]
    for point in points:
        scores = (point.queue, point.random, point.best_random, point.known)
        cells = " | ".join(f"{100 * score:.2f}" for score in scores)
        lines.append(f"| {100 * point.share:.0f} % | {point.images} | {cells} |")
    return "\n".join(lines)


def _counts(run: Run, samples: Sequence[Sample], labels: int) -> tuple[Int64Array, Int64Array]:
    """Return (N, labels, labels) pixels by true and predicted label, of masks and of truth."""
    before, after = [], []
    for one in samples:
        assert one.mask is not None
        truth = read_mask(one.mask)
        for counts, mask in ((before, read_mask(run.pseudo_path(one.id))), (after, truth)):
            matrix = ConfusionMatrix(labels)
            matrix.update(truth, mask)
            counts.append(matrix.counts)
    return np.array(before), np.array(after)


def _own_miou(row: Row) -> float:
    return 1.0 if row.miou is None else row.miou


if __name__ == "__main__":
    main()
