"""Stage 2: maps and photos to masks and confidence, on the output of ``maps.py``; needs no CLIP.

python examples/refine.py runs/by-hand
"""

from __future__ import annotations

import sys
from pathlib import Path

import clipes


def main(out: str) -> None:
    """Write ``out/pseudo/<id>.png`` and ``out/confidence/<id>.png`` for every example."""
    run = clipes.Run(Path(out))
    crf = clipes.get_preset("default").crf
    for sample in clipes.open_dataset("examples").samples:
        pseudo = clipes.pseudo_label(clipes.read_image(sample.image), run.load_cams(sample.id), crf)
        run.save_pseudo(sample.id, pseudo)
        print(f"{sample.id}: {(pseudo.mask > 0).mean():.0%} of the pixels are labelled")


if __name__ == "__main__":
    main(*sys.argv[1:])
