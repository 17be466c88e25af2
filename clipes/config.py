"""The method's constants, with their source, and the presets made of them.

A preset is data: one frozen value that says everything a run does to an image, printed in run.json.
``reference`` reproduces the published code (CLIP-ES, arXiv:2212.09506; linyq2117/CLIP-ES), quirks
included; ``default`` is what measures best without training, with two towers; ``clip`` does with
one what can be done with one; ``fast`` trades masks for time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeAlias

from clipes.choices import DatasetKind, Norm, Normalise, SegmenterPresetName
from clipes.errors import UsageError

DEFAULT_TEMPLATE = "a clean origami {}."
"""The prompt the paper chooses by sharpness (section 3.2)."""

CONFIDENCE_THRESHOLD = 0.95
"""mu of the confidence-guided loss (section 3.4): pixels below it are not trained on."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean colour, RGB in [0, 1], as torchvision's weights and DINOv2's expect it off."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation of colours, likewise."""

BOX_THRESHOLDS = {"coco": 0.7}
"""lambda of the data sets for which it is not the preset's (section 4.1)."""

SMALLEST_TILE = 256
"""Pixels a side of the smallest tiles that can be asked for: less shows no object."""

AUTO_LABELS = "auto"
"""Stands for a label file: the labels are zero-shot tags."""


def kind_of(dataset: str, prompts: str | None) -> str:
    """Return the kind of data set that images are of, as far as lambda goes.

    The words of COCO mean images like COCO's, wherever they lie.

    Args:
        dataset: Kind of data set.
        prompts: Vocabulary that was named, or None.

    >>> kind_of("folder", "coco"), kind_of("coco", "mine.toml"), kind_of("folder", None)
    ('coco', 'coco', 'folder')
    """
    return prompts if prompts in BOX_THRESHOLDS else dataset


@dataclass(frozen=True)
class TagParams:
    """Zero-shot tags (not in the paper); see ``clipes.maps.tags`` and ``clipes.maps.tag_odds``.

    Chosen on voc_sample, coco_sample and voc_more/train; ``benchmarks/tagging.py`` measures them.

    Attributes:
        threshold: Probability from which a class is a tag. Below 1/2, since a tag too many is
            quicker to remove than one that is missing is to find.
        candidates: Classes of an image that are looked at a second time, of a small vocabulary.
        candidates_of_many: Likewise, of one with at least ``many`` classes.
        many: See there.
        temperature: Factor on the cosines of patches and words.
        patch_share: Share of the patches over which a class is scored, at least one: those that
            show it best.
        copy_share: Likewise, of the small copy.
        nothing: Probability from which on a patch shows no class, or the highest if none has it.
        box_margin: Share of a box' longer side that is added around it.
        region_share: Share of a class' highest probability, from which on a patch says what it
            looks like.
        patches_weight: Factor on the log-odds of the patches.
        box_weight: On those of the box.
        image_weight: On those of the image.
        looks_scale: Factor on the discriminant of looks before classes are compared.
        looks_weight: Factor on the log-odds of looks.
        ridge: Share of the mean variance of looks added to each channel.
        few: Images of a class whose looks count for half.
        sure: Log-odds above which an image says what a class looks like.
        rounds: How often that is learnt.
        pull: Images of a class for which the mean of all classes stands in its scores.
    """

    threshold: float = 0.4
    candidates: int = 8
    candidates_of_many: int = 12
    many: int = 40
    temperature: float = 50.0
    patch_share: float = 0.01
    copy_share: float = 0.02
    nothing: float = 0.7
    box_margin: float = 0.15
    region_share: float = 0.8
    patches_weight: float = 0.5
    box_weight: float = 0.25
    image_weight: float = 0.12
    looks_scale: float = 0.05
    looks_weight: float = 0.4
    ridge: float = 1.0
    few: float = 8.0
    sure: float = 1.0
    rounds: int = 6
    pull: float = 5.0

    def count(self, classes: int) -> int:
        """Return K, how many candidates an image has.

        >>> [TagParams().count(classes) for classes in (3, 20, 80)]
        [3, 8, 12]
        """
        most = self.candidates if classes < self.many else self.candidates_of_many
        return min(most, classes)


