"""Which of a segmenter's masks of a run's images are what would be made now."""

from __future__ import annotations

from clipes.errors import ArtifactError
from clipes.run.folder import Run
from clipes.run.freshness import NOT_TOGETHER
from clipes.run.origin import Picture, RelabelOrigin, digest
from clipes.run.record import RelabelSettings
from clipes.types import Sample

_EDITED = "it may be a person's work: delete it to have it made again"


class Relabelled:
    """Compares what the files of ``relabelled/`` say that they were made from with what there is.

    Args:
        run: The run folder.
        settings: What they are to be made with.

    Attributes:
        run: The run folder.
        files: Where they lie, laid out as a run is.
    """

    def __init__(self, run: Run, settings: RelabelSettings) -> None:
        self.files = run.relabelled
        self.run = run
        self._uses_maps = settings.share < 1
        self._checkpoint = settings.checkpoint
        self._settings = digest(settings.to_dict())

    @classmethod
    def of(cls, run: Run) -> Relabelled:
        """Return what compares with the settings that a run's record holds.

        Raises:
            ArtifactError: The record is missing or damaged, or has no such settings.
        """
        record = run.relabel_record()
        if record is None:
            raise ArtifactError(
                f"no segmenter has labelled the images of {run.root} again",
                "run 'clipes relabel --from CHECKPOINT' first",
            )
        return cls(run, record.settings)

    def origin(self, sample: Sample, picture: Picture) -> RelabelOrigin:
        """Return what a mask is made from that is made now, of ``picture``."""
        labels = tuple(sorted(sample.labels))
        made_by = self._checkpoint, self._settings, self._maps(sample)
        return RelabelOrigin(picture.sha256, picture.size, labels, *made_by)

    def is_done(self, sample: Sample) -> bool:
        """Tell whether mask and confidence map are there and are those that would be made now."""
        return self.files.has_pseudo(sample.id) and not self.stale(sample)

    def is_edited(self, sample: Sample) -> bool:
        """Tell whether something other than ``relabel`` wrote the mask of an image."""
        mask = self.files.pseudo_path(sample.id)
        return mask.exists() and RelabelOrigin.of_file(mask) is None

    def stale(self, sample: Sample) -> str:
        """Return why the mask of an image is not the one that would be made now.

        Empty if it is, or if there is none. A program that edits masks does not keep what they say
        of themselves: then the confidence map says it.
        """
        mask = self.files.pseudo_path(sample.id)
        if not mask.exists():
            return ""
        confidence = RelabelOrigin.of_file(self.files.confidence_path(sample.id))
        origin = RelabelOrigin.of_file(mask) or confidence
        if origin is None:
            return "its mask does not say what it was made from"
        if origin.checkpoint != self._checkpoint:
            return "its mask was made by another segmenter"
        if origin.settings != self._settings:
            return "its mask was made with other settings"
        if origin.labels != tuple(sorted(sample.labels)):
            return "its mask was made for other labels"
        maps = self._maps(sample)
        if maps and origin.maps != maps:  # those that were removed cannot be compared
            return "its mask was made with other maps than there are now"
        if confidence not in (None, origin):  # a process was killed between the two
            return NOT_TOGETHER
        written = mask.stat().st_mtime_ns
        if not origin.is_still(sample.image, mask, written):
            return "its mask was made from another picture of that name"
        return ""

    def _maps(self, sample: Sample) -> str:
        """Return the digest of the origin of an image's maps, as far as they have a share."""
        origin = self.run.maps_origin(sample.id) if self._uses_maps else ""
        return digest(origin) if origin else ""

    def unusable(self, sample: Sample) -> str:
        """Return why the mask of an image is out of date, and the remedy; empty if it is not."""
        if not (reason := self.stale(sample)):
            return ""
        if self.is_edited(sample):
            return f"{reason}, and was edited since: {self.files.pseudo_path(sample.id)}; {_EDITED}"
        return f"{reason}; run 'clipes relabel' again"
