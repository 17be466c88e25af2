"""Settings of ``relabel``, tried on what a segmenter says of a run's images, asked once.

    python benchmarks/relabel.py OUT/masks-default OUT/default-frozen-masks-0 ANSWERS
        [--shares 0.5 1] [--appearance 3 4] [--smoothness 3] [--reach 67] [--no-crf]

The run and the training are those of ``benchmarks/frozen.py``. Answers are kept in the folder
ANSWERS, those of each checkpoint in a folder of their own, in half precision (0.5 GB for 484
images), and are gone on with there. Printed is the mIoU of the given masks and of all combinations:
the segmenter's share in the maps, and of the dense CRF the Potts weight of the appearance kernel,
that of the smoothness kernel and the reach of the appearance kernel in pixels. To choose on half B
of voc_sample and confirm on half A, or the other way round.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from frozen import LEARNT, TRUTH, join

from clipes.cli.console import progress_bar
from clipes.config import RELABEL_SHARE, CrfParams
from clipes.disk.files import atomic_write, sha256_of
from clipes.disk.images import read_image, read_mask
from clipes.listener import Listener
from clipes.masks.scores import ConfusionMatrix
from clipes.masks.values import value_of
from clipes.run.folder import Run
from clipes.run.reopen import reopen
from clipes.seg.checkpoint import FINAL, load_checkpoint
from clipes.seg.kinds import predictor_for
from clipes.seg.label import FirstOpinion, label_image
from clipes.seg.recipes import LabelPredictor
from clipes.stages.token_source import TowerRequest, tokens_of
from clipes.types import Float32Array, Sample, UInt8Array


@dataclass(frozen=True)
class Answers:
    """What a segmenter said of images, as a segmenter of one of them.

    Attributes:
        folder: Where the answers are, one file an image.
        labels: Number of labels, background included.
        sample: The image that is asked about.
    """

    folder: Path
    labels: int
    sample: Sample

    @property
    def path(self) -> Path:
        """The image's file: (1 + K, H, W) float16, background and its classes in mask order."""
        return self.folder / f"{self.sample.id}.npy"

    @property
    def values(self) -> list[int]:
        """The labels that are kept."""
        return [0, *map(value_of, sorted(self.sample.labels))]

    def ask(self, predictor: LabelPredictor) -> None:
        """Keep what a segmenter says of the image."""
        probs = predictor(read_image(self.sample.image), self.sample.labels)
        with atomic_write(self.path) as unfinished, unfinished.open("wb") as file:
            np.save(file, probs[self.values].astype(np.float16))

    def __call__(self, image: UInt8Array, present: Sequence[int] | None = None) -> Float32Array:
        """Return what is kept; see ``LabelPredictor``."""
        probs = np.zeros((self.labels, *image.shape[:2]), np.float32)
        probs[self.values] = np.load(self.path)
        return probs


@dataclass(frozen=True)
class Setting:
    """One way of making masks of answers.

    Attributes:
        share: The segmenter's, in the maps.
        crf: Of the dense CRF; None for none.
    """

    share: float
    crf: CrfParams | None

    def cells(self) -> str:
        """Return the setting as a row begins."""
        if self.crf is None:
            return f"{self.share:g} | none | |"
        crf = self.crf
        return (
            f"{self.share:g} | {crf.bilateral_compat:g} | {crf.gaussian_compat:g} | "
            f"{crf.bilateral_sxy:g}"
        )


def settings_of(asked: argparse.Namespace, crf: CrfParams) -> Iterator[Setting]:
    """Return all combinations of what is asked for."""
    for share in asked.shares:
        if asked.no_crf:
            yield Setting(share, None)
        for weight, smooth, reach in product(asked.appearance, asked.smoothness, asked.reach):
            kernels = {"bilateral_compat": weight, "gaussian_compat": smooth}
            yield Setting(share, replace(crf, bilateral_sxy=reach, **kernels))


def ask_all(checkpoint: Path, answers: Sequence[Answers]) -> None:
    """Ask a segmenter about all images that there is no answer of yet."""
    todo = [one for one in answers if not one.path.exists()]
    if not todo:
        return
    saved = load_checkpoint(checkpoint)
    source = tokens_of(saved.spec, TowerRequest(), "cpu", Listener())
    predictor = predictor_for(saved.build(), saved.test, source)
    with progress_bar("answers") as progress:
        for done, one in enumerate(todo, start=1):
            one.ask(predictor)
            progress(done, len(todo))


def masks_of(run: Run, said: Answers, settings: Sequence[Setting]) -> Iterator[UInt8Array]:
    """Yield an image's given mask, then that of each setting."""
    sample = said.sample
    yield run.load_pseudo(sample.id).mask
    pixels, cams = read_image(sample.image), run.load_cams(sample.id)
    for one in settings:
        first = FirstOpinion(cams, one.share)
        yield label_image(pixels, said, one.crf, sample.labels, first)[0].mask


def score_all(
    run: Run,
    root: Path,
    ids: Mapping[str, Sequence[str]],
    answers: Sequence[Answers],
    settings: Sequence[Setting],
) -> list[list[str]]:
    """Return the mIoU in % of the given masks, then of each setting's, on all parts."""
    parts = {part: set(ids[part]) for part in LEARNT}
    matrices = [
        {part: ConfusionMatrix(answers[0].labels) for part in LEARNT}
        for _ in range(1 + len(settings))
    ]
    with progress_bar("masks") as progress:
        for done, said in enumerate(answers, start=1):
            truth = read_mask(root / TRUTH / f"{said.sample.id}.png")
            for matrix, mask in zip(matrices, masks_of(run, said, settings), strict=True):
                for part in LEARNT:
                    if said.sample.id in parts[part]:
                        matrix[part].update(truth, mask)
            progress(done, len(answers))
    return [[f"{100 * of[part].scores().miou:.2f}" for part in LEARNT] for of in matrices]


def main() -> None:
    """Ask, make masks in every way that is asked for, and print the table."""
    usual = CrfParams().of_segmenter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run with masks")
    parser.add_argument("training", type=Path, help="folder of a training")
    parser.add_argument("answers", type=Path, help="where answers are kept")
    parser.add_argument("--shares", type=float, nargs="+", default=[RELABEL_SHARE])
    for name, default in (
        ("appearance", usual.bilateral_compat),
        ("smoothness", usual.gaussian_compat),
        ("reach", usual.bilateral_sxy),
    ):
        parser.add_argument(f"--{name}", type=float, nargs="+", default=[default])
    parser.add_argument("--no-crf", action="store_true", help="also without the CRF")
    asked = parser.parse_args()
    run = Run(asked.run)
    data, refined = reopen(run, None), run.refine_record()
    if (ids := join(data.root)) is None:
        return
    checkpoint = asked.training / "checkpoints" / FINAL
    folder, labels = asked.answers / sha256_of(checkpoint)[:12], 1 + len(data.classes)
    answers = [Answers(folder, labels, sample) for sample in data.samples]
    ask_all(checkpoint, answers)
    settings = list(settings_of(asked, usual if refined is None else refined.settings.crf))
    given, *rows = score_all(run, data.root, ids, answers, settings)
    print(f"\n| share | appearance | smoothness | reach | {' | '.join(LEARNT)} |")
    print(f"{'|---' * (4 + len(LEARNT))}|\n| given | | | | {' | '.join(given)} |")
    for one, row in zip(settings, rows, strict=True):
        print(f"| {one.cells()} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