@dataclass(frozen=True)
class NeighbourParams:
    """When the nearest regions of other images overrule a map; see ``clipes.maps.neighbours``.

    Chosen on half A of voc_sample, with plateaus around all but ``balance`` and ``least_images``:
    a class of three images is better left alone (coco_sample), one of five can be mended.

    Attributes:
        regions: Parts that an image is divided into.
        images: At most so many images are asked, evenly spaced among those that say what the
            classes look like.
        neighbours: Regions that are asked by a patch.
        temperature: Divides the cosines of patch and regions, of which the softmax weighs votes.
        balance: Votes are divided by this power of how common their class is.
        sure: Vote above which neighbours do see a class somewhere in the image.
        doubted: Share of that, below which they do not see it where its map is strong.
        least_images: Other images that must show the class.
    """

    regions: int = 24
    images: int = 500
    neighbours: int = 25
    temperature: float = 0.07
    balance: float = 0.5
    sure: float = 0.9
    doubted: float = 0.5
    least_images: int = 4


@dataclass(frozen=True)
class LooksRound:
    """One round of learning what the classes of a run look like.

    Attributes:
        towers: Names of the towers whose tokens are looked at, side by side.
        own_background: Share that an image's own background has in what the background looks like
            to it; the rest is the run's. The more images, the less is the run's like any of them.
        likeness_weight: Weight that likeness of tokens has in the affinity of the maps that are
            made after the round; the rest is CLIP's attention. 0 for its attention alone.
        neighbours: When neighbours overrule the maps that are made after the round, before the
            next learns from them; None for never.
    """

    towers: tuple[str, ...] = ("clip",)
    own_background: float = 0.0
    likeness_weight: float = 0.0
    neighbours: NeighbourParams | None = None


@dataclass(frozen=True)
class PatchParams:
    """Maps from comparing patches with words and with each other (not in the paper).

    Chosen on every second image of voc_sample, round values on plateaus; see
    ``benchmarks/ablation.py``.

    Attributes:
        temperature: Factor on the cosines between patches and words, instead of CLIP's 100.
        statistics_images: At most so many images of a run, evenly spaced, say what its classes
            look like; 0 for every image on its own.
        strong: Patches whose first map is above it show their class.
        weak: Patches all of whose first maps are below it are background.
        ridge: Share of the mean variance that is added to the covariance's diagonal.
        looks_weight: Factor on the log-odds of what a patch looks like.
        words_weight: Factor on the log-odds of the words.
        walk_power: t of all maps but the first, which need more spreading.
        rounds: Each learns from the maps of the one before, the first from those of the words. The
            default is what a run of an older clipes, which does not say it, was made with.
        likeness_of: The tower whose tokens say which patches are alike, where a round asks.
        likeness_temperature: Divides the cosines of those tokens.
        finer: Patches of that tower's closer look along a side, for one of the grid; the finished
            maps are brought to its grid, see ``clipes.maps.finer``. 1 for no closer look.
        finer_block: Block after which the closer look ends, counted from 1.
        finer_parts: Parts along each side that the closer look sees one by one.
        finer_temperature: Divides the cosines of what it sees.
    """

    temperature: float = 50.0
    statistics_images: int = 2000
    strong: float = 0.7
    weak: float = 0.3
    ridge: float = 0.02
    looks_weight: float = 0.1
    words_weight: float = 0.5
    walk_power: int = 1
    rounds: tuple[LooksRound, ...] = (LooksRound(),)
    likeness_of: str = "dino"
    likeness_temperature: float = 0.1
    finer: float = 1.0
    finer_block: int = 3
    finer_parts: int = 1
    finer_temperature: float = 0.05

    @property
    def learns(self) -> bool:
        """Whether it is learnt what the classes look like."""
        return bool(self.statistics_images and self.rounds)

    @property
    def looks_closer(self) -> bool:
        """Whether maps are brought to a finer grid."""
        return self.finer > 1

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the towers beside CLIP that are needed."""
        named = [name for part in self.rounds for name in part.towers] if self.learns else []
        alike = self.learns and any(part.likeness_weight for part in self.rounds)
        if alike or self.looks_closer:
            named.append(self.likeness_of)
        return tuple(dict.fromkeys(name for name in named if name != "clip"))


@dataclass(frozen=True)
class CamParams:
    """Activation maps and class-aware attention-based affinity (paper sections 3.1 and 3.3).

    Attributes:
        patches: None for softmax-GradCAM, the paper's maps; else how patches become maps.
        affinity_blocks: How many of the last attention maps make up the affinity A.
        sinkhorn_iterations: Times the columns, then the rows of A are normalised.
        walk_power: t, the power of the walk matrix T that spreads a map.
        box_threshold: lambda, the share of a map's maximum above which boxes are drawn;
            0.4 for VOC, 0.7 for COCO (paper section 4.1).
        last_row_in_box: Whether boxes may reach the last row and column. The reference clips box
            ends to size - 1 and uses them as exclusive ends, so there they never do.
        fp16_positions: Whether the resampled position embedding is rounded to fp16, as in the
            reference.
        max_patches: Larger images are shrunk to at most this many patches before they are encoded:
            attention needs memory with the square of it. 1600 is 640 x 640 pixels at patch 16, the
            largest image of VOC and COCO, so nothing changes there.
    """

    patches: PatchParams | None = None
    affinity_blocks: int = 8
    sinkhorn_iterations: int = 3
    walk_power: int = 2
    box_threshold: float = 0.4
    last_row_in_box: bool = True
    fp16_positions: bool = False
    max_patches: int = 1600

    @property
    def wide(self) -> bool:
        """Whether a vocabulary's further background words compete; the paper has its own list."""
        return self.patches is not None


