"""What it is worth to correct the masks that the review queue names first, rather than any.

    python benchmarks/loop.py [--run RUN | --preset default] [--orders 200] [--again [--order N]]

Takes a finished run of voc_sample (or of anything with ground truth), else makes one as
``benchmarks/voc_sample.py`` does. Ground truth stands in for the person: the masks of the first 5,
10 and 20 % of the images are replaced by it. Printed is the mIoU of all masks then: in the order of
the queue; in random orders, the mean and the best of them; and from the lowest mIoU of an image,
which only ground truth tells.

``--again``, for a run of voc_sample with preset ``default``: the mIoU of the images that were *not*
corrected, in the queue's order, as they are and after ``cam`` and ``refine`` ran again and learnt
from the corrected masks; of all, of the even images and of the odd ones. ``--order N`` takes one of
the random orders instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ablation import load_maker, load_photos, row_of
from common import run_options, run_to_look_at
from tapes import Row as Settings
from tapes import Tape, learnt, tape_all, tape_mask

from clipes.cli.console import progress_bar
from clipes.disk.images import read_mask
from clipes.maps.maker import CamMaker
from clipes.masks.scores import ConfusionMatrix
from clipes.masks.values import value_count
from clipes.report.measure import Row, review_queue
from clipes.run.folder import Run
from clipes.run.reopen import reopen
from clipes.stages.report import measure_run
from clipes.types import Int64Array, Sample, UInt8Array

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
    parser.add_argument("--again", action="store_true", help="learn from what was corrected")
    parser.add_argument("--order", type=int, help="with --again: this random one, from 0")
    options = parser.parse_args()
    with run_to_look_at(options) as run:
        if run is not None and options.again:
            print(_again(run, options.order))
        elif run is not None:
            print(table(curve(run, options.orders)))


def _again(run: Run, order: int | None) -> str:
    """Return the table of what the other images have of corrections."""
    photos, classes = load_photos(["voc_sample"], None)
    row = row_of("default", "voc")
    maker = load_maker("voc", classes, row.others, "auto")(row)
    ids = [photo.sample.id for photo in photos]
    queue = queue_of(run)
    if order is not None:
        queue = [ids[k] for k in random_orders(len(ids), order + 1)[-1]]
    return table_again(curve_again(queue, list(tape_all(maker, photos)), maker, row, len(classes)))


def curve(run: Run, orders: int) -> list[Point]:
    """Return what correcting is worth, at each budget.

    Args:
        run: A run with masks; images without one, or without ground truth, are left out.
        orders: Number of random orders.
    """
    data = reopen(run, None)
    samples = [one for one in data.samples if one.mask is not None and run.has_pseudo(one.id)]
    rows = _measured(run, samples, data.classes)
    before, after = _counts(run, samples, value_count(len(data.classes)))
    place = {one.id: index for index, one in enumerate(samples)}
    queue = [place[row.id] for row in review_queue(rows)]
    known = [place[row.id] for row in sorted(rows, key=_own_miou)]
    shuffled = random_orders(len(samples), orders)

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


def random_orders(images: int, count: int) -> list[list[int]]:
    """Return some orders of images, the same ones whenever it is asked."""
    rng = np.random.default_rng(0)
    return [rng.permutation(images).tolist() for _ in range(count)]


def queue_of(run: Run) -> list[str]:
    """Return the ids of a run's images in the order of the queue, as if none was corrected."""
    data = reopen(run, None)
    samples = [one for one in data.samples if run.has_pseudo(one.id)]
    return [row.id for row in review_queue(_measured(run, samples, data.classes))]


@dataclass(frozen=True)
class Again:
    """mIoU, in [0, 1], of the images that were not corrected: all, the even and the odd ones."""

    share: float
    images: int
    before: tuple[float, float, float]
    after: tuple[float, float, float]


def curve_again(
    queue: Sequence[str], tapes: Sequence[Tape], maker: CamMaker, row: Settings, classes: int
) -> list[Again]:
    """Return what the other images have of corrections that are learnt from, at each budget.

    Args:
        queue: Ids in the order in which images are corrected.
        tapes: The images, encoded.
        maker: Knows nothing yet.
        row: Its settings.
        classes: Number of classes.
    """
    place = {tape.photo.sample.id: k for k, tape in enumerate(tapes)}
    order = [place[id_] for id_ in queue]
    own = _masks_of(tapes, order, {}, maker, row)
    points = []
    for share in BUDGETS[1:]:
        first, rest = np.split(order, [round(share * len(tapes))])
        mended = {k: _truth(tapes[k]) for k in first.tolist()}
        again = _masks_of(tapes, rest.tolist(), mended, maker, row)

        def halves(masks: Mapping[int, UInt8Array]) -> tuple[float, float, float]:
            parts = (rest, rest[rest % 2 == 0], rest[rest % 2 == 1])  # noqa: B023  (used at once)
            all_, even, odd = (_miou(tapes, part.tolist(), masks, classes) for part in parts)
            return all_, even, odd

        points.append(Again(share, len(first), halves(own), halves(again)))
    return points


def table_again(points: Sequence[Again]) -> str:
    """Return the table, as Markdown."""
    lines = ["| corrected | images | the others, as they are | learnt again |", "|---|---|---|---|"]
    for point in points:
        before, after = (
            "{:.2f} ({:.2f} / {:.2f})".format(*(100 * score for score in scores))
            for scores in (point.before, point.after)
        )
        lines.append(f"| {100 * point.share:.0f} % | {point.images} | {before} | {after} |")
    return "\n".join(lines)


def _masks_of(
    tapes: Sequence[Tape],
    chosen: Iterable[int],
    drawn: Mapping[int, UInt8Array],
    maker: CamMaker,
    row: Settings,
) -> dict[int, UInt8Array]:
    """Return the masks of some images, in a run some of whose masks were drawn."""
    assert row.cam.patches is not None
    informed = learnt(maker, row.cam.patches, [tape.encoded for tape in tapes], drawn)
    return {
        k: tape_mask(tapes[k], informed.maps(tapes[k].encoded, in_statistics=True), row)
        for k in chosen
    }


def _miou(
    tapes: Sequence[Tape], chosen: Iterable[int], masks: Mapping[int, UInt8Array], classes: int
) -> float:
    matrix = ConfusionMatrix(value_count(classes))
    for k in chosen:
        matrix.update(_truth(tapes[k]), masks[k])
    return matrix.scores().miou


def _truth(tape: Tape) -> UInt8Array:
    assert tape.photo.sample.mask is not None
    return read_mask(tape.photo.sample.mask)


def _measured(run: Run, samples: Sequence[Sample], classes: Sequence[str]) -> list[Row]:
    with progress_bar("measure") as progress:
        rows, _ = measure_run(run, samples, classes, None, progress, use_corrected=False)
    return rows


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
