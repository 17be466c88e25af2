"""What the benchmarks on real images share: where those are, text features, running clipes."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clipes.cli.console import print_scores
from clipes.cli.options import finish, listener
from clipes.config import get_preset
from clipes.datasets import COCO_CLASSES, VOC_CLASSES
from clipes.disk.files import write_json
from clipes.run.folder import Run
from clipes.stages.cam import CamRequest, ClipRequest, DataRequest, Resources, cam
from clipes.stages.evaluate import evaluate_run, scores_to_json
from clipes.stages.refine import RefineRequest, RefineResources, refine
from clipes.words.vocabulary import load_vocabulary

SHARED = Path(os.environ.get("CLIPES_SHARED", Path(__file__).resolve().parents[2] / "shared"))
_COMMAND = shlex.join(sys.argv)  # for the record of a run

# Background words of docs/weights.md, and their rows in coco_single.npy (COCO, then COCO-Stuff by
# name).
BACKGROUND = {
    "ground-other": 114, "dirt": 99, "grass": 112, "tree": 157, "building-other": 84,
    "wall-other": 161, "sky-other": 145, "water-other": 166, "river": 136, "sea": 143,
    "railroad": 135, "keyboard": 66, "clouds": 94, "house": 116, "mountain": 123, "road": 137,
    "rock": 138, "pavement": 128, "hill": 115, "bridge": 83, "floor-other": 103, "stone": 150,
}  # fmt: skip


# What the published vectors call the further background words of prompts/coco.toml.
PUBLISHED = {
    "brick wall": "wall-brick", "concrete wall": "wall-concrete", "tiled wall": "wall-tile",
    "wooden wall": "wall-wood", "wooden floor": "floor-wood", "stone floor": "floor-stone",
    "ceiling": "ceiling-other", "door": "door-stuff", "window": "window-other",
}  # fmt: skip


def write_text_features(path: Path, kind: str, *, wide: bool = False) -> None:
    """Write published vectors in the ``--text-features`` format.

    Args:
        path: The .npz to write.
        kind: ``voc``: the classes and background words of docs/weights.md. ``coco``: COCO's
            classes and the same background words, less those that are classes.
        wide: Whether the vocabulary's further background words are among them, as ``cam`` takes
            them with all presets but ``reference``.
    """
    coco = _load("coco_single.npy")
    names: tuple[str, ...] = VOC_CLASSES if kind == "voc" else COCO_CLASSES
    classes = _load("voc12_single.npy") if kind == "voc" else coco[: len(names)]
    background = {word: row for word, row in BACKGROUND.items() if word not in names}
    more = load_vocabulary(kind).more_background if wide else ()
    vectors = np.concatenate([classes, coco[list(background.values())], *_published(more)])
    words = [*names, *background, *more]
    np.savez(
        path,
        names=np.array(words),
        features=vectors.astype(np.float32),
        background=np.arange(len(words)) >= len(names),
        model=np.array("OpenAI ViT-B/16, 'a photo of a {}'"),
    )


def _published(words: Sequence[str]) -> list[npt.NDArray[np.floating]]:
    """Return the published vector of each word, (1, E)."""
    rows = published_words() if words else {}
    return [rows[PUBLISHED.get(word, word)][None] for word in words]


def published_words() -> dict[str, npt.NDArray[np.floating]]:
    """Return the published vectors of "a photo of a WORD", (E,) each."""
    with np.load(SHARED / "features" / "photo_of_a.npz", allow_pickle=False) as found:
        names, vectors = found["words"], found["features"]
    return {str(name).strip(): row for name, row in zip(names, vectors, strict=True)}


def stage_options(description: str | None) -> argparse.Namespace:
    """Return the options of a benchmark that runs the stages."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", default="reference")
    parser.add_argument("--limit", type=int, help="only the first N images")
    parser.add_argument("--out", type=Path, help="keep the run folder here")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    return parser.parse_args()


def run_stages(kind: str, data: Path, ids: Sequence[str], options: argparse.Namespace) -> None:
    """Make maps and masks on the registry's weights, score them, and print the scores.

    Args:
        kind: ``voc`` or ``coco``.
        data: Folder of the data set.
        ids: Its images.
        options: See ``stage_options``.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options.out or Path(folder, "run"))
        work = run.root / "input"  # a run that is kept needs its list of images later
        work.mkdir(parents=True, exist_ok=True)
        write_text_features(work / "text.npz", kind, wide=get_preset(options.preset).cam.wide)
        (work / "split.txt").write_text("\n".join(ids[: options.limit]) + "\n")
        images = DataRequest(kind, root=data, split=str((work / "split.txt").absolute()))
        make_maps(images, work / "text.npz", options.preset, run)
        make_masks(run)
        scored = evaluate_run(run, None, None, [1.0], listener())
        print_scores(scored, per_class=True)
        for path in (run.root / "scores.json", *([options.json] if options.json else [])):
            write_json(path, scores_to_json(scored))


def run_options(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a benchmark that looks at a run: see ``run_to_look_at``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--run", type=Path, help="a finished run whose images have ground truth")
    parser.add_argument("--preset", default="default", help="of the run that is made")
    return parser


@contextmanager
def run_to_look_at(options: argparse.Namespace) -> Iterator[Run | None]:
    """Yield the run that was named, else one that is made of voc_sample; None without the data.

    Args:
        options: See ``run_options``.
    """
    if options.run is not None:
        yield Run(options.run)
        return
    data = sample("voc_sample")
    if data is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        run, text = Run(Path(folder, "run")), Path(folder, "text.npz")
        write_text_features(text, "voc")
        make_maps(DataRequest("voc", root=data), text, options.preset, run)
        make_masks(run)
        yield run


def make_maps(
    images: DataRequest, text: Path, preset: str, run: Run, weights: str = "registry"
) -> None:
    """Make maps as ``clipes cam`` does; stop if an image fails.

    Args:
        images: The images.
        text: The file of class and background vectors.
        preset: Name of the preset.
        run: The run folder.
        weights: CLIP's.
    """
    clip = ClipRequest(weights, text_features=text)
    settings = get_preset(preset).for_dataset(images.dataset)
    outcome = cam(
        CamRequest(images, clip, settings, command=_COMMAND), run, Resources(), listener()
    )
    finish("maps", run, outcome.summary, outcome.unusable)


def make_masks(run: Run) -> None:
    """Make masks of a run's maps as ``clipes refine`` does; stop if an image fails."""
    outcome = refine(RefineRequest(command=_COMMAND), run, RefineResources(), listener())
    finish("masks", run, outcome.summary, outcome.unusable)


def clipes(*arguments: object) -> None:
    """Run a command of the product, in a process as a training has it; stop if it fails."""
    subprocess.run([sys.executable, "-m", "clipes", *map(str, arguments)], check=True)


def sample(name: str) -> Path | None:
    """Return the folder of a data set in ``shared/data``; say so if it is not there."""
    path = SHARED / "data" / name
    if path.is_dir():
        return path
    print(f"skipped: {name} is not at {path}; set CLIPES_SHARED")
    return None


def _load(name: str) -> npt.NDArray[np.floating]:
    array: npt.NDArray[np.floating] = np.load(SHARED / "features" / name, allow_pickle=False)
    return array
