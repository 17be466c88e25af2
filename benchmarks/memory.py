"""Peak memory of every stage for few and for many images: it must not grow with their number.

    python benchmarks/memory.py [--counts 200 2000]

Small copies of the bundled photos, each with a mask, go through cam, refine, eval, report and
export, each in a process of its own, on the registry's weights. Peak resident memory is that of the
largest process of a stage.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from clipes.datasets.examples import open_examples
from clipes.disk.images import read_image, write_mask

_SIZE = (96, 64)  # width, height
_STAGES = (
    ("check", "--dataset", "folder", "--root", "DATA"),
    ("cam", "--dataset", "folder", "--root", "DATA", "--weights", "registry", "--out", "RUN"),
    ("refine", "RUN"),
    ("eval", "RUN"),
    ("report", "RUN"),
    ("export", "RUN", "--format", "coco"),
)


def main() -> None:
    """Print a row for each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 2000])
    counts = parser.parse_args().counts
    peaks = {count: _peaks(count) for count in counts}
    print("stage   ", *(f"{count:>7} images" for count in counts))
    for number, (stage, *_) in enumerate(_STAGES):
        print(f"{stage:8}", *(f"{peaks[count][number]:>10.0f} MiB" for count in counts))


def _peaks(count: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        root, run = Path(folder, "data"), Path(folder, "run")
        _make_data(root, count)
        places = {"DATA": str(root), "RUN": str(run)}
        return [_peak([places.get(word, word) for word in stage]) for stage in _STAGES]


def _make_data(root: Path, count: int) -> None:
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    samples = open_examples().samples
    pictures = [
        Image.fromarray(read_image(sample.image)).resize(_SIZE, Image.Resampling.BOX)
        for sample in samples
    ]
    rows = ["image,labels"]
    for number in range(count):
        which = number % len(samples)
        name = f"{number:06}"
        pictures[which].save(root / "images" / f"{name}.jpg")
        write_mask(root / "masks" / f"{name}.png", np.zeros(_SIZE[::-1], np.uint8))
        rows.append(f"{name}.jpg,{samples[which].labels[0]}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    (root / "classes.txt").write_text("\n".join(open_examples().classes) + "\n")


def _peak(arguments: list[str]) -> float:
    # Python reports the largest of all children so far, so each stage has a parent of its own.
    code = (
        "import resource, subprocess, sys;"
        "subprocess.run([sys.executable, '-m', 'clipes', *sys.argv[1:]], check=True,"
        " stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return int(done.stdout) * unit / 2**20


if __name__ == "__main__":
    main()
