"""Class vectors from images with image-level labels, for CLIP weights without a text tower.

A softmax-GradCAM map is all but linear in patch features (see ``clipes.standin.patches``), so a
class vector is a linear classifier of patches, and labelled images can teach it by turns. With the
vectors so far, the map of every name that an image is labelled with claims the patches where it
exceeds 1/2, the background's score being 1 - max; patches that no map claims go to one background
vector. Linear discriminant analysis of the claimed patches makes the next vectors. The first ones
come from whole images, each of which lends all its patches to its names in equal parts. Labels that
are not classes (grass, sky, zebra) are fitted alike and become background words. No mask is looked
at, and nothing is random.

Text features lie close together, which keeps the softmax among them undecided. So do these: every
vector is the mean image feature plus a short part of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from clipes.datasets import Dataset
from clipes.errors import ImageError, VocabularyError
from clipes.listener import Listener
from clipes.maps.gradcam import class_probabilities, min_max
from clipes.names import SAME_THING, folded
from clipes.run.loop import in_order
from clipes.run.origin import Picture, read_picture
from clipes.standin.patches import PatchFeatures, patch_features, value_path
from clipes.towers.clip import Backbone
from clipes.types import Failure, Progress
from clipes.words.features import TextFeatures, unit_rows

BACKGROUND = "anything else"
"""Name of the vector of everything that no map claims."""

_CHUNK = 1 << 14  # patches; bounds the temporary copies of large sums


@dataclass(frozen=True)
class FitParams:
    """Settings of the fit; a factor of three in any of them moves VOC's mIoU by about a point.

    Attributes:
        rounds: How often patches are claimed and vectors fitted.
        ridge: Part of the mean variance that is added to the covariance's diagonal.
        prior: Weight of a name's first mean, in images, beside the patches it claims; keeps a name
            with few images from drifting to another meaning.
        spread: Mean length of a class vector's own part, the common part having length 1.
        patches_per_image: Most patches that are kept of an image.
        max_patches: Most patches that are kept of all images together: 2 kB each when E is 512.
    """

    rounds: int = 5
    ridge: float = 0.03
    prior: float = 0.2
    spread: float = 0.1
    patches_per_image: int = 256
    max_patches: int = 200_000


@dataclass(frozen=True)
class LabelledImage:
    """An image file and the names of what it shows, without repeats; ``id`` is for messages."""

    id: str
    path: Path
    names: tuple[str, ...]


@dataclass(frozen=True)
class EncodedImage:
    """What the fit needs of an image: the names of what it shows, and its features.

    Its id, and what its file was, are for those who want to know whether it is still the same.
    """

    names: tuple[str, ...]
    features: PatchFeatures
    id: str = ""
    picture: Picture | None = None


@dataclass(frozen=True)
class Fitted:
    """The result of a fit.

    Attributes:
        text: Vectors of the classes and, as background words, of the other names, sorted, and of
            ``BACKGROUND``.
        images: Number of images by name.
    """

    text: TextFeatures
    images: dict[str, int]


def gather(datasets: Sequence[Dataset], classes: Sequence[str]) -> list[LabelledImage]:
    """List the labelled images of data sets; names are the classes' own for the same things.

    Raises:
        VocabularyError: A class is in no label, see ``SAME_THING`` for the names understood.
    """
    own = {folded(name): name for name in classes}
    rename = own | {
        folded(other): own[folded(name)]
        for group in SAME_THING
        for name in group
        if folded(name) in own
        for other in group
        if folded(other) not in own
    }
    images = []
    for data in datasets:
        called = [rename.get(folded(name), name) for name in data.classes]
        for sample in data.samples:
            names = dict.fromkeys(called[label] for label in sample.labels)
            if names:
                images.append(LabelledImage(sample.id, sample.image, tuple(names)))
    _count([image.names for image in images], classes)
    return images


def encode(
    backbone: Backbone,
    images: Sequence[LabelledImage],
    listener: Listener,
    *,
    max_patches: int,
    params: FitParams | None = None,
    workers: int = 1,
) -> list[EncodedImage]:
    """Run the tower over images.

    Args:
        backbone: The tower.
        images: Images.
        listener: Who is told of each image that cannot be read and is left out, and how it goes.
        max_patches: Size above which images are shrunk, see ``CamParams``.
        params: Settings; says how many patches are kept.
        workers: Images at once, each in a thread; see ``share_processor``.
    """
    params = params or FitParams()
    limit = max(1, min(params.patches_per_image, params.max_patches // max(1, len(images))))
    matrix = value_path(backbone)

    def work(image: LabelledImage) -> EncodedImage | Failure:
        try:
            pixels, picture = read_picture(image.path)
        except ImageError as error:
            return Failure(image.id, str(error))
        features = patch_features(backbone, matrix, pixels, max_patches=max_patches, limit=limit)
        return EncodedImage(image.names, features, image.id, picture)

    encoded = []
    with listener.progress("encode") as progress:
        for result in in_order(work, images, workers=workers, progress=progress):
            if isinstance(result, Failure):
                listener.report(result)
            else:
                encoded.append(result)
    return encoded


@torch.inference_mode()
def fit(
    images: Sequence[EncodedImage],
    classes: Sequence[str],
    *,
    logit_scale: float,
    model: str,
    note: str,
    params: FitParams | None = None,
    progress: Progress,
) -> Fitted:
    """Fit a vector to every class and to every other name among the labels.

    Args:
        images: Encoded images; their order does not matter.
        classes: Class names in mask order.
        logit_scale: Factor on the cosines that the vectors are to be used with.
        model: Name of the model, for the result.
        note: What a reader of results must know, for the result.
        params: Settings.
        progress: Called after each round.

    Raises:
        VocabularyError: A class is in no label, or all images are labelled alike.
    """
    params = params or FitParams()
    counts = _count([image.names for image in images], classes)
    check_labels(images)
    names = (*classes, *sorted(counts.keys() - {*classes, BACKGROUND}), BACKGROUND)
    row = {name: index for index, name in enumerate(names)}
    labels = [torch.tensor([row[name] for name in image.names]) for image in images]
    pool = Pool.of(images)

    def put_together(own: Tensor) -> Tensor:
        return _vectors(pool.common, own, len(classes), params.spread)

    turns = Turns(images, labels, len(classes), len(names), logit_scale)
    lent = pool.lend(labels, len(names))
    rows = unit_rows(turns.fit(pool, lent, put_together, params, progress).numpy())
    text = TextFeatures(
        classes=tuple(classes),
        background_words=names[len(classes) :],
        class_vectors=rows[: len(classes)],
        background_vectors=rows[len(classes) :],
        model=model,
        note=note,
    )
    return Fitted(text, dict(counts))


@dataclass(frozen=True)
class Turns:
    """Claiming patches and fitting vectors, by turns.

    Attributes:
        images: Encoded images.
        labels: (K,) rows of the names that each is labelled with.
        n_classes: Number of classes, which are the first names.
        n_names: M, number of names; the last is that of the patches that no map claims.
        logit_scale: Factor on cosines.
    """

    images: Sequence[EncodedImage]
    labels: Sequence[Tensor]
    n_classes: int
    n_names: int
    logit_scale: float

    def fit(
        self,
        pool: Pool,
        lent: tuple[Tensor, Tensor],
        put_together: Callable[[Tensor], Tensor],
        params: FitParams,
        progress: Progress,
    ) -> Tensor:
        """Return the unit vectors after all rounds.

        Args:
            pool: The patches of the images.
            lent: Sums (M, E) and weights (M,) of the patches that names have to begin with; the
                last name has none, which makes its mean 0.
            put_together: Makes unit vectors, those of the classes first, of the (M, E) own parts.
            params: Settings.
            progress: Called after each round.
        """
        sums, weights = lent
        first = sums / weights.clamp_min(1e-6)[:, None]
        vectors = put_together(pool.discriminants(first, weights, params.ridge))
        progress(0, params.rounds)
        for done in range(params.rounds):
            sums, weights = pool.give(self._claims(vectors), self.n_names)
            means = (sums + params.prior * first) / (weights + params.prior)[:, None]
            vectors = put_together(pool.discriminants(means, weights, params.ridge))
            progress(done + 1, params.rounds)
        return vectors

    def _claims(self, vectors: Tensor) -> Tensor:
        """Return the row of the name that each patch of all images belongs to."""
        nothing, scale = self.n_names - 1, self.logit_scale
        claims = [
            _claims(image.features, label, vectors, self.n_classes, nothing, scale)
            for image, label in zip(self.images, self.labels, strict=True)
        ]
        return torch.cat(claims)


@dataclass(frozen=True)
class Pool:
    """The kept patches of all images.

    Attributes:
        patches: (P, E) float32, less their weighted mean.
        weights: (P,) float32; those of an image add up to 1.
        counts: Number of patches of each image.
        covariance: (E, E) float64.
        common: (E,) float32 unit mean of the image features.
    """

    patches: Tensor
    weights: Tensor
    counts: list[int]
    covariance: Tensor
    common: Tensor

    @classmethod
    def of(cls, images: Sequence[EncodedImage]) -> Pool:
        """Take the patches of encoded images."""
        counts = [len(image.features.patches) for image in images]
        patches = torch.from_numpy(np.concatenate([image.features.patches for image in images]))
        patches = patches.float()
        weights = torch.cat([torch.full((count,), 1 / count) for count in counts])
        patches -= (weights @ patches) / len(images)
        covariance = torch.zeros(patches.shape[1], patches.shape[1], dtype=torch.float64)
        for part, weight in zip(patches.split(_CHUNK), weights.split(_CHUNK), strict=True):
            covariance += (part * weight[:, None]).T @ part
        features = np.mean([image.features.feature for image in images], axis=0, dtype=np.float64)
        common = torch.from_numpy(features / np.linalg.norm(features)).float()
        return cls(patches, weights, counts, covariance / len(images), common)

    def lend(self, labels: Sequence[Tensor], n_names: int) -> tuple[Tensor, Tensor]:
        """Return sums (M, E) and weights (M,) when each image lends its patches to its names."""
        sums, weights = torch.zeros(n_names, self.patches.shape[1]), torch.zeros(n_names)
        for label, part in zip(labels, self.patches.split(self.counts), strict=True):
            sums[label] += part.mean(0) / len(label)
            weights[label] += 1 / len(label)
        return sums, weights

    def give(self, owners: Tensor, n_names: int) -> tuple[Tensor, Tensor]:
        """Return sums (M, E) and weights (M,) when each patch belongs to one name: (P,) int64."""
        sums = torch.zeros(n_names, self.patches.shape[1])
        parts = (self.patches, self.weights, owners)
        for patches, weights, owner in zip(*(p.split(_CHUNK) for p in parts), strict=True):
            sums.index_add_(0, owner, patches * weights[:, None])
        return sums, torch.zeros(n_names).index_add_(0, owners, self.weights)

    def discriminants(self, means: Tensor, weights: Tensor, ridge: float) -> Tensor:
        """Return the (M, E) directions of linear discriminant analysis.

        Args:
            means: (M, E) of the names.
            weights: (M,) what the names were given, in images.
            ridge: See ``FitParams``.
        """
        wide = means.double()
        between = (wide.T * (weights / weights.sum())) @ wide
        within = self.covariance - between
        within += ridge * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
        directions: Tensor = torch.linalg.solve(within, wide.T).T.float()
        return directions


def check_labels(images: Sequence[EncodedImage]) -> None:
    """Refuse images from which nothing can be learnt.

    Raises:
        VocabularyError: All are labelled alike.
    """
    if len({frozenset(image.names) for image in images}) < 2:
        raise VocabularyError(
            f"all {len(images)} images are labelled alike, so nothing tells names apart",
            "add images with other labels",
        )


def _vectors(common: Tensor, own: Tensor, n_classes: int, spread: float) -> Tensor:
    """Return unit (M, E) vectors with a common part (E,) and own parts (M, E)."""
    own = own - own.mean(0)
    vectors = common + spread * own / own[:n_classes].norm(dim=1).mean()
    return F.normalize(vectors, dim=1)


def _claims(
    features: PatchFeatures,
    labels: Tensor,
    vectors: Tensor,
    n_classes: int,
    nothing: int,
    logit_scale: float,
) -> Tensor:
    """Return the name that each patch of an image belongs to: (P,) int64 of ``labels``, or nothing.

    Args:
        features: The image.
        labels: (K,) rows of the names it is labelled with.
        vectors: (V, E) unit vectors: classes, other names, the background.
        n_classes: Number of classes.
        nothing: What stands for no name.
        logit_scale: Factor on cosines.
    """
    rival = torch.arange(len(vectors)) >= n_classes
    rival[labels] = False
    present, rivals = vectors[labels], vectors[rival]
    feature = torch.from_numpy(features.feature)
    probs = class_probabilities(feature, present, rivals, logit_scale)
    # The gradient of the probabilities at the image feature; its length does not matter.
    gradients = present - probs @ torch.cat([present, rivals])
    gradients -= (gradients @ feature)[:, None] * feature
    raw = gradients @ torch.from_numpy(features.patches).float().T
    maps = torch.from_numpy(min_max(raw.relu()[:, None].numpy())).squeeze(1)
    highest, which = maps.max(0)
    return torch.where(highest > 0.5, labels[which], nothing)


def _count(labels: Sequence[Sequence[str]], classes: Sequence[str]) -> Counter[str]:
    """Return the number of images by name."""
    counts = Counter(name for names in labels for name in names)
    absent = [name for name in classes if not counts[name]]
    if absent:
        more = f", nor {len(absent) - 1} more of the classes" if absent[1:] else ""
        raise VocabularyError(
            f"no image is labelled '{absent[0]}'{more}",
            "add images that show it, or fit fewer classes",
        )
    return counts
