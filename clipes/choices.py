"""What can be chosen, by the names that the command line, run.json and Python have in common.

Each is text, too: ``DatasetKind.voc == "voc"``, and either looks up the same entry of a dictionary.
Nothing is imported here, so that the command line can offer choices without waiting for torch.
"""

from __future__ import annotations

from enum import Enum


class Choice(str, Enum):
    """One of a few names."""

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return all names, in order."""
        return tuple(choice.value for choice in cls)


class DatasetKind(Choice):
    """Kinds of data sets; ``clipes.datasets.DATASETS`` opens them."""

    voc = "voc"
    coco = "coco"
    folder = "folder"
    examples = "examples"


class PresetName(Choice):
    """Presets of the masks; ``clipes.config.PRESETS`` holds them."""

    reference = "reference"
    default = "default"
    clip = "clip"
    fast = "fast"


class Fusion(Choice):
    """Where the synonyms of a class become one (paper section 3.2).

    Attributes:
        sentence: In the prompt: the words joined by commas, as in the reference.
        feature: After the text tower: the mean of the unit vectors of one prompt per synonym.
        cam: After the activation maps: the mean of one map per synonym, see ``clipes.maps.fusion``.
        cam_max: Likewise, but the largest value at each patch.
    """

    sentence = "sentence"
    feature = "feature"
    cam = "cam"
    cam_max = "cam-max"


class Descriptions(Choice):
    """What the descriptions of a class in a vocabulary do for it (not in the paper).

    Its sentences are read as they stand, beside the prompt of its name, which counts as one more.

    Attributes:
        average: The class's vector is the mean of all their unit vectors.
        max: The class's score is the largest of all their scores: at each patch, where patches are
            compared with words; else of the image, before the gradient.
    """

    average = "average"
    max = "max"


class Precision(Choice):
    """Precisions of the linear layers of CLIP's image tower.

    Attributes:
        fp32: As the weights are.
        bf16: Factors rounded to bf16, sums in fp32.
        fp16: Likewise.
        auto: bf16 where that is faster, else fp32.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    auto = "auto"


class CrfBackend(Choice):
    """Implementations of the dense CRF."""

    numba = "numba"
    pydensecrf = "pydensecrf"


class RefineBackend(Choice):
    """What images are spread over: processes or threads of this machine, or a cluster."""

    loky = "loky"
    threading = "threading"
    ray = "ray"
    dask = "dask"


class SegmenterPresetName(Choice):
    """Recipes of a segmenter; ``clipes.config.SEGMENTER_PRESETS`` holds them.

    Attributes:
        auto: The paper's on a GPU, ``frozen`` without.
        clip_es_voc: The paper's for VOC.
        clip_es_coco: The paper's for COCO.
        small: For processors.
        frozen: A decoder on tokens of frozen towers.
        frozen_clip: The same on CLIP alone.
        weclip_voc: WeCLIP as published for VOC, which makes its labels itself.
        weclip_coco: Likewise for COCO.
        weclip_plus_voc: WeCLIP+, with DINOv2 beside CLIP, as published for VOC.
        weclip_plus_coco: Likewise for COCO.
        weakclip_voc: WeakCLIP as published for VOC.
        weakclip_coco: Likewise for COCO.
        weakclip_small: WeakCLIP for processors, on tokens that are kept.
        weakclip_plus: The same with DINOv2 beside CLIP.
    """

    auto = "auto"
    clip_es_voc = "clip-es-voc"
    clip_es_coco = "clip-es-coco"
    small = "small"
    frozen = "frozen"
    frozen_clip = "frozen-clip"
    weclip_voc = "weclip-voc"
    weclip_coco = "weclip-coco"
    weclip_plus_voc = "weclip-plus-voc"
    weclip_plus_coco = "weclip-plus-coco"
    weakclip_voc = "weakclip-voc"
    weakclip_coco = "weakclip-coco"
    weakclip_small = "weakclip-small"
    weakclip_plus = "weakclip-plus"


class Normalise(Choice):
    """Whose mean and deviation of colours are taken off an image before CLIP sees it.

    Attributes:
        clip: CLIP's own.
        imagenet: ImageNet's, as WeCLIP was published.
    """

    clip = "clip"
    imagenet = "imagenet"


class Norm(Choice):
    """What normalises channels: over a batch, or in groups over each image of its own."""

    batch = "batch"
    group = "group"


class Arch(Choice):
    """Heads of a segmenter."""

    deeplabv2 = "deeplabv2"
    deeplabv3 = "deeplabv3"
    deeplabv3plus = "deeplabv3plus"


class SegmenterBackbone(Choice):
    """Backbones of a segmenter.

    ``_v1`` is the layout of the ResNet paper, in which the first 1 x 1 of a bottleneck strides:
    that of weights from Caffe and Keras. torchvision strides in the 3 x 3. Names and shapes of the
    parameters agree, so a file does not tell which of the two it is for.
    """

    resnet18 = "resnet18"
    resnet50 = "resnet50"
    resnet101 = "resnet101"
    resnet50_v1 = "resnet50_v1"
    resnet101_v1 = "resnet101_v1"
    mobilenet_v3_large = "mobilenet_v3_large"


class Loss(Choice):
    """Losses: plain cross-entropy, or weighted by confidence."""

    ce = "ce"
    soft = "soft"


class Amp(Choice):
    """Precision of a segmenter in training.

    Attributes:
        auto: bf16 on GPUs that have it and, for decoders on tokens, on processors that have it.
    """

    auto = "auto"
    none = "none"
    bf16 = "bf16"
    fp16 = "fp16"


class ImportFormat(Choice):
    """Formats that corrected masks come back in; ``clipes.formats.READERS`` reads them."""

    coco = "coco"
    labelme = "labelme"
    cvat = "cvat"
    voc = "voc"


class ExportFormat(Choice):
    """Formats of other tools; ``clipes.formats.FORMATS`` writes them."""

    coco = "coco"
    labelme = "labelme"
    cvat = "cvat"
    cvat_mask = "cvat-mask"
    label_studio = "label-studio"
    mmseg = "mmseg"
    voc = "voc"
    ultralytics = "ultralytics"
    yolo_seg = "yolo-seg"
    clip_es = "clip-es"
