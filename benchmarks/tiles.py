"""Large pictures in tiles: time and peak memory of cam, refine and predict, and where seams show.

    python benchmarks/tiles.py [--size 3000 2000] [--tile 1024] [--preset fast] [--segmenter FILE]

A picture is made of bundled photos side by side, a second one by cutting some rows and columns off
its top and left, so that no border of a tile stays where it was. Both go through the stages, each
in a process of its own, on the registry's weights. What is printed is the share of the pixels in
both whose masks differ: what depends on where tiles lie, and on where patches and the picture's own
borders lie, which are the only difference without tiles (``--tile`` larger than the picture). If
seams are to blame, more of them differ within 64 pixels of where a tile ends than elsewhere: both
shares are printed beside it. For ``refine`` alone the same maps are refined once more in tiles of
7/8 of the size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from clipes.datasets.examples import open_examples
from clipes.disk.images import read_image, read_mask
from clipes.masks.mosaic import Tiles
from clipes.stages.refine_tiles import CRF_TILE

_CELL = 500  # pixels along a photo
_CUT = 276  # pixels: no multiple of what tiles are apart, of a patch, or of a photo
_NEAR = 64  # pixels


def main() -> None:
    """Make the pictures, run the stages, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=[3000, 2000], help="width, height")
    parser.add_argument("--tile", type=int, help="as of the stages")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--segmenter", type=Path, help="a checkpoint, for predict")
    options = parser.parse_args()
    tile = ["--tile", str(options.tile)] if options.tile else []
    with tempfile.TemporaryDirectory() as folder:
        root, run, out = Path(folder, "data"), Path(folder, "run"), Path(folder, "predicted")
        make_pictures(root, *options.size)
        cam = ["cam", "--dataset", "folder", "--root", str(root), "--weights", "registry"]
        measured(*cam, "--preset", options.preset, "--out", str(run), "--workers", "1", *tile)
        measured("refine", str(run), "--workers", "1", *tile)
        print(f"cam and refine: {differing(run / 'pseudo', options.tile)}")
        other = same_maps(run, Path(folder, "other"))
        measured("refine", str(other), "--tile", str((options.tile or CRF_TILE) * 7 // 8))
        masks = [read_mask(one / "pseudo" / "whole.png") for one in (run, other)]
        print(f"refine alone: {float((masks[0] != masks[1]).mean()):.3%} of the pixels differ")
        if options.segmenter:
            weights = ["--weights", "registry", "--dino", "registry"]
            images = str(root / "images")
            measured("predict", str(options.segmenter), images, "--out", str(out), *weights, *tile)
            print(f"predict: {differing(out, options.tile)}")


def make_pictures(root: Path, width: int, height: int) -> None:
    """Write ``whole.tif``, ``cut.tif`` and their labels."""
    (root / "images").mkdir(parents=True)
    data = open_examples()
    photos = [cv2.resize(read_image(sample.image), (_CELL, _CELL)) for sample in data.samples]
    whole = np.zeros((height, width, 3), np.uint8)
    for down, top in enumerate(range(0, height, _CELL)):
        for right, left in enumerate(range(0, width, _CELL)):
            cell = whole[top : top + _CELL, left : left + _CELL]
            cell[:] = photos[(2 * down + right) % len(photos)][: cell.shape[0], : cell.shape[1]]
    for name, picture in (("whole", whole), ("cut", whole[_CUT:, _CUT:])):
        Image.fromarray(picture).save(root / "images" / f"{name}.tif", compression="tiff_lzw")
    shown = {data.classes[label] for sample in data.samples for label in sample.labels}
    rows = [f"{name}.tif,{';'.join(sorted(shown))}" for name in ("whole", "cut")]
    (root / "labels.csv").write_text("\n".join(["image,labels", *rows]) + "\n")


def same_maps(run: Path, other: Path) -> Path:
    """Return a run folder ``other`` with the maps of a run, and no masks."""
    shutil.copytree(run / "cams", other / "cams")
    record = json.loads((run / "run.json").read_text())
    del record["stages"]["refine"]
    (other / "run.json").write_text(json.dumps(record))
    return other


def measured(*command: str) -> None:
    """Run a command of clipes and print how long it took and what it took at most."""
    code = (
        "import resource, subprocess, sys;"
        "done = subprocess.run([sys.executable, '-m', 'clipes', *sys.argv[1:]],"
        " stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss);"
        "sys.exit(done.returncode)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True
    )
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    peak = int(done.stdout) * unit / 2**30
    print(f"{command[0]}: {time.perf_counter() - start:.0f} s, {peak:.2f} GiB at most")


def differing(folder: Path, tile: int | None) -> str:
    """Say which share of the pixels in both masks differs, near where tiles end and elsewhere."""
    whole, cut = read_mask(folder / "whole.png"), read_mask(folder / "cut.png")
    differs = whole[_CUT:, _CUT:] != cut
    said = f"{differs.mean():.2%} of the pixels differ"
    if tile is None or tile >= max(whole.shape):
        return said
    near = (seams(whole.shape, tile)[_CUT:, _CUT:]) | seams(cut.shape, tile)
    return f"{said}, {differs[near].mean():.2%} near seams ({near.mean():.0%} of all), " + (
        f"{differs[~near].mean():.2%} elsewhere"
    )


def seams(size: tuple[int, ...], side: int) -> npt.NDArray[np.bool_]:
    """Return which pixels (H, W) of a picture are near to where a tile ends inside it."""
    near = np.zeros(size, bool)
    tiles = Tiles.of((size[0], size[1]), side)
    for across, parts in ((near, tiles.rows), (near.T, tiles.columns)):
        for end in (end for part in parts for end in (part.start, part.stop)):
            if 0 < end < len(across):
                across[max(0, end - _NEAR) : end + _NEAR] = True
    return near


if __name__ == "__main__":
    main()
