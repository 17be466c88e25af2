"""The masks that a person corrected, as far as what the classes look like is learnt from them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clipes.errors import ArtifactError, ClipesError
from clipes.run.corrected import Chosen
from clipes.run.origin import Picture, same_picture
from clipes.types import Sample, UInt8Array


@dataclass(frozen=True)
class DrawnMasks:
    """Reads a person's masks, and tells which have changed.

    Attributes:
        masks: Says which there are.
        classes: How many classes the run has.
    """

    masks: Chosen
    classes: int

    def file(self, sample: Sample) -> Picture | None:
        """Return the file of the mask of an image, whether it can be used or not; None for none."""
        if self.masks.is_corrected(sample):
            with suppress(OSError):  # gone meanwhile
                return Picture.of(self._path(sample))
        return None

    def read(self, sample: Sample, say: Callable[[str], None]) -> UInt8Array | None:
        """Return the (H0, W0) mask of an image; None if there is none that can be used.

        Args:
            sample: The image.
            say: Told why one cannot be used.
        """
        try:
            if self.masks.is_corrected(sample) and (reason := self.masks.unusable(sample)):
                raise ArtifactError(reason)
            return self.masks.corrected_mask(sample, self.classes)
        except ClipesError as error:
            say(f"{sample.id}: nothing is learnt from its corrected mask: {error}")
            return None

    def is_still(self, sample: Sample, mask: Picture | None, since: int) -> tuple[bool, bool]:
        """Tell whether the mask of an image is the one that was learnt from.

        Args:
            sample: The image.
            mask: The one that was; None for none.
            since: As for ``same_picture``.

        Returns:
            Whether it is, and whether its bytes had to be read to know.
        """
        if mask is None or not self.masks.is_corrected(sample):
            return (mask is not None) == self.masks.is_corrected(sample), False
        return same_picture(self._path(sample), mask.sha256, mask.size, since)

    def _path(self, sample: Sample) -> Path:
        return self.masks.files(sample).pseudo_path(sample.id)