@dataclass(frozen=True)
class CrfParams:
    """Fully connected CRF (Kraehenbuehl and Koltun 2011) with the reference's constants.

    Attributes:
        iterations: Mean-field updates. On better maps than the reference's, half as many do as
            well (voc_sample: 77.52 mIoU against 77.41).
        gaussian_sxy: Standard deviation of the smoothness kernel, in pixels.
        gaussian_compat: Potts weight of the smoothness kernel.
        bilateral_sxy: Spatial standard deviation of the appearance kernel, in pixels.
        bilateral_srgb: Colour standard deviation of the appearance kernel, in 8-bit steps.
        bilateral_compat: Potts weight of the appearance kernel.
    """

    iterations: int = 10
    gaussian_sxy: float = 1.0
    gaussian_compat: float = 3.0
    bilateral_sxy: float = 67.0
    bilateral_srgb: float = 3.0
    bilateral_compat: float = 4.0

    def of_segmenter(self) -> CrfParams:
        """Return the CRF of what a segmenter says of known labels, where this one is of maps.

        It follows the picture's edges already: the appearance kernel weighs three quarters
        (docs/segmenter.md, "Relabelling").
        """
        return replace(self, bilateral_compat=0.75 * self.bilateral_compat)


@dataclass(frozen=True)
class Preset:
    """Everything that is done to an image, from pixels to mask.

    Attributes:
        name: Name on the command line.
        cam: Settings of the activation maps.
        crf: Settings of the dense CRF.
        background_exponent: alpha in (1 - max_k map_k)^alpha, the background score of a pixel.
    """

    name: str
    cam: CamParams = field(default_factory=CamParams)
    crf: CrfParams = field(default_factory=CrfParams)
    background_exponent: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain nested data, for run.json."""
        return asdict(self)

    def with_box_threshold(self, value: float) -> Preset:
        """Return this preset with another lambda."""
        return replace(self, cam=replace(self.cam, box_threshold=value))

    def for_dataset(self, kind: str, box_threshold: float | None = None) -> Preset:
        """Return this preset with the lambda of a kind of data set.

        Args:
            kind: Of ``clipes.datasets.DATASETS``, or the vocabulary of one.
            box_threshold: A lambda that was asked for instead.
        """
        if box_threshold is None:
            box_threshold = BOX_THRESHOLDS.get(kind, self.cam.box_threshold)
        return self.with_box_threshold(box_threshold)


BOTH_TOWERS = PatchParams(
    rounds=(
        LooksRound(("dino",), own_background=0.15, neighbours=NeighbourParams()),
        LooksRound(("clip", "dino"), likeness_weight=0.5),
    ),
    finer=1.5,
    finer_parts=2,
)
"""Both towers, and a closer look of the second one."""

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("reference", cam=CamParams(last_row_in_box=False, fp16_positions=True)),
        Preset("default", cam=CamParams(patches=BOTH_TOWERS), crf=CrfParams(iterations=5)),
        Preset("clip", cam=CamParams(patches=PatchParams()), crf=CrfParams(iterations=5)),
        Preset(
            "fast",
            cam=CamParams(patches=PatchParams(statistics_images=0)),
            crf=CrfParams(iterations=5),
        ),
    )
}


def get_preset(name: str) -> Preset:
    """Return the preset called ``name``.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preset '{name}'", f"choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


