"""Pseudo-masks from image-level labels with a frozen CLIP.

From Python::

    labeler = clipes.load(classes=["cat", "sofa"])
    pseudo = labeler.segment("photo.jpg", ["cat"])
    clipes.write_mask("mask.png", pseudo.mask)
    labeler.run("my-photos", "runs/mine")           # a whole folder, resumable

and with what ``clipes train-seg`` trained::

    segmenter = clipes.load_segmenter("runs/mine/checkpoints/final.pt")
    clipes.write_mask("mask.png", segmenter.segment("photo.jpg").mask)

What is named here is imported when it is first used: ``import clipes`` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipes.api import PseudoLabeler, Segmenter, load, load_segmenter
    from clipes.config import get_preset
    from clipes.datasets import open_dataset
    from clipes.disk.images import read_image, read_mask, write_confidence, write_mask
    from clipes.errors import ClipesError
    from clipes.masks.pseudo import pseudo_label
    from clipes.masks.scores import ConfusionMatrix
    from clipes.run.folder import Run
    from clipes.stages.run import FolderResult
    from clipes.types import CamMaps, PseudoLabel

__all__ = [
    "CamMaps",
    "ClipesError",
    "ConfusionMatrix",
    "FolderResult",
    "PseudoLabel",
    "PseudoLabeler",
    "Run",
    "Segmenter",
    "__version__",
    "get_preset",
    "load",
    "load_segmenter",
    "open_dataset",
    "pseudo_label",
    "read_image",
    "read_mask",
    "write_confidence",
    "write_mask",
]

__version__ = "0.1.0"

_MODULES = {
    "CamMaps": "clipes.types",
    "ClipesError": "clipes.errors",
    "ConfusionMatrix": "clipes.masks.scores",
    "FolderResult": "clipes.stages.run",
    "PseudoLabel": "clipes.types",
    "PseudoLabeler": "clipes.api",
    "Run": "clipes.run.folder",
    "Segmenter": "clipes.api",
    "get_preset": "clipes.config",
    "load": "clipes.api",
    "load_segmenter": "clipes.api",
    "open_dataset": "clipes.datasets",
    "pseudo_label": "clipes.masks.pseudo",
    "read_image": "clipes.disk.images",
    "read_mask": "clipes.disk.images",
    "write_confidence": "clipes.disk.images",
    "write_mask": "clipes.disk.images",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever has that name
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
