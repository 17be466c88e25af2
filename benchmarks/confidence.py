"""How much of the masks a confidence keeps, and how right that part is: a picture and a table.

    python benchmarks/confidence.py RUN [RUN ...] --gt DIR [--out docs/coverage.png]

RUN: folder after ``clipes refine``; ``NAME=RUN`` names its line, which has the name of its preset
otherwise. DIR: ground truth, ``<id>.png``; images without are left out. For each cut the pixels
whose confidence reaches it are kept: the picture shows their share (coverage), how many of them
carry the right label, and their mIoU. The expected calibration error (ECE) is the mean distance
between confidence and accuracy over the pixels, in 15 steps of confidence of equal width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipes.disk.files import atomic_write
from clipes.disk.images import read_mask
from clipes.errors import ArtifactError, ClipesError
from clipes.masks.scores import ConfusionMatrix, Scores
from clipes.run.folder import Run
from clipes.run.reopen import preset_of
from clipes.stages.evaluate import confident
from clipes.types import IGNORE

MARKED = (0.5, 0.9, 0.95, 0.99, 0.999)
"""Cuts that the table lists and the picture marks."""

CUTS = tuple(sorted({0.0, 0.7, 0.8, 0.98, 0.995, 0.9975, 0.9995, *MARKED}))
"""Cuts that the lines go through."""

_BINS = 15
_COLOURS = ("#0072b2", "#d55e00", "#007f5c", "#a04c80")  # told apart by the colour-blind, too
_STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Curve:
    """What one run's confidence is worth.

    Attributes:
        name: Name of the run.
        points: Scores of the pixels kept, by cut; cuts that keep nothing have none.
        calibration_error: ECE, in [0, 1].
    """

    name: str
    points: dict[float, Scores]
    calibration_error: float


def measure(name: str, run: Run, gt: Path, cuts: Sequence[float] = CUTS) -> Curve:
    """Score the masks of a run at every cut.

    Args:
        name: Name of its line.
        run: The run folder.
        gt: Folder of ground-truth masks ``<id>.png``.
        cuts: Confidences.

    Raises:
        ArtifactError: No refined image has ground truth.
    """
    classes = run.cam_record().settings.classes
    matrices = {cut: ConfusionMatrix(1 + len(classes)) for cut in cuts}
    sums = np.zeros((3, _BINS))  # pixels, right ones, confidence
    for id_ in run.ids("pseudo"):
        path = gt / f"{id_}.png"
        if not path.is_file():
            continue
        truth, pseudo = read_mask(path), run.load_pseudo(id_)
        for cut, matrix in matrices.items():
            matrix.update(truth, confident(pseudo, cut))
        known = truth != IGNORE
        sums += calibration_sums(pseudo.confidence[known], (pseudo.mask == truth)[known])
    if not sums[0].sum():
        raise ArtifactError(
            f"no refined image of {run.root} has ground truth in {gt}", "check both folders"
        )
    points = {cut: matrix.scores() for cut, matrix in matrices.items() if matrix.counts.any()}
    return Curve(name, points, calibration_error(sums))


def calibration_sums(
    confidence: npt.NDArray[np.floating], right: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Return (3, bins): pixels, right pixels and the sum of confidences in each bin."""
    bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    weights = (None, right.astype(np.float64), confidence.astype(np.float64))
    return np.stack([np.bincount(bins, weight, _BINS).astype(np.float64) for weight in weights])


def calibration_error(sums: npt.NDArray[np.float64]) -> float:
    """Return the ECE of what ``calibration_sums`` counts."""
    pixels, right, confidence = sums
    return float(np.abs(right - confidence).sum() / pixels.sum())


def table(curves: Sequence[Curve]) -> str:
    """Return the Markdown table of the marked cuts."""
    lines = ["| | cut | coverage | pixel accuracy | mIoU | ECE |", "| --- | " + "---: | " * 5]
    lines[1] = lines[1].rstrip()
    for curve in curves:
        for cut in (0.0, *MARKED):
            if cut not in curve.points:
                continue
            kept = curve.points[cut]
            shares = (kept.coverage, kept.pixel_accuracy, kept.miou)
            cells = [f"{100 * share:.2f}" for share in shares]
            error = "" if cut else f"{100 * curve.calibration_error:.2f}"
            name = "" if cut else curve.name
            lines.append(f"| {name} | {f'{cut:g}' if cut else 'all'} | {' | '.join(cells)} "
                         f"| {error} |")  # fmt: skip
    return "\n".join(lines)


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draw accuracy and mIoU against coverage, a line for each run, into a PNG file."""
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    _lines(axes[0], curves, "pixel accuracy of the pixels kept, %", "pixel_accuracy")
    _lines(axes[1], curves, "mIoU of the pixels kept, %", "miou")
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        figure.savefig(file, dpi=150, format="png", facecolor="white")
    pyplot.close(figure)


def _lines(axes: Any, curves: Sequence[Curve], title: str, value: str) -> None:  # noqa: ANN401
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("coverage: pixels kept, %")
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for number, curve in enumerate(curves):
        colour, style = _COLOURS[number % 4], _STYLES[number % 4]
        cuts = sorted(curve.points)
        across = [100 * curve.points[cut].coverage for cut in cuts]
        up = [100 * float(getattr(curve.points[cut], value)) for cut in cuts]
        axes.plot(across, up, style, color=colour, linewidth=1.8)
        marked = [k for k, cut in enumerate(cuts) if cut in MARKED]
        axes.plot([across[k] for k in marked], [up[k] for k in marked], "o", color=colour,
                  markersize=5)  # fmt: skip
        middle = (np.mean(across[-2:]), np.mean(up[-2:]))
        axes.annotate(curve.name, middle, (-4, -2), textcoords="offset points", ha="right",
                      va="top", color=colour, fontweight="bold")  # fmt: skip
        if number == len(curves) - 1:
            # Neighbours on opposite sides of the line, which falls to the right.
            for side, k in enumerate(marked):
                below = side % 2 == 1
                offset, ha, va = ((-5, -3), "right", "top") if below else ((5, 1), "left", "bottom")
                axes.annotate(f"{cuts[k]:g}", (across[k], up[k]), offset, ha=ha, va=va,
                              textcoords="offset points", color="#404040", fontsize=9)  # fmt: skip
    axes.set_xlim(right=103)


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN")
    parser.add_argument("--gt", type=Path, required=True, help="folder of ground-truth masks")
    parser.add_argument("--out", type=Path, help="also draw the curves into this PNG file")
    options = parser.parse_args()
    curves = []
    for given in options.runs:
        name, _, folder = given.rpartition("=")
        run = Run(Path(folder))
        print(f"measuring {folder}", file=sys.stderr, flush=True)
        curves.append(measure(name or preset_of(run).name, run, options.gt))
    print(table(curves))
    if options.out:
        draw(curves, options.out)


if __name__ == "__main__":
    try:
        main()
    except ClipesError as error:
        sys.exit(str(error))
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        sys.exit("the picture needs matplotlib: pip install matplotlib")
