"""How much faster the dense CRF is than pydensecrf2, and how closely they agree.

    python benchmarks/crf.py [IMAGE ...] [--labels 3 21] [--runs 7] [--json]

Runs of numba and pydensecrf2 alternate on one core, with the default parameters; medians are
compared, on images of a size seen before, whose smoothness kernel is kept, and of a size that is
new in each run. Without images, one is made up: 375 x 500 pixels with the spectrum of a photo.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median

from clipes.bench.crf import compare_crf, synthetic_image
from clipes.disk.images import read_image
from clipes.errors import BackendError


def main() -> int:
    """Compare on all images given and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="*", type=Path, help="photos; default: a synthetic one")
    parser.add_argument("--labels", nargs="+", type=int, default=[3, 21])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    images = {str(path): read_image(path) for path in options.images}
    compared: dict[str, dict[str, dict[str, float]]] = {}
    failed = False
    for name, image in (images or {"synthetic": synthetic_image()}).items():
        compared[name] = {}
        for labels in options.labels:
            try:
                compared[name][str(labels)] = result = compare_crf(image, labels, options.runs)
            except BackendError as error:
                print(error, file=sys.stderr)
                failed = True
                continue
            if not options.json:
                print(
                    f"{name}, {image.shape[1]} x {image.shape[0]}, {labels} labels: "
                    f"{result['speedup']:.1f} times as fast ({result['speedup_new_size']:.1f} for "
                    f"a new size), {1e3 * result['seconds']:.0f} ms against "
                    f"{1e3 * result['seconds_pydensecrf2']:.0f} ms; labels agree for "
                    f"{result['label_agreement']:.4%}, probabilities to "
                    f"{result['max_difference']:.0e}"
                )
    if options.json:
        speedup = {
            str(labels): median(results[str(labels)]["speedup"] for results in compared.values())
            for labels in options.labels
            if not failed
        }
        print(json.dumps({"speedup": speedup, "images": compared}, indent=2))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
