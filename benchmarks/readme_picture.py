"""Make the README's picture from a run: image, map, mask and confidence of some images.

Run ``clipes demo`` first, then this with the run folder, the picture to write and image ids, as in
``runs/examples docs/example.jpg cat astronaut``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from clipes.disk.images import read_image
from clipes.report.overlays import CONFIDENCE, heat_overlay, mask_overlay, ramp
from clipes.run.folder import Run
from clipes.run.reopen import reopen

HEIGHT, GAP = 260, 6


def row(run: Run, image_id: str, path: Path) -> Image.Image:
    """Return the pictures of one image side by side, ``HEIGHT`` pixels high."""
    image = read_image(path)
    pseudo = run.load_pseudo(image_id)
    heat = heat_overlay(image, run.load_cams(image_id).maps.max(0))
    confidence = ramp(CONFIDENCE, pseudo.confidence)
    pictures = [image, heat, mask_overlay(image, pseudo.mask), confidence]
    width = round(image.shape[1] * HEIGHT / image.shape[0])
    small = [Image.fromarray(picture).resize((width, HEIGHT)) for picture in pictures]
    return stack(small, axis=0)


def stack(pictures: list[Image.Image], axis: int) -> Image.Image:
    """Put pictures beside (axis 0) or below (axis 1) each other, on white."""
    ends = np.cumsum([picture.size[axis] + GAP for picture in pictures])
    across = max(picture.size[1 - axis] for picture in pictures)
    size = (int(ends[-1]) - GAP, across) if axis == 0 else (across, int(ends[-1]) - GAP)
    page = Image.new("RGB", size, "white")
    for picture, start in zip(pictures, (0, *ends), strict=False):
        page.paste(picture, (int(start), 0) if axis == 0 else (0, int(start)))
    return page


def main(folder: str, target: str, *ids: str) -> None:
    """Write the picture of the images ``ids`` of a run."""
    run = Run(Path(folder))
    paths = {sample.id: sample.image for sample in reopen(run, None).samples}
    rows = [row(run, image_id, paths[image_id]) for image_id in ids]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    stack(rows, axis=1).save(target, quality=88)


if __name__ == "__main__":
    main(*sys.argv[1:])
