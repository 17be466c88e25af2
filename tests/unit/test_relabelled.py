"""Which masks of ``relabelled/`` are done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from clipes.disk.images import read_mask, write_confidence, write_mask
from clipes.run.folder import Run
from clipes.run.origin import read_picture
from clipes.run.record import RelabelSettings
from clipes.run.relabelled import Relabelled
from clipes.types import PseudoLabel, Sample

SETTINGS = RelabelSettings("sha256", (1.0,), flip=False, window=512, crf=None)


def test_a_mask_beside_the_confidence_map_of_another_making_is_made_again(tmp_path: Path) -> None:
    sample = Sample("a", tmp_path / "a.png", (0,))
    Image.new("RGB", (9, 8)).save(sample.image)
    picture = read_picture(sample.image)[1]
    run, sure = Run(tmp_path / "run"), np.ones((8, 9), np.float32)
    first = Relabelled(run, SETTINGS)
    second = Relabelled(run, replace(SETTINGS, flip=True))
    mask, confidence = first.files.pseudo_path("a"), first.files.confidence_path("a")

    def make(settings: Relabelled) -> None:
        pseudo = PseudoLabel(np.ones((8, 9), np.uint8), sure)
        settings.files.save_pseudo("a", pseudo, origin=settings.origin(sample, picture).text())

    make(first)
    assert first.is_done(sample)
    # Made again with other settings, but killed between the two files.
    write_confidence(confidence, sure, origin=second.origin(sample, picture).text())
    told = "its mask and its confidence map were not made together"
    assert first.stale(sample) == told
    assert first.unusable(sample) == f"{told}; run 'clipes relabel' again"
    assert not first.is_edited(sample)
    assert not second.is_done(sample)
    for settings in (second, first):
        make(settings)
        assert settings.is_done(sample)
    write_confidence(confidence, sure)  # one that says nothing
    assert first.is_done(sample)
    make(first)
    write_mask(mask, read_mask(mask))  # an edited mask goes by its confidence map
    assert first.is_done(sample)
    assert first.is_edited(sample)
