"""A small run folder on disk, without CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clipes.config import get_preset
from clipes.disk.images import write_mask
from clipes.run.folder import Run
from clipes.types import IGNORE, CamMaps, PseudoLabel

CLASSES = ("cat", "dog & <b>wolf</b>", "bird")


@dataclass(frozen=True)
class Made:
    """A run and the random arrays that it was made of, by id."""

    run: Run
    photos: Path
    pseudo: dict[str, PseudoLabel]
    truth: dict[str, np.ndarray]


def make_run(
    folder: Path,
    images: Mapping[str, tuple[int, ...]],
    size: tuple[int, int] = (48, 64),
    *,
    refined: bool = True,
    truth: bool = True,
    note: str = "",
) -> Made:
    """Make photos of noise with these labels by id, and the run of them."""
    photos, run = folder / "photos", Run(folder / "run")
    (photos / "images").mkdir(parents=True)
    made = Made(run, photos, {}, {})
    for number, (id_, labels) in enumerate(images.items()):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / "images" / f"{id_}.png")
        values = np.array([0, *(label + 1 for label in labels)], np.uint8)
        maps = rng.random((len(labels), 3, 4), dtype=np.float32)
        run.save_cams(id_, CamMaps(np.array(labels, np.int64), maps, size))
        if refined:
            confidence = 1 - 10 ** rng.uniform(-6, 0, size)
            made.pseudo[id_] = PseudoLabel(rng.choice(values, size), confidence.astype(np.float32))
            run.save_pseudo(id_, made.pseudo[id_])
        if truth:
            made.truth[id_] = rng.choice(values, size)
            made.truth[id_][0, 0] = IGNORE
            write_mask(photos / "masks" / f"{id_}.png", made.truth[id_])
    (photos / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    rows = [f'"{id_}.png",{";".join(CLASSES[k] for k in ks)}' for id_, ks in images.items()]
    (photos / "labels.csv").write_text("\n".join(["image,labels", *rows]) + "\n", encoding="utf-8")
    settings = {
        "dataset": "folder",
        "split": None,
        "labels": None,
        "classes": list(CLASSES),
        "preset": get_preset("default").to_dict(),
        "weights": {"name": "registry", "sha256": "0" * 64},
        "text": {"sha256": "0" * 64, "note": note},
    }
    run.begin("cam", settings, "clipes cam <x>", {"root": str(photos), "device": "cpu"})
    return made
