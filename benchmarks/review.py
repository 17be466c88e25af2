"""How well the review queue of a report finds bad masks, held to ground truth.

    python benchmarks/review.py [--run RUN | --preset default] [--choose]

Takes a finished run of voc_sample (or of anything with ground truth), else makes one as
``benchmarks/voc_sample.py`` does. Bad are the fifth of the images with the lowest mIoU. Printed for
the score and for each sign alone: the area under the ROC curve (chance: 0.5), the share of the bad
images among the first fifth of the queue (chance: 20 %), and Spearman's correlation with the mIoU,
each on the even images, on the odd ones and on all. ``--choose`` looks for the best weights on the
even images, and on the odd ones, and holds each to the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from common import run_options, run_to_look_at

from clipes.cli.console import progress_bar
from clipes.report.measure import Row
from clipes.report.review import (
    AMBIGUOUS,
    CONTESTED,
    DISAGREEMENT,
    DRIFT,
    EMPTY,
    FULL,
    FULL_AREA,
    SCARCITY,
    TINY,
    UNSURE,
    Signs,
    score,
)
from clipes.run.folder import Run
from clipes.run.reopen import reopen
from clipes.stages.report import measure_run

Values = npt.NDArray[np.float64]
Chosen = npt.NDArray[np.bool_]

_BAD = 0.2  # share of the images
_BEST = 20  # weights of about the same quality are averaged, or chance would choose
_GRID = {
    "unsure": (0.0, 10.0, 20.0, 40.0, 80.0),
    "ambiguous": (0.0, 2.0, 4.0, 8.0, 16.0),
    "disputed": (0.0, 0.1, 0.2, 0.5, 1.0),
    "drift": (0.0, 0.5, 1.0, 2.0),
    "tiny": (0.0, 0.6, 1.2, 2.4),
    "full": (0.0, 0.3, 0.6, 1.2),
    "contested": (0.0, 1.0, 2.0, 4.0),
    "empty": (2.0,),
    "scarcity": (2.0,),
}


def main() -> None:
    """Print a row for the score and for each sign."""
    parser = run_options(__doc__)
    parser.add_argument("--choose", action="store_true", help="also look for the best weights")
    options = parser.parse_args()
    with run_to_look_at(options) as run:
        if run is not None:
            judge(run, choose=options.choose)


def judge(run: Run, *, choose: bool) -> None:
    """Measure a run and print the tables."""
    data = reopen(run, None)
    present = set(run.ids("cams"))
    samples = [item for item in data.samples if item.id in present]
    with progress_bar("measure") as progress:
        rows, _ = measure_run(run, samples, data.classes, None, progress)
    usable = [row for row in rows if row.miou is not None and row.signs is not None]
    miou = np.array([row.miou for row in usable])
    even = np.arange(len(usable)) % 2 == 0
    halves = (even, ~even, even | ~even)
    print(f"{len(usable)} images, mIoU of an image {100 * miou.mean():.1f} % in the mean")
    print(f"{'':12}{'even images':22}{'odd images':22}all")
    print(f"{'':12}" + "AUC   found corr.     " * 3)
    table(usable, miou, halves)
    if choose:
        signs = {name: np.array([_sign(row.signs, name) for row in usable]) for name in _GRID}
        for chosen, name in ((even, "even"), (~even, "odd")):
            weights = best_weights(signs, miou, chosen)
            print(f"\nchosen on the {name} images: {_words(weights)}")
            line("this score", weighted(signs, weights), miou, halves)


def table(rows: Sequence[Row], miou: Values, halves: Iterable[Chosen]) -> None:
    """Print a line for the score, and for each sign alone that occurs at all."""
    found = [row.signs for row in rows if row.signs is not None]
    halves = tuple(halves)
    line("score", np.array([score(signs) for signs in found]), miou, halves)
    for name in _GRID:
        values = np.array([_sign(signs, name) for signs in found])
        if values.any():
            line(name, values, miou, halves)


def line(name: str, values: Values, miou: Values, halves: Iterable[Chosen]) -> None:
    """Print how well some values tell the bad images."""
    cells = []
    for half in halves:
        bad = is_bad(miou[half])
        corr = -spearman(values[half], miou[half])
        cells.append(
            f"{auc(values[half], bad):.3f} {100 * found_first(values[half], bad):3.0f} % {corr:.2f}"
        )
    print(f"{name:12}" + "      ".join(cells))


def is_bad(miou: Values) -> Chosen:
    """Tell which images are the fifth with the lowest mIoU."""
    bad = np.zeros(len(miou), np.bool_)
    bad[np.argsort(miou, kind="stable")[: round(_BAD * len(miou))]] = True
    return bad


def auc(values: Values, bad: Chosen) -> float:
    """Return how often a bad image has a higher value than another, ties being half."""
    worse, better = values[bad][:, None], values[~bad][None]
    return float((worse > better).mean() + (worse == better).mean() / 2)


def found_first(values: Values, bad: Chosen) -> float:
    """Return the share of the bad images among as many of the highest values."""
    first = np.argsort(-values, kind="stable")[: bad.sum()]
    return float(bad[first].sum() / bad.sum())


def spearman(one: Values, other: Values) -> float:
    """Return the correlation of the ranks, ties in order."""
    ranks = [np.argsort(np.argsort(values, kind="stable")) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def weighted(signs: Mapping[str, Values], weights: Mapping[str, float]) -> Values:
    """Return the score of each image with these weights."""
    return np.sum([weight * signs[name] for name, weight in weights.items()], axis=0)


def best_weights(signs: Mapping[str, Values], miou: Values, chosen: Chosen) -> dict[str, float]:
    """Return the mean of the weights that tell the bad among the chosen images best."""
    bad = is_bad(miou[chosen])
    some = {name: values[chosen] for name, values in signs.items()}
    tried = [dict(zip(_GRID, values, strict=True)) for values in itertools.product(*_GRID.values())]
    tried.sort(key=lambda weights: -auc(weighted(some, weights), bad))
    return {name: float(np.mean([one[name] for one in tried[:_BEST]])) for name in _GRID}


def _sign(signs: Signs | None, name: str) -> float:
    if signs is None:
        raise ValueError("an image without signs has no score")
    if name == "full":
        return float(signs.labelled > FULL_AREA)
    return float(getattr(signs, name) or 0.0)


def _words(weights: Mapping[str, float]) -> str:
    shipped = (UNSURE, AMBIGUOUS, DISAGREEMENT, DRIFT, TINY, FULL, CONTESTED, EMPTY, SCARCITY)
    pairs = zip(weights.items(), shipped, strict=True)
    return ", ".join(f"{name} {value:.2f} (shipped {now:g})" for (name, value), now in pairs)


if __name__ == "__main__":
    main()
