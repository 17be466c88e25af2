"""Laid out as Ultralytics reads it for semantic segmentation (``yolo semantic train``).

::

    images/<id>.jpg    links to the images, or copies
    masks/<id>.png     one channel: 0 background, k + 1 class k, 255 ignored
    data.yaml          where they are, and the names of the values
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from clipes.disk.files import write_text
from clipes.formats.base import Plan
from clipes.formats.voc import FolderWriter

IMAGES = Path("images")
"""Folder of the images; Ultralytics finds what belongs to one by replacing this name."""

_HEAD = """# Written by 'clipes export'. Paths are relative to this file.
train: {images}
val: {images}  # name the images of another export here: these masks are what is learnt from
"""


@contextmanager
def write_ultralytics(plan: Plan) -> Iterator[FolderWriter]:
    """Open the writer of the format."""
    masks = Path("masks")
    yield FolderWriter(plan, IMAGES, masks, grey=True)
    write_data_yaml(plan.folder, ("background", *plan.classes), f"masks_dir: {masks}\n")


def write_data_yaml(folder: Path, names: Sequence[str], more: str = "") -> None:
    """Write ``data.yaml``.

    Args:
        folder: Where to; ``IMAGES`` is in it.
        names: What the numbers in masks or labels mean, from 0.
        more: Further lines.
    """
    # What is JSON is YAML, too.
    listed = "".join(
        f"  {number}: {json.dumps(name, ensure_ascii=False)}\n" for number, name in enumerate(names)
    )
    write_text(folder / "data.yaml", f"{_HEAD.format(images=IMAGES)}{more}names:\n{listed}")