RELABEL_SHARE = 0.5
"""A segmenter's share in the maps of ``relabel``: it counts as much as the maps it learnt from."""

OUTPUT_STRIDES = (8, 16, 32)
"""Pixels of the image per feature that a segmenter can have."""

TRAIN_SCALES = (1.0, 0.75, 0.5)
"""Scales of DeepLab-v2's training branches (DeepLab paper, section 4.1.1)."""


def _said(preset: Any, later: str) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """Return the settings of a segmenter as plain data, for run.json.

    Of the one that came later nothing is said while it is as before: trainings are gone on with.
    """
    before = next(one.default for one in fields(preset) if one.name == later)
    return {n: value for n, value in asdict(preset).items() if n != later or value != before}


@dataclass(frozen=True)
class SegmenterPreset:
    """How a segmenter is built, trained and asked (docs/method.md, section 6).

    Attributes:
        name: Name on the command line.
        arch: Head, one of ``clipes.choices.Arch``.
        backbone: One of ``clipes.choices.SegmenterBackbone``.
        output_stride: Pixels of the image per feature.
        crop: Side of the square training views, in pixels.
        batch: Images per update, over all processes and accumulated parts.
        accumulate: Parts an update's images are put through one after the other.
        iterations: Updates.
        lr: Learning rate of the backbone; the head's weights take ``head_lr`` times as much, its
            biases twice that again, and no weight decay.
        head_lr: See ``lr``.
        momentum: Of SGD.
        weight_decay: Of all weights but the head's biases.
        power: The rates fall as (1 - iteration / iterations)^power.
        scale: Range of the random scale of a view.
        colour: Largest relative change of brightness, contrast and saturation.
        train_scales: Scales of the training branches; more than one adds their maximum.
        freeze_norms: Whether the backbone's batch normalisation stays as pre-trained; without
            pre-trained weights it learns.
        even_classes: As in ``FrozenPreset``.
        test_scales: Scales whose probabilities are averaged in prediction.
        flip: Whether prediction also averages over the mirrored image.
        crf: Whether prediction ends with the dense CRF.
    """

    name: str
    arch: str = "deeplabv2"
    backbone: str = "resnet101"
    output_stride: int = 8
    crop: int = 321
    batch: int = 10
    accumulate: int = 2
    iterations: int = 20_000
    lr: float = 2e-4
    head_lr: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    power: float = 0.9
    scale: tuple[float, float] = (0.5, 1.5)
    colour: float = 0.0
    train_scales: tuple[float, ...] = TRAIN_SCALES
    freeze_norms: bool = True
    even_classes: bool = False
    test_scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    flip: bool = True
    crf: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, for run.json."""
        return _said(self, "even_classes")


@dataclass(frozen=True)
class FrozenPreset:
    """How a decoder on tokens of frozen towers is built, trained and asked.

    Attributes:
        name: Name on the command line.
        tokens: What it reads: CLIP's tokens after blocks 4 to 10, what its last block attends
            with, and DINOv2's last; CLIP alone, also its last in the space shared with words.
        linear: Of these, what a linear discriminant reads, which training starts from.
        width: Channels inside.
        blocks: Transformer blocks.
        heads: Attention heads of a block.
        dropout: Share of the fused channels that is dropped in training.
        max_patches: Larger images are shrunk to at most this many patches.
        batch: Images per update, over all processes and accumulated parts.
        accumulate: Parts an update's images are put through one after the other.
        iterations: Updates; with 484 images' encoding, a quarter of an hour of two cores.
        lr: Learning rate of AdamW, at its highest.
        warmup: Updates over which the rate rises; then it falls as half a cosine.
        weight_decay: Of all matrices.
        average: Share that the mean of earlier weights keeps at an update; the mean is the result.
        even_classes: Draw classes evenly, and then their images, rather than all images in turn.
        balance: How far rare labels count more than common ones in the loss, between 0, where all
            pixels count the same, and 1, where all labels do; needs ``linear``.
        spread: Whether prediction spreads the answers over what the towers hold for one thing.
        finer: Brings them to a grid whose sides have so many times as many patches, by a closer
            look of the second tower; 1 for none.
        adapts: Whether prediction brings the discriminant to what labels look like in an image;
            needs ``linear``.
        attention_power: To which power CLIP's attention is what prediction spreads answers over.
        test_scales: Scales whose probabilities are averaged in prediction.
        flip: Whether prediction also averages over the mirrored image.
        crf: Whether prediction ends with the dense CRF.
    """

    name: str
    tokens: tuple[str, ...] = ("clip.4", "clip.6", "clip.8", "clip.10", "clip.11", "dino.12")
    linear: tuple[str, ...] = ("clip.11", "dino.12")
    width: int = 256
    blocks: int = 2
    heads: int = 8
    dropout: float = 0.1
    max_patches: int = 1600
    batch: int = 8
    accumulate: int = 1
    iterations: int = 300
    lr: float = 1e-3
    warmup: int = 30
    weight_decay: float = 0.01
    average: float = 0.99
    even_classes: bool = False
    balance: float = 0.5
    spread: bool = True
    finer: float = 2.0
    adapts: bool = True
    attention_power: float = 1.0
    test_scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    crf: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, for run.json."""
        return _said(self, "attention_power")


