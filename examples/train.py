"""Stage 4: a DeepLab on confident pixels, on the output of ``refine.py``.

    python examples/train.py runs/by-hand 100

The backbone starts from random weights, to show the parts in one page; ``clipes train-seg`` starts
from ImageNet's and goes on where it stopped.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from clipes.config import get_segmenter_preset
from clipes.datasets import open_dataset
from clipes.device import choose_device
from clipes.disk.images import read_image, write_mask
from clipes.run.folder import Run
from clipes.seg.data import TrainingPair
from clipes.seg.deeplab_recipe import DeepLabRecipe
from clipes.seg.label import label_image
from clipes.seg.loss import Guidance
from clipes.seg.parallel import Processes
from clipes.seg.predict import Predictor
from clipes.seg.recipes import TestSettings
from clipes.seg.train import Trainer, TrainOptions


def main(out: str, iterations: str = "100") -> None:
    """Write ``out/checkpoints/final.pt`` and ``out/predictions/<id>.png``."""
    run, data = Run(Path(out)), open_dataset("examples")
    preset = get_segmenter_preset("small")
    preset = replace(preset, iterations=int(iterations), batch=4, freeze_norms=False)
    recipe = DeepLabRecipe(preset, data.classes, Guidance(threshold=0.95))
    pairs = [
        TrainingPair(s.id, s.image, run.pseudo_path(s.id), run.confidence_path(s.id))
        for s in data.samples
    ]
    device = choose_device("auto")
    torch.manual_seed(0)
    model = recipe.spec.build().to(device)
    trainer = Trainer(model, recipe, TrainOptions(), Processes(0, 1, device))
    trainer.run(
        recipe.examples(pairs, seed=0),
        run.root / "checkpoints",
        lambda step: print(f"{step.iteration}/{step.total}: loss {step.loss:.3f}"),
    )
    predictor = Predictor(model, TestSettings())
    for sample in data.samples:
        mask = label_image(read_image(sample.image), predictor)[0].mask
        write_mask(run.root / "predictions" / f"{sample.id}.png", mask)


if __name__ == "__main__":
    main(*sys.argv[1:])
