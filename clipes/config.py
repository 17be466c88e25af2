"""The method's constants, with their source, and the presets made of them.

A preset is data: one frozen value that says everything a run does to an image, printed in run.json.
``reference`` reproduces the published code (CLIP-ES, arXiv:2212.09506; linyq2117/CLIP-ES), quirks
included; ``default`` is what measures best without training; ``fast`` trades masks for time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from clipes.errors import UsageError

DEFAULT_TEMPLATE = "a clean origami {}."
"""The prompt the paper chooses by sharpness (section 3.2)."""

CONFIDENCE_THRESHOLD = 0.95
"""mu of the confidence-guided loss (section 3.4): pixels below it are not trained on."""


@dataclass(frozen=True)
class CamParams:
    """Softmax-GradCAM and class-aware attention-based affinity (paper sections 3.1 and 3.3).

    Attributes:
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

    affinity_blocks: int = 8
    sinkhorn_iterations: int = 3
    walk_power: int = 2
    box_threshold: float = 0.4
    last_row_in_box: bool = True
    fp16_positions: bool = False
    max_patches: int = 1600


@dataclass(frozen=True)
class CrfParams:
    """Fully connected CRF (Kraehenbuehl and Koltun 2011) with the reference's constants.

    Attributes:
        iterations: Mean-field updates.
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
        """Return this preset with another lambda (it depends on the data set)."""
        return replace(self, cam=replace(self.cam, box_threshold=value))


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("reference", cam=CamParams(last_row_in_box=False, fp16_positions=True)),
        Preset("default"),
        Preset("fast", crf=CrfParams(iterations=5)),
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
