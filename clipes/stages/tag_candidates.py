"""``tags/<id>.npz`` of a run folder: what an image says of the classes, until all have been asked.

Which candidates are tags is decided over all images, so that what each says is kept, 10 KB of it:
tagging that was interrupted goes on, and images that come later are compared with those before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipes.disk.files import read_arrays, read_text_array, sha256_of, write_arrays
from clipes.maps.tags import Candidates
from clipes.run.folder import Run
from clipes.types import Sample

_LARGEST = 1 << 22  # bytes; of 254 candidates and 4096 channels there are 2 MB
_PICTURE = "picture"


@dataclass(frozen=True)
class Kept:
    """What is known of an image.

    Attributes:
        candidates: The classes that it may show.
        picture: sha256 of its file.
    """

    candidates: Candidates
    picture: str


def keep(run: Run, image_id: str, candidates: Candidates, picture: str) -> None:
    """Write what an image says.

    Args:
        run: The run folder.
        image_id: The image.
        candidates: What it says.
        picture: sha256 of its file.

    Raises:
        WriteError: The file cannot be written.
    """
    arrays = {name: np.asarray(value) for name, value in vars(candidates).items()}
    path = run.candidates_path(image_id)
    write_arrays(path, {**arrays, _PICTURE: np.array(picture)}, compress=False)


def kept(run: Run, image_id: str, count: int) -> Kept | None:
    """Return what an image said; None if it was not asked, or the file is damaged.

    Args:
        run: The run folder.
        image_id: The image.
        count: K, how many candidates it was asked for.
    """
    path = run.candidates_path(image_id)
    try:
        arrays = read_arrays(path, _LARGEST)
        candidates = Candidates(**{name: arrays[name] for name in Candidates.__annotations__})
        picture = read_text_array(path, _PICTURE)
    except (OSError, ValueError, KeyError):
        return None
    return Kept(candidates, picture) if _is_whole(candidates, count) else None


def is_kept(run: Run, sample: Sample, count: int) -> bool:
    """Tell whether the picture of a sample, as it is now, was asked."""
    found = kept(run, sample.id, count)
    try:
        return found is not None and found.picture == sha256_of(sample.image)
    except OSError:
        return False  # whoever reads it says what is wrong with it


def _is_whole(found: Candidates, count: int) -> bool:
    width = found.background.shape[-1:]
    shapes = (
        *(array.shape == (count,) for array in (found.labels, found.patches, found.words)),
        found.background.shape == width,
        found.regions.shape == (count, *width),
    )
    kinds = [array.dtype.kind for array in vars(found).values()]
    return all(shapes) and kinds == ["i", "f", "f", "f", "f"]
