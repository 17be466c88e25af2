"""The options of ``train-seg`` and ``predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipes.choices import Amp, Arch, Loss, SegmenterBackbone, SegmenterPresetName

RunFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--run-folder", "--run", help="The same as RUN. (torchrun takes --run for its own.)"
    ),
]
CglOption = Annotated[
    bool, typer.Option("--cgl/--no-cgl", help="Leave out pixels of low confidence.")
]
ThresholdOption = Annotated[
    float, typer.Option(min=0, max=1, help="mu: the confidence that --cgl asks for.")
]
LossOption = Annotated[Loss, typer.Option(help="soft: each pixel counts by its confidence.")]
ResumeOption = Annotated[
    bool, typer.Option(help="Go on from the latest checkpoint, or start over.")
]
OutOption = Annotated[
    Path | None, typer.Option(help="Folder of the output. (default: the run folder)")
]
PresetOption = Annotated[
    SegmenterPresetName,
    typer.Option(
        help="Recipe. auto: clip-es-* on a GPU, else frozen, a decoder on frozen "
        "towers, or small if a backbone is named."
    ),
]
ArchOption = Annotated[Arch | None, typer.Option(help="Head. (default: the preset's)")]
BackboneOption = Annotated[
    SegmenterBackbone | None, typer.Option(help="Backbone. (default: the preset's)")
]
BackboneWeightsOption = Annotated[
    str, typer.Option(help="auto (torchvision's ImageNet weights), none, or a file.")
]
OutputStrideOption = Annotated[
    int | None, typer.Option(help="8, 16 or 32. (default: the preset's)")
]
SplitOption = Annotated[
    str | None, typer.Option(help="List of images to learn from. (default: the run's)")
]
MasksOption = Annotated[
    Path | None, typer.Option(help="Folder of masks to learn. (default: the run's)")
]
ConfidenceOption = Annotated[
    Path | None, typer.Option(help="Folder of confidence maps that goes with --masks.")
]
ValOption = Annotated[
    str | None, typer.Option(help="List of images to predict at the end. (default: val)")
]
RootOption = Annotated[
    Path | None, typer.Option(help="Folder of the data set. (default: as in cam)")
]
IterationsOption = Annotated[int | None, typer.Option(min=1, help="Updates of the training.")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Images per update, in all.")]
AccumulateOption = Annotated[
    int | None, typer.Option(min=1, help="Parts an update's images are put through in.")
]
CropOption = Annotated[int | None, typer.Option(min=8, help="Side of the views, in pixels.")]
LrOption = Annotated[float | None, typer.Option(min=0, help="Highest learning rate.")]
EvenClassesOption = Annotated[
    bool | None,
    typer.Option(help="Draw classes evenly, so that rare ones come as often as others."),
]
MultiScaleOption = Annotated[
    bool | None, typer.Option(help="Train at scales 1, .75, .5 and on their maximum.")
]
FreezeNormsOption = Annotated[
    bool | None, typer.Option(help="Keep the backbone's batch normalisation.")
]
CrfOption = Annotated[bool | None, typer.Option(help="End predictions with the dense CRF.")]
TestScalesOption = Annotated[
    str | None, typer.Option(help="Scales that predictions average, by comma.")
]
FlipOption = Annotated[bool | None, typer.Option(help="Predictions average in the mirror image.")]
TokenSpaceOption = Annotated[
    float, typer.Option(min=0, help="GB that kept tokens of frozen towers take.")
]
AmpOption = Annotated[Amp, typer.Option(help="Precision of the network.")]
LoadersOption = Annotated[
    int | None, typer.Option(min=0, help="Threads that load ahead. (default: 4 for a GPU, else 0)")
]
SaveEveryOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Iterations between checkpoints. (default: a tenth of all, 500 at most)"
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of weights, order and views.")]

CheckpointArgument = Annotated[Path, typer.Argument(help="A checkpoint that train-seg wrote.")]
FromOption = Annotated[
    Path, typer.Option("--from", help="The checkpoint that looks at the images.")
]
LabelWorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images at once, each of up to 2 GB of memory. (default: one per core, for a GPU 4)",
    ),
]
LabelCrfOption = Annotated[
    bool, typer.Option("--crf/--no-crf", help="End with the dense CRF over the classes present.")
]
ShareOption = Annotated[
    float,
    typer.Option(help="The segmenter's share in a mask; the rest is the run's own maps."),
]
RelabelledOption = Annotated[
    bool, typer.Option("--relabelled", help="Learn from the masks of 'clipes relabel'.")
]
ImagesArgument = Annotated[list[Path], typer.Argument(help="Images, or folders of images.")]
MasksOutOption = Annotated[Path, typer.Option("--out", help="Folder for the masks.")]
ScalesOption = Annotated[
    str | None, typer.Option(help="Scales to average, by comma. (default: the training's)")
]
MirrorOption = Annotated[
    bool | None, typer.Option(help="Average in the mirror image. (default: the training's)")
]
EndWithCrfOption = Annotated[
    bool | None, typer.Option(help="End with the dense CRF. (default: the training's)")
]
WindowOption = Annotated[
    int, typer.Option(min=64, help="Largest side, in pixels, that DeepLab takes in at once.")
]
