"""Which files of a run are still what would be made from the images and labels as they are now."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from clipes.disk.files import read_arrays
from clipes.errors import ArtifactError
from clipes.run.folder import Run
from clipes.run.origin import (
    MapsOrigin,
    MaskOrigin,
    Picture,
    digest,
    maps_settings,
)
from clipes.types import Sample

LARGEST_LOOKS = 1 << 28  # bytes; 254 classes of 1024 channels are 10 MB
"""Most bytes that the statistics of a run may take."""

EDITED_REMEDY = "it may be a person's work: delete it and run 'clipes refine' to have it made again"
"""What to do about a mask that was edited, and whose maps have changed."""

NOT_TOGETHER = "its mask and its confidence map were not made together"
"""Why a mask is made again beside which the confidence map of another making lies."""


class Freshness:
    """Compares what files say that they were made from with what there is now.

    Files of a run that an older clipes made say nothing: of their maps only the labels can be
    compared, and their masks count as made from maps that are not younger.

    Args:
        run: The run folder.
        classes: Class names in mask order, for messages.
        cam: Settings of ``cam`` as in run.json.
        looks: Digest of what the classes look like; None if that is not known.
        refine: Settings of ``refine`` as in run.json; None if it did not run.
    """

    def __init__(
        self,
        run: Run,
        classes: Sequence[str],
        *,
        cam: Mapping[str, Any],
        looks: str | None,
        refine: Mapping[str, Any] | None = None,
    ) -> None:
        self._run = run
        self._classes = tuple(classes)
        self._settings = maps_settings(cam)
        self._looks = looks
        self._refine = None if refine is None else digest(refine)

    @classmethod
    def of(
        cls, run: Run, classes: Sequence[str], *, refine: Mapping[str, Any] | None = None
    ) -> Freshness:
        """Return what compares with the settings that a run's record holds.

        Args:
            run: The run folder.
            classes: Class names in mask order.
            refine: Settings of ``refine`` that are asked for instead.

        Raises:
            ArtifactError: The record is missing or damaged.
        """
        stages = run.manifest()["stages"]
        recorded = (stages.get("refine") or {}).get("settings")
        return cls(
            run,
            classes,
            cam=run.stage("cam").get("settings") or {},
            looks=looks_digest(run),
            refine=recorded if refine is None else refine,
        )

    def at(self, run: Run) -> Freshness:
        """Return the same for the run folder under another path."""
        moved = copy(self)
        moved._run = run
        return moved

    def maps(self, sample: Sample) -> str:
        """Return why the maps of an image are not those that would be made now; empty if they are.

        Maps that are not there are not out of date.
        """
        path = self._run.cams_path(sample.id)
        try:
            written = path.stat().st_mtime_ns
        except OSError:
            return ""
        origin = MapsOrigin.parse(self._run.maps_origin(sample.id))
        if origin is None:
            return self._other_labels(sample, self._labels_alone(sample.id))
        if reason := self._other_labels(sample, origin.labels):
            return reason
        if origin.settings != self._settings:
            return "its maps were made with other settings, weights or words"
        if self._looks not in (None, origin.looks):
            return "what the classes look like was learnt anew since its maps were made"
        if not origin.is_still(sample.image, path, written):
            return "its maps were made from another picture of that name"
        return ""

    def has_maps(self, sample: Sample) -> bool:
        """Tell whether the maps of an image are there, and those that would be made now."""
        return self._run.cams_path(sample.id).exists() and not self.maps(sample)

    def has_pseudo(self, sample: Sample) -> bool:
        """Tell the same of its maps, if they are there, and of its mask and confidence map."""
        there = self._run.has_pseudo(sample.id)
        return there and not self.maps(sample) and not self.mask(sample)

    def maps_origin(self, sample: Sample, picture: Picture) -> MapsOrigin:
        """Return what maps of an image are made from that are made now, of ``picture``."""
        labels = tuple(sorted(sample.labels))
        looks = self._looks or ""
        return MapsOrigin(picture.sha256, picture.size, labels, self._settings, looks)

    def mask(self, sample: Sample) -> str:
        """Return why the mask of an image is not the one that would be made from its maps.

        Empty if it is, or if there is none, or nothing to compare it with.
        """
        found = self._mask_origin(sample.id)
        if found is None:
            return ""
        origin, edited = found
        maps = self._run.maps_origin(sample.id)
        if origin is None:
            if not maps or not self._older_mask(sample.id):
                return ""
            return "its mask does not say what it was made from, and its maps are younger"
        if maps and origin.maps != digest(maps):
            edit = ", and was edited since" if edited else ""
            return f"its mask was made from other maps than there are now{edit}"
        if self._refine not in (None, origin.settings):
            return "its mask was made with other settings of the CRF"
        confidence = MaskOrigin.of_file(self._run.confidence_path(sample.id))
        if confidence not in (None, origin):  # a process was killed between the two
            return NOT_TOGETHER
        return ""

    def is_edited(self, sample: Sample) -> bool:
        """Tell whether something other than ``refine`` wrote the mask of an image."""
        found = self._mask_origin(sample.id)
        return found is not None and (found[0] is None or found[1])

    def unusable_maps(self, sample: Sample) -> str:
        """Return why the maps of an image are out of date, and the remedy; empty if not."""
        reason = self.maps(sample)
        return f"{reason}; run 'clipes cam' and 'clipes refine' again" if reason else ""

    def unusable(self, sample: Sample) -> str:
        """Return why maps or mask of an image are out of date, and the remedy; empty if not."""
        if reason := self.unusable_maps(sample):
            return reason
        if not (reason := self.mask(sample)):
            return ""
        if self._run.has_pseudo(sample.id) and self.is_edited(sample):
            return f"{reason}: {self._run.pseudo_path(sample.id)}; {EDITED_REMEDY}"
        return f"{reason}; run 'clipes refine' again"

    def _mask_origin(self, image_id: str) -> tuple[MaskOrigin | None, bool] | None:
        """Return the origin of a mask, or else that of its confidence map, and whether it is that.

        A program that edits masks does not keep what they say of themselves.
        """
        if not self._run.pseudo_path(image_id).exists():
            return None
        if (mask := MaskOrigin.of_file(self._run.pseudo_path(image_id))) is not None:
            return mask, False
        confidence = MaskOrigin.of_file(self._run.confidence_path(image_id))
        return confidence, confidence is not None

    def _older_mask(self, image_id: str) -> bool:
        mask, maps = self._run.pseudo_path(image_id), self._run.cams_path(image_id)
        try:
            return mask.stat().st_mtime_ns < maps.stat().st_mtime_ns
        except OSError:
            return False

    def _labels_alone(self, image_id: str) -> tuple[int, ...] | None:
        try:
            return tuple(sorted(self._run.load_cams(image_id).labels.tolist()))
        except ArtifactError:
            return None  # damaged: whoever reads them says so

    def _other_labels(self, sample: Sample, labels: tuple[int, ...] | None) -> str:
        now = tuple(sorted(sample.labels))
        if labels is None or labels == now:
            return ""
        return f"its maps were made for {self._names(labels)}, its labels are {self._names(now)}"

    def _names(self, labels: Sequence[int]) -> str:
        known = range(len(self._classes))
        return " and ".join(self._classes[k] if k in known else f"class {k}" for k in labels)


def looks_digest(run: Run) -> str | None:
    """Return the digest of what the classes of a run look like; None if there is no such file.

    Raises:
        ArtifactError: The file is damaged.
    """
    path = run.looks_path
    if not path.exists():
        return None
    try:
        return arrays_digest(read_arrays(path, LARGEST_LOOKS))
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"cannot read {path}: {error}", f"remove {path.parent} and run 'clipes cam' again"
        ) from error


def arrays_digest(arrays: Mapping[str, Any]) -> str:
    """Return the digest of the statistics that maps depend on, and of whose they are."""
    sums = hashlib.sha256()
    later = sorted(name for name in arrays if name.startswith(("sums_", "mass_", "moment_")))
    for part in ("sums", "mass", "moment", *later):
        sums.update(arrays[part].tobytes())
    return digest([sums.hexdigest(), arrays["ids"].tolist()])
