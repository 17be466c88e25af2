"""The images of a run on their way to maps: read, encoded, and kept for the passes that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from clipes.disk.scratch import Scratch
from clipes.maps.evidence import PatchEvidence
from clipes.maps.maker import CamMaker, EncodedImage, Prepared
from clipes.run.origin import Picture, read_picture
from clipes.types import Sample

_MOST_BYTES = 8 << 30  # 2,700 images of VOC with two towers


@dataclass(frozen=True)
class ReadImage:
    """An image on its way to maps.

    Attributes:
        id: Of its sample.
        image: What the towers are to see, or what they left behind before.
        picture: Its file as it was read.
    """

    id: str
    image: Prepared | EncodedImage
    picture: Picture


class ImageSource:
    """Encodes every image once, as far as there is disk to keep what the towers left behind.

    It is a context manager; at its end nothing is left of what was kept.

    Args:
        folder: Where there is disk; None to keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._scratch = None if folder is None else Scratch(folder, _MOST_BYTES)
        self._known: dict[str, tuple[tuple[int, ...], tuple[int, int], Picture]] = {}

    def __enter__(self) -> ImageSource:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Forget everything."""
        if self._scratch is not None:
            self._scratch.close()

    def read(self, sample: Sample, maker: CamMaker) -> ReadImage:
        """Return an image as it was left behind before, or read it.

        Raises:
            ImageError: It cannot be read.
        """
        if (known := self._kept(sample.id, maker.device)) is not None:
            return known
        pixels, picture = read_picture(sample.image)
        return ReadImage(sample.id, maker.prepare(pixels, sample.labels), picture)

    def encode(self, images: Sequence[ReadImage], maker: CamMaker) -> list[EncodedImage]:
        """Run the towers over those images that they did not see, together.

        Raises:
            BackendError: The GPU has too little memory.
        """
        prepared = [one.image for one in images if isinstance(one.image, Prepared)]
        new = iter(maker.encode(prepared))
        return [next(new) if isinstance(one.image, Prepared) else one.image for one in images]

    def keep(self, image: ReadImage, encoded: EncodedImage) -> None:
        """Keep what a pass left behind, if that is a thing to keep and there is room."""
        evidence = encoded.evidence
        if self._scratch is None or image.id in self._scratch:
            return
        if isinstance(evidence, PatchEvidence):
            self._known[image.id] = encoded.labels, encoded.size, image.picture
            self._scratch.keep(image.id, evidence.to_arrays())

    def _kept(self, image_id: str, device: torch.device) -> ReadImage | None:
        if self._scratch is None or image_id not in self._scratch:
            return None
        try:
            arrays = self._scratch.read(image_id)
        except OSError:  # it can be encoded again
            return None
        labels, size, picture = self._known[image_id]
        evidence = PatchEvidence.from_arrays(arrays, device)
        return ReadImage(image_id, EncodedImage(labels, size, evidence), picture)
