"""The images of a run on their way to maps: read, encoded, and kept for the passes that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from clipes.disk.scratch import Scratch
from clipes.maps.evidence import PatchEvidence
from clipes.maps.maker import CamMaker, EncodedImage, Prepared, PreparedTiles
from clipes.maps.tiled import usual_side
from clipes.masks.mosaic import tile_side
from clipes.run.origin import Picture, read_large, read_picture
from clipes.stages.tiles import TILE, is_large
from clipes.types import Sample

_MOST_BYTES = 8 << 30  # 2,700 images of VOC with two towers
_SMALL_ENOUGH = 1 << 23  # pixels; ten times what towers see


@dataclass(frozen=True)
class ReadImage:
    """An image on its way to maps.

    Attributes:
        id: Of its sample.
        image: What the towers are to see, or what they left behind before.
        picture: Its file as it was read.
        side: Of the tiles that it is seen in; 0 for none.
    """

    id: str
    image: Prepared | PreparedTiles | EncodedImage
    picture: Picture
    side: int = 0


class ImageSource:
    """Encodes every image once, as far as there is disk to keep what the towers left behind.

    It is a context manager; at its end nothing is left of what was kept.

    Args:
        folder: Where there is disk; None to keep nothing.
        pixels: Where there is disk for the pixels of large pictures; None for the system's choice.
        tile: Side of the tiles of larger images; None for tiles only beyond ``MAX_PIXELS``.
    """

    def __init__(
        self, folder: Path | None, *, pixels: Path | None = None, tile: int | None = None
    ) -> None:
        self.tile = tile
        self._pixels = pixels
        self._scratch = None if folder is None else Scratch(folder, _MOST_BYTES)
        self._known: dict[str, tuple[tuple[int, ...], tuple[int, int], Picture, int]] = {}

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
        if is_large(sample, self.tile):
            return self._read_large(sample, maker)
        pixels, picture = read_picture(sample.image)
        return ReadImage(sample.id, maker.prepare(pixels, sample.labels), picture)

    def _read_large(self, sample: Sample, maker: CamMaker) -> ReadImage:
        large, picture = read_large(sample.image, self._pixels)
        if not maker.sees_tiles:
            small = large.smaller(_SMALL_ENOUGH)
            return ReadImage(sample.id, maker.prepare(small, sample.labels, large.size), picture)
        usual = usual_side(large.size, TILE, maker.max_patches)
        side = tile_side(large.size, self.tile, usual)
        tiles = maker.prepare_tiles(large.window, large.size, side, sample.labels)
        return ReadImage(sample.id, tiles, picture, side)

    def encode(self, images: Sequence[ReadImage], maker: CamMaker) -> list[EncodedImage]:
        """Run the towers over those images that they did not see, together.

        Raises:
            BackendError: The GPU has too little memory.
        """
        prepared = [one.image for one in images if not isinstance(one.image, EncodedImage)]
        new = iter(maker.encode(prepared))
        return [one.image if isinstance(one.image, EncodedImage) else next(new) for one in images]

    def keep(self, image: ReadImage, encoded: EncodedImage) -> None:
        """Keep what a pass left behind, if that is a thing to keep and there is room."""
        evidence = encoded.evidence
        if self._scratch is None or image.id in self._scratch:
            return
        if isinstance(evidence, PatchEvidence):
            self._known[image.id] = encoded.labels, encoded.size, image.picture, image.side
            self._scratch.keep(image.id, evidence.to_arrays())

    def _kept(self, image_id: str, device: torch.device) -> ReadImage | None:
        if self._scratch is None or image_id not in self._scratch:
            return None
        try:
            arrays = self._scratch.read(image_id)
        except OSError:  # it can be encoded again
            return None
        labels, size, picture, side = self._known[image_id]
        evidence = PatchEvidence.from_arrays(arrays, device)
        return ReadImage(image_id, EncodedImage(labels, size, evidence), picture, side)
