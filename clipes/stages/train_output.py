"""The folder of a training: whose it is, and how room is made for a new one."""

from __future__ import annotations

from clipes.datasets import Dataset
from clipes.disk.files import list_files, remove_file
from clipes.errors import ArtifactError
from clipes.run.curve import CURVE
from clipes.run.origin import PredictionOrigin
from clipes.seg.checkpoint import FINAL, saved_iterations
from clipes.stages.train_request import Sources

STAGE = "train-seg"


def check_target(sources: Sources) -> None:
    """Refuse a folder whose scores would be those of other data."""
    run, out = sources.run, sources.out
    if out.root == run.root or not out.exists():
        return
    if out.stage("cam").get("settings") != run.stage("cam").get("settings"):
        raise ArtifactError(
            f"{out.root} is a run of its own, not one of {run.root}", "choose another --out"
        )


def forget_training(sources: Sources, val: Dataset) -> None:
    """Make room for a training: nothing of an earlier one may be taken for its output.

    What no training wrote stays, such as a checkpoint under another name, unless it lies where a
    prediction goes. A folder other than the run's learns what data its masks came from.

    Args:
        sources: Where the output goes.
        val: The images that are predicted.

    Raises:
        WriteError: Something cannot be removed; what is left still counts as the earlier one's.
    """
    out = sources.out
    checkpoints, predictions = out.root / "checkpoints", out.root / "predictions"
    asked = {sample.id for sample in val.samples}
    made = [
        mask
        for mask in list_files(predictions, ".png")
        if mask.stem in asked or PredictionOrigin.of_file(mask)
    ]
    events = sorted((out.root / "tensorboard").glob("events.out.tfevents.*"))
    final = checkpoints / FINAL  # last: while it is there, the earlier training is
    for old in [*made, *events, out.root / CURVE, *saved_iterations(checkpoints), final]:
        remove_file(old, "check the permissions, or train into another folder (--out)")
    out.forget(STAGE, like=sources.run)
