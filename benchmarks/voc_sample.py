"""CAM and CRF mIoU on the real VOC sample, with the text features the reference was scored with.

    python benchmarks/voc_sample.py [--preset reference] [--limit N] [--out RUN]

Runs ``clipes cam``, ``refine`` and ``eval`` as a user would. Weights: registry. Text features and
background rows: as in docs/weights.md, where the reference's own scores are (66.50 CAM, 68.57
with CRF).
"""

from __future__ import annotations

from common import run_stages, sample, stage_options


def main() -> None:
    """Run the stages and print the scores."""
    options = stage_options(__doc__)
    data = sample("voc_sample")
    if data is not None:
        ids = (data / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
        run_stages("voc", data, ids, options)


if __name__ == "__main__":
    main()
