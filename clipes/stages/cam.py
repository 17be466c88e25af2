"""Stage 1: images and their labels to refined activation maps, the only stage that needs CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from clipes import affinity
from clipes.artifacts import Run
from clipes.clip.backbone import Backbone
from clipes.config import CamParams
from clipes.fusion import fused_gradcam
from clipes.images import read_image
from clipes.runner import Summary, for_each
from clipes.text_features import TextFeatures
from clipes.types import CamMaps, Failure, Progress, Sample, UInt8Array
from clipes.vocabulary import Fusion


class CamMaker:
    """Makes the refined maps of one image after another.

    Classes and background words are worked on in alphabetical order, so that the order they have in
    a vocabulary or in an annotation does not change a map, not even in the last bit.

    Args:
        backbone: CLIP's image tower.
        text: Vectors of the classes, in the order the labels count in, and of the background words.
        params: Settings.
    """

    def __init__(self, backbone: Backbone, text: TextFeatures, params: CamParams) -> None:
        self._backbone = backbone
        self._params = params
        dtype = backbone.visual.proj.dtype
        self._classes = torch.from_numpy(text.class_vectors).to(backbone.device, dtype)
        words = text.background_words
        alphabetical = sorted(range(len(words)), key=words.__getitem__)
        background = torch.from_numpy(text.background_vectors[alphabetical])
        self._background = background.to(backbone.device, dtype)
        self._names = text.classes
        self._largest = text.fusion is Fusion.cam_max
        self._synonyms = [
            torch.from_numpy(vectors).to(backbone.device, dtype) for vectors in text.synonym_vectors
        ]

    def __call__(self, image: UInt8Array, labels: Sequence[int]) -> CamMaps:
        """Return the refined maps of ``labels`` (0-based) in ``image`` (H0, W0, 3) RGB uint8."""
        prepared = self._backbone.prepare(image, self._params.max_patches)
        (encoding,) = self._backbone.encode(prepared[None], self._params.affinity_blocks)
        chosen = sorted(labels, key=self._names.__getitem__)
        text = self._classes[torch.tensor(chosen, device=self._classes.device)]
        cams = fused_gradcam(
            self._backbone,
            encoding,
            text,
            self._background,
            [self._synonyms[label] for label in chosen if self._synonyms],
            largest=self._largest,
        )
        refined = affinity.refine(encoding.attention, cams, self._params)
        given = refined[[chosen.index(label) for label in labels]]
        return CamMaps(np.array(labels, np.int64), given, (image.shape[0], image.shape[1]))


def make_cams(
    samples: Sequence[Sample],
    maker: CamMaker,
    run: Run,
    *,
    workers: int,
    progress: Progress,
    report: Callable[[Failure], None],
) -> Summary:
    """Make and save the maps of every sample that has none yet.

    Args:
        samples: Images with their labels.
        maker: Makes the maps.
        run: Where they go.
        workers: How many images at once, each in a thread; see ``share_processor``.
        progress: Called after each image.
        report: Called with each image that cannot be processed; the others go on.
    """

    def make_one(sample: Sample) -> None:
        run.save_cams(sample.id, maker(read_image(sample.image), sample.labels))

    return for_each(
        make_one,
        samples,
        is_done=lambda sample: run.cams_path(sample.id).exists(),
        backend="threading",
        workers=workers,
        progress=progress,
        report=report,
    )
