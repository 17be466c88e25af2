"""CAM and CRF mIoU on the real COCO sample: 60 images, 80 classes, published text features.

    python benchmarks/coco_sample.py [--preset reference] [--limit N] [--out RUN]

Runs ``clipes cam``, ``refine`` and ``eval`` as a user would, lambda being COCO's 0.7. Weights:
registry. Text features: the first 80 rows of coco_single.npy; background rows as in
docs/weights.md, less the keyboard, which is a class of COCO.
"""

from __future__ import annotations

from common import run_stages, sample, stage_options


def main() -> None:
    """Run the stages and print the scores."""
    options = stage_options(__doc__)
    data = sample("coco_sample")
    if data is not None:
        ids = [line.split()[0] for line in (data / "labels.txt").read_text().splitlines()]
        run_stages("coco", data, ids, options)


if __name__ == "__main__":
    main()