@dataclass(frozen=True)
class WeClipPreset:
    """How WeCLIP (Zhang et al., CVPR 2024) is built, trained and asked; the defaults are VOC's.

    Attributes:
        name: Name on the command line.
        crop: Side of the square training views, in pixels.
        batch: Images per update, over all processes and accumulated parts.
        accumulate: Parts an update's images are put through one after the other.
        iterations: Updates.
        lr: Learning rate of AdamW, at its highest. Ten times what the published configuration says,
            for all that is trained is in the group that gets ten times as much.
        warmup: Updates over which the rate rises; then it falls in a line to 0.
        weight_decay: Of everything.
        scale: Range of the random scale of a view.
        normalise: Of ``clipes.choices.Normalise``: colours that count as mean and deviation.
        box_threshold: lambda, as in ``CamParams``.
        affinity_blocks: How many of the last attention maps make up the affinity at first.
        refine_blocks: How many of the last are chosen from once what is learnt refines it.
        refine_from: Updates after which it does. The published code counts its validation's passes
            along, so that VOC's begins at 9145.
        refine_absolute: Choose as in the paper rather than the code; see ``clipes.maps.rfm``.
        side: Longer side, in pixels, at which an image is looked at in prediction.
        test_scales: Scales whose scores are averaged in prediction.
        flip: Whether prediction also averages over the mirrored image.
        crf: Whether prediction ends with the dense CRF.
    """

    name: str
    crop: int = 320
    batch: int = 4
    accumulate: int = 1
    iterations: int = 30_000
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.01
    scale: tuple[float, float] = (0.5, 2.0)
    normalise: str = Normalise.imagenet.value
    box_threshold: float = 0.4
    affinity_blocks: int = 8
    refine_blocks: int = 6
    refine_from: int = 15_000
    refine_absolute: bool = False
    side: int = 512
    test_scales: tuple[float, ...] = (1.0, 0.75)
    flip: bool = True
    crf: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, for run.json."""
        return asdict(self)


@dataclass(frozen=True)
class WeClipPlusPreset(WeClipPreset):
    """How WeCLIP+ (Zhang et al., TPAMI 2025) is built, trained and asked; the defaults are VOC's.

    Attributes:
        boxes: Whether maps stay within the boxes of their strong parts while they are spread.
        sure_from: Updates after which pixels of which the decoder is sure are labelled by itself.
        sure: Probability above which it is.
    """

    lr: float = 2e-4
    affinity_blocks: int = 6
    refine_from: int = 0
    test_scales: tuple[float, ...] = (1.0, 1.5)
    boxes: bool = False
    sure_from: int = 18_000
    sure: float = 0.75


@dataclass(frozen=True)
class WeakClipPreset:
    """How WeakCLIP (Zhu et al., IJCV 2025) is built, trained and asked; the defaults are VOC's.

    Attributes:
        name: Name on the command line.
        blocks: Blocks of CLIP that are decoded, at strides that end with 32: all four from stride
            4, three from stride 8, which is as fine as the loss is.
        beside: Tokens of another tower that the decoder reads beside the words' scores, for whole
            images; none as published.
        chained: Whether layers of the co-attention follow each other, as in the paper. The code
            calls them side by side, and takes the last one's output.
        train_adapter: Whether the pyramid adapter learns, as in the paper. The code's learning rate
            for it is next to nothing.
        norm: Of ``clipes.choices.Norm``: in adapter and head.
        contexts: Learnt vectors before each name, where there is a text tower; 0 for constants and
            a learnt linear map, as where there is none.
        normalise: Of ``clipes.choices.Normalise``: colours that count as mean and deviation.
        crop: Side of the square training views, in pixels, and of the windows in prediction. 0 for
            whole images, whose tokens are computed once and kept.
        scale: Range of the random factor on the shorter side, which is ``crop`` before; for views.
        max_patches: Larger whole images are shrunk to at most this many patches.
        even_classes: As in ``FrozenPreset``.
        boundary_crf: The CRF that the boundary loss learns from, on pixels of stride 8.
        boundary_present: Whether it knows which classes an image has.
        boundary_every: Of so many images one has a boundary loss, which counts so many times.
        batch: Images per update, over all processes and accumulated parts.
        accumulate: Parts an update's images are put through one after the other.
        iterations: Updates.
        lr: Learning rate of AdamW, at its highest.
        last_lr: At its end, half a cosine later.
        warmup: Updates over which the rate rises, while it already falls.
        weight_decay: Of everything.
        average: Share that the mean of earlier weights keeps at an update; the mean is the result.
        test_scales: Scales whose probabilities are averaged in prediction; with a ``crop``, of a
            shorter side that is as long.
        flip: Whether prediction also averages over the mirrored image.
        crf: Whether prediction ends with the dense CRF.
    """

    name: str
    blocks: tuple[int, ...] = (4, 6, 8, 12)
    beside: tuple[str, ...] = ()
    chained: bool = True
    train_adapter: bool = True
    norm: str = Norm.batch.value
    contexts: int = 8
    normalise: str = Normalise.imagenet.value
    crop: int = 512
    scale: tuple[float, float] = (0.5, 2.0)
    max_patches: int = 1600
    even_classes: bool = False
    boundary_crf: CrfParams = CrfParams(10, 3.0, 3.0, 80.0, 13.0, 10.0)
    boundary_present: bool = False
    boundary_every: int = 1
    batch: int = 16
    accumulate: int = 1
    iterations: int = 20_000
    lr: float = 1e-4
    last_lr: float = 1e-6
    warmup: int = 1500
    weight_decay: float = 3e-5
    average: float = 0.0
    test_scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    flip: bool = True
    crf: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, for run.json."""
        return _said(self, "beside")


