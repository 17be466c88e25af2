"""Masks that a person mended, and which mask of an image counts: theirs, or the run's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from clipes.disk.images import read_header, read_mask
from clipes.masks.values import check_size, require_classes
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.origin import CorrectionOrigin
from clipes.run.relabelled import Relabelled
from clipes.types import Sample, UInt8Array


@dataclass(frozen=True)
class Chosen:
    """Says for each image which of a run's masks counts.

    Attributes:
        run: The run folder.
        own: Tells what is out of date of the run's own masks.
        corrected: Whether a person's masks go before them.
    """

    run: Run
    own: Freshness | Relabelled
    corrected: bool = True

    @cached_property
    def has_some(self) -> bool:
        """Whether any image has a person's mask that counts."""
        return self.corrected and bool(self.run.corrected.ids("pseudo"))

    def is_corrected(self, sample: Sample) -> bool:
        """Tell whether the mask that counts is a person's."""
        return self.corrected and self.run.corrected.has_pseudo(sample.id)

    def files(self, sample: Sample) -> Run:
        """Return the folder whose ``pseudo`` and ``confidence`` hold what counts."""
        if self.is_corrected(sample):
            return self.run.corrected
        return self.own.files if isinstance(self.own, Relabelled) else self.run

    def corrected_by(self, sample: Sample) -> str:
        """Return by whom and on which day, in words; empty if the mask does not say."""
        origin = CorrectionOrigin.of_file(self.run.corrected.confidence_path(sample.id))
        return "" if origin is None else f" by {origin.by}, {origin.when[:10]}"

    def corrected_mask(self, sample: Sample, n_classes: int) -> UInt8Array | None:
        """Read the (H0, W0) mask of an image that a person corrected; None if none did.

        Raises:
            ClipesError: It is damaged, of another size than the image, or of classes that there
                are not.
        """
        if not self.is_corrected(sample):
            return None
        mask = read_mask(self.run.corrected.pseudo_path(sample.id))
        check_size(mask, read_header(sample.image)[0], "corrected mask")
        require_classes(mask, n_classes, "the corrected mask", "correct and import it again")
        return mask

    def unusable(self, sample: Sample) -> str:
        """Return why the mask that counts is out of date, and the remedy; empty if it is not."""
        if not self.is_corrected(sample):
            return self.own.unusable(sample)
        path = self.run.corrected.pseudo_path(sample.id)
        origin = CorrectionOrigin.of_file(self.run.corrected.confidence_path(sample.id))
        # What a person put there by hand says nothing, and is taken at its word.
        if origin is None or origin.is_still(sample.image, path, path.stat().st_mtime_ns):
            return ""
        return (
            f"its mask was corrected on another picture of that name: {path}; correct and import "
            "it again, or delete it"
        )
