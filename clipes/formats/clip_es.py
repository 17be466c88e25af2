"""The maps as CLIP-ES's own scripts read them: ``<id>.npy``, and ``images.txt``.

Each file is a dict saved by numpy, hence a pickle: ``keys`` (K,) int64, 0-based classes, and
``attn_highres`` (K, H0, W0) float16, the refined maps at the size of the image. That is the format
of linyq2117/CLIP-ES (``eval_cam.py``, ``eval_cam_with_crf.py``); clipes writes it and never reads
it. The scripts tell the data set by the path, which must contain ``voc`` or ``coco``.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from clipes.disk.files import atomic_write, write_text
from clipes.formats.base import FileWriter, Item, Plan, list_text
from clipes.masks.pseudo import upsample

_PROTOCOL = 3  # Python 3's own since 3.0


@contextmanager
def write_clip_es(plan: Plan) -> Iterator[ClipEsWriter]:
    """Open the writer of the format."""
    writer = ClipEsWriter(plan, plan.folder, ".npy")
    yield writer
    ids = [sample.id for sample in writer.written()]
    write_text(plan.folder / "images.txt", list_text(ids))


class ClipEsWriter(FileWriter):
    """Writes a file for each image."""

    def add(self, item: Item) -> None:
        """Write the maps of one image."""
        cams = item.cams()
        maps = upsample(cams.maps, cams.size).astype(np.float16)
        content = {"keys": cams.labels.astype(np.int64), "attn_highres": maps}
        with atomic_write(self.path(item.sample)) as temporary, temporary.open("wb") as file:
            header = {"descr": "|O", "fortran_order": False, "shape": ()}
            np.lib.format.write_array_header_1_0(file, header)
            _Pickler(file, _PROTOCOL).dump(_Saved(content))


class _Saved:
    """Stands for the array of one object that ``np.save`` makes of a dict."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content


class _Pickler(pickle.Pickler):
    """Names nothing in a pickle that is younger than the environment CLIP-ES asks for.

    np.save of numpy 2 would name ``numpy._core``, which numpy below 1.26 does not have.
    """

    def reducer_override(self, obj: object) -> Any:  # noqa: ANN401 - pickle's signature
        if isinstance(obj, _Saved):
            return np.array, (obj.content,)
        if isinstance(obj, np.ndarray):
            return np.ndarray, (obj.shape, obj.dtype.str, bytearray(obj.tobytes()))
        return NotImplemented