DECODER_CRF = CrfParams(bilateral_sxy=30.0)
"""The CRF after a decoder on frozen towers, which knows the coarse shape already: an appearance
kernel of half the reach (docs/segmenter.md, "The CRF of predictions")."""

WECLIP_CRF = CrfParams(gaussian_sxy=3.0, bilateral_sxy=64.0, bilateral_srgb=5.0)
"""The CRF after WeCLIP, as published."""

TOKEN_SPACE = 20 * 10**9
"""Bytes of kept tokens: about 3,000 images of VOC with the tokens of preset ``frozen``."""

AnySegmenterPreset: TypeAlias = SegmenterPreset | FrozenPreset | WeClipPreset | WeakClipPreset

_WEAKCLIP_SMALL = WeakClipPreset(
    "weakclip-small",
    blocks=(6, 8, 12),
    norm=Norm.group.value,
    normalise=Normalise.clip.value,
    crop=0,
    even_classes=True,
    boundary_present=True,
    batch=8,
    iterations=800,
    lr=3e-4,
    last_lr=0.0,
    warmup=30,
    weight_decay=0.01,
    average=0.99,
    test_scales=(1.0,),
    flip=False,
)

SEGMENTER_PRESETS: dict[str, AnySegmenterPreset] = {
    preset.name: preset
    for preset in (
        FrozenPreset("frozen"),
        FrozenPreset(
            "frozen-clip",
            tokens=("clip.4", "clip.6", "clip.8", "clip.10", "clip.11", "clip.joint"),
            linear=("clip.11", "clip.joint"),
            finer=1.0,
            adapts=False,  # what CLIP takes patches for is too often wrong to adapt to
            attention_power=1.5,
        ),
        WeClipPreset("weclip-voc"),
        WeClipPreset(
            "weclip-coco",
            iterations=80_000,
            box_threshold=BOX_THRESHOLDS["coco"],
            refine_blocks=10,
            refine_from=40_000,
        ),
        WeClipPlusPreset("weclip-plus-voc"),
        WeClipPlusPreset(
            "weclip-plus-coco",
            batch=8,
            iterations=80_000,
            box_threshold=BOX_THRESHOLDS["coco"],
            refine_blocks=8,
            boxes=True,
            sure_from=40_000,
        ),
        WeakClipPreset("weakclip-voc"),
        WeakClipPreset("weakclip-coco", batch=24, iterations=40_000),
        _WEAKCLIP_SMALL,
        replace(_WEAKCLIP_SMALL, name="weakclip-plus", beside=("dino.12",)),
        # CLIP-ES section 4.1 on kazuto1011/deeplab-pytorch's configs/voc12.yaml and coco.yaml; the
        # rate is for ImageNet weights, CLIP-ES takes 2.5e-5 for COCO's.
        SegmenterPreset("clip-es-voc"),
        SegmenterPreset("clip-es-coco", iterations=100_000),
        SegmenterPreset(
            "small",
            backbone="mobilenet_v3_large",
            output_stride=16,
            crop=225,
            batch=8,
            accumulate=1,
            iterations=600,
            lr=2e-4,
            scale=(0.5, 2.0),
            colour=0.2,
            train_scales=(1.0,),
            test_scales=(0.75, 1.0, 1.25),
            crf=False,
        ),
    )
}


def choose_segmenter_preset(name: str, dataset: str, *, gpu: bool) -> AnySegmenterPreset:
    """Return the segmenter's preset called ``name``; ``auto`` is one that suits the machine.

    Args:
        name: Of ``clipes.choices.SegmenterPresetName``.
        dataset: Kind of data set.
        gpu: Whether there is a GPU.
    """
    if name != SegmenterPresetName.auto:
        return get_segmenter_preset(name)
    if not gpu:
        return get_segmenter_preset(SegmenterPresetName.frozen)
    coco = dataset == DatasetKind.coco
    paper = SegmenterPresetName.clip_es_coco if coco else SegmenterPresetName.clip_es_voc
    return get_segmenter_preset(paper)


def get_segmenter_preset(name: str) -> AnySegmenterPreset:
    """Return the segmenter's preset called ``name``.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in SEGMENTER_PRESETS:
        known = ", ".join(SEGMENTER_PRESETS)
        raise UsageError(f"unknown preset '{name}'", f"choose one of {known}")
    return SEGMENTER_PRESETS[name]
