"""Class vectors from labelled images, see ``clipes.standin.fit``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from clipes.config import get_preset
from clipes.datasets import Dataset, open_dataset
from clipes.errors import UsageError
from clipes.stages.setup import open_weights
from clipes.standin.fit import Fitted, encode, fit, gather
from clipes.types import Failure, Progress
from clipes.words.features import save_text_features

NOTE = (
    "stand-in vectors, fitted to this image tower from image-level labels; "
    "they are not text features"
)


def fit_vectors(
    folders: Sequence[Path],
    classes: Sequence[str],
    out: Path,
    *,
    source: str,
    model: str,
    device: str,
    say: Callable[[str], None],
    report: Callable[[Failure], None],
    progress: Callable[..., AbstractContextManager[Progress]],
) -> Fitted:
    """Fit vectors to the labels of all images in ``folders`` and save them.

    Args:
        folders: VOC folders, or folders of images with labels.
        classes: Class names in mask order.
        out: File to write, in the ``--text-features`` format.
        source: ``--weights``.
        model: ``--model``.
        device: ``auto`` or a torch device.
        say: Told what is used.
        report: Called with each image that cannot be used.
        progress: Opens a progress bar.

    Raises:
        VocabularyError: A class is in no label.
    """
    if out.suffix != ".npz":
        raise UsageError(f"--out {out} is no .npz", "name a file such as vectors.npz")
    datasets = [_open(folder) for folder in folders]
    for data in datasets:
        for failure in data.failures:
            report(failure)
    images = gather(datasets, classes)
    params = get_preset("default").cam
    opened = open_weights(source, model, device=device, say=say, progress=progress)
    backbone = opened.backbone(fp16_positions=params.fp16_positions)
    with progress("encode") as bar:
        encoded = encode(
            backbone, images, max_patches=params.max_patches, progress=bar, report=report
        )
    with progress("fit") as bar:
        fitted = fit(
            encoded,
            classes,
            logit_scale=opened.logit_scale,
            model=f"{opened.weights.model} {opened.weights.name}",
            note=NOTE,
            progress=bar,
        )
    save_text_features(out, fitted.text)
    say(
        f"{len(encoded)} images, {len(classes)} classes, {len(fitted.text.background_words)} others"
    )
    return fitted


def _open(folder: Path) -> Dataset:
    return open_dataset("voc" if (folder / "Annotations").is_dir() else "folder", root=folder)
