"""Class vectors from labelled images, see ``clipes.standin.fit``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from clipes.config import get_preset
from clipes.datasets import Dataset, open_dataset
from clipes.errors import UsageError
from clipes.listener import Listener
from clipes.stages.setup import open_weights
from clipes.standin.fit import Fitted, encode, fit, gather
from clipes.weights import DEFAULT_MODEL
from clipes.words.features import save_text_features

NOTE = (
    "stand-in vectors, fitted to this image tower from image-level labels; "
    "they are not text features"
)


@dataclass(frozen=True)
class FitRequest:
    """What vectors are fitted to, and for which tower.

    Attributes:
        folders: VOC folders, or folders of images with labels.
        classes: Class names in mask order.
        out: File to write, in the ``--text-features`` format.
        weights: ``--weights``.
        model: ``--model``.
        device: ``auto`` or a torch device.
    """

    folders: Sequence[Path]
    classes: Sequence[str]
    out: Path
    weights: str = "auto"
    model: str = DEFAULT_MODEL
    device: str = "auto"


def fit_vectors(request: FitRequest, listener: Listener) -> Fitted:
    """Fit vectors to the labels of all images in some folders and save them.

    Args:
        request: What is asked for.
        listener: Who is told what is used and what cannot be, and how it goes.

    Raises:
        VocabularyError: A class is in no label.
    """
    if request.out.suffix != ".npz":
        raise UsageError(f"--out {request.out} is no .npz", "name a file such as vectors.npz")
    datasets = [_open(folder) for folder in request.folders]
    for failure in chain.from_iterable(data.failures for data in datasets):
        listener.report(failure)
    classes = request.classes
    images = gather(datasets, classes)
    params = get_preset("default").cam
    opened = open_weights(request.weights, request.model, request.device, listener)
    backbone = opened.backbone(fp16_positions=params.fp16_positions)
    encoded = encode(backbone, images, listener, max_patches=params.max_patches)
    with listener.progress("fit") as progress:
        fitted = fit(
            encoded,
            classes,
            logit_scale=opened.logit_scale,
            model=f"{opened.weights.model} {opened.weights.name}",
            note=NOTE,
            progress=progress,
        )
    save_text_features(request.out, fitted.text)
    listener.say(
        f"{len(encoded)} images, {len(classes)} classes, {len(fitted.text.background_words)} others"
    )
    return fitted


def _open(folder: Path) -> Dataset:
    return open_dataset("voc" if (folder / "Annotations").is_dir() else "folder", root=folder)
