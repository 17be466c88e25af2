"""Which words would make good background, by a run's own maps: no ground truth is looked at.

    python benchmarks/background.py [--data coco_sample|voc_sample] [--run RUN]

Candidates are the words of which a published vector is there, less those that are the background
already, that share a word with a class, or that are too near to one. A finished run (preset
``default``, with the published background words; made if none is named) says where classes are.
Then each patch is compared with the classes of its image and all words at once. Printed is each
word's mean share far from all classes (all maps below 0.3), inside them (a map above 0.7), the
first's part of the sum of both, and the number of images where it is the first of 5 % of the
patches far away. Those of at least 0.5 in at least two images are marked: the further background
words of prompts/coco.toml were read off there; see docs/prompts.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from common import make_maps, published_words, sample, write_text_features
from torch import Tensor

from clipes.cli.options import listener
from clipes.config import get_preset
from clipes.disk.images import read_image
from clipes.maps.evidence import look
from clipes.names import folded
from clipes.run.folder import Run
from clipes.stages.cam import ClipRequest, DataRequest
from clipes.stages.setup import Clip, load_clip
from clipes.types import Sample
from clipes.words.check import rivals
from clipes.words.vocabulary import Vocabulary

NEAR = 0.9  # cosine to a class
FAR, INSIDE = 0.3, 0.7  # largest map
PART, FIRST, IMAGES = 0.5, 0.05, 2


def candidates(clip: Clip, vocabulary: Vocabulary) -> tuple[list[str], Tensor]:
    """Return the words that might become background, and their unit vectors (W, E)."""
    known = {*map(folded, clip.text.background_words), "background"}
    vectors = {
        word: torch.from_numpy(row)
        for word, row in published_words().items()
        if folded(word) not in known and not any(rivals(word, vocabulary))
    }
    unit = F.normalize(torch.stack([*vectors.values()]).float(), dim=1)
    free = (unit @ torch.from_numpy(clip.text.class_vectors).T).amax(1) <= NEAR
    return [word for word, is_free in zip(vectors, free, strict=True) if is_free], unit[free]


def shares(
    clip: Clip, run: Run, data: Sequence[Sample], words: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (I, W) shares far from classes and inside them, and of patches where a word is first.

    Args:
        clip: The tower and the vectors of classes and background.
        run: Has the maps.
        data: The images.
        words: (W, E) unit vectors of candidates.
    """
    params = get_preset("default").cam
    assert params.patches is not None
    background = torch.from_numpy(clip.text.background_vectors)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for item in data:
        cams = run.load_cams(item.id)
        pixels = clip.towers.prepare(read_image(item.image), params.max_patches)
        (seen,) = look(clip.towers, params, {name: one[None] for name, one in pixels.items()})
        classes = torch.from_numpy(clip.text.class_vectors[cams.labels])
        against = torch.cat([classes, background, words])
        odds = [
            params.patches.temperature * (one.cpu().float() @ against.T) for one in seen.features
        ]
        probs = torch.stack([one.softmax(1) for one in odds]).mean(0)[:, -len(words) :]
        surest = torch.from_numpy(cams.maps.astype(np.float32))[None]
        surest = F.interpolate(surest, seen.grid, mode="area")[0].amax(0).flatten()
        far, inside = probs[surest < FAR], probs[surest > INSIDE]
        first = torch.bincount(far.argmax(1), minlength=len(words)) / max(1, len(far))
        found.append((far.mean(0), inside.mean(0), first))
    far, inside, first = (torch.stack(column) for column in zip(*found, strict=True))
    return far, inside, first


def main() -> None:
    """Print the words, those of the largest share far from classes first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", choices=("coco_sample", "voc_sample"), default="coco_sample")
    parser.add_argument("--run", type=Path, help="a finished run of it")
    asked = parser.parse_args()
    root, kind = sample(asked.data), asked.data.split("_")[0]
    if root is None:
        return
    images = DataRequest(kind, root=root)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.npz")
        write_text_features(text, kind)
        run = Run(asked.run or Path(folder, "run"))
        if asked.run is None:
            make_maps(images, text, "default", run)
        vocabulary, data = images.open()
        clip = load_clip(ClipRequest("registry", text_features=text), vocabulary, listener())
        words, vectors = candidates(clip, vocabulary)
        far, inside, first = shares(clip, run, data.samples, vectors)
    print(f"{len(words)} candidates\n\n| word | far | inside | part | images | |")
    print("|---" * 6 + "|")
    outside, within = far.nanmean(0), inside.nanmean(0)
    for index in outside.argsort(descending=True).tolist():
        part = float(outside[index] / (outside[index] + within[index]))
        count = int((first[:, index] > FIRST).sum())
        if count >= IMAGES:
            told = f"{outside[index]:.2%} | {within[index]:.2%} | {part:.2f} | {count}"
            print(f"| {words[index]} | {told} | {'yes' if part >= PART else ''} |")


if __name__ == "__main__":
    main()
