"""What a run made, in the formats of other tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from clipes.datasets import Dataset
from clipes.datasets.coco import image_key
from clipes.disk.files import write_json
from clipes.disk.records import read_record
from clipes.errors import ArtifactError, ClipesError, UsageError, WriteError
from clipes.formats import FORMATS, Format, Item, Options, Plan, Writer
from clipes.run.folder import Run, check_same
from clipes.run.freshness import Freshness
from clipes.run.loop import Summary
from clipes.run.reopen import reopen
from clipes.types import Failure, Progress, Sample

SETTINGS = "export.json"
"""What says how a folder was written, so that nothing else is mixed into it."""


@dataclass(frozen=True)
class _Record:
    """What has to be known of how a folder was written."""

    settings: dict[str, Any]


def export(
    run: Run,
    root: Path | None,
    name: str,
    out: Path | None,
    options: Options,
    *,
    command: str,
    progress: Progress,
    say: Callable[[str], None],
    report: Callable[[Failure], None],
) -> tuple[Path, Summary]:
    """Write the masks or maps of a run in another format.

    A file of an image that is younger than what it is made from is left as it is; files that hold
    all images are written anew.

    Args:
        run: The run folder.
        root: Where the data set is, if not where run.json says.
        name: One of ``FORMATS``.
        out: Folder of the output; if None ``export/<name>`` in the run folder.
        options: What the user chose.
        command: The command line, for the record.
        progress: Called after each image.
        say: Told what is left out.
        report: Called with each image that cannot be written; the others go on.

    Returns:
        The folder, and how many images were written.

    Raises:
        UsageError: The format does not know one of the options, or a class has a name that it
            needs.
        ArtifactError: The run has nothing to export, or the folder cannot be written or holds
            something else.
        RunConflictError: The folder was written with other options.
    """
    form = FORMATS[name]
    _check_options(name, form, options)
    data = reopen(run, root)
    samples = _ready(run, data.samples, form, options, say)
    folder = out or run.root / "export" / name
    settings = {
        "format": name,
        "run": str(run.root.absolute()),
        "classes": data.classes,
        **{option: getattr(options, option) for option in sorted(form.options)},
    }
    _begin(folder, settings, command)
    current = Freshness.of(run, data.classes)
    stale = current.unusable if form.source == "pseudo" else current.unusable_maps
    plan = Plan(folder, samples, data.classes, _split(run), _numbers(data), options)
    failures = []
    with form.write(plan) as writer:
        todo = [s for s in samples if stale(s) or not _is_done(writer, s, run, form)]
        progress(0, len(todo))
        for index, sample in enumerate(todo):
            try:
                if reason := stale(sample):
                    raise ArtifactError(reason)
                writer.add(Item(sample, run, plan))
            except WriteError:
                raise
            except ClipesError as error:
                failures.append(Failure(sample.id, str(error)))
                report(failures[-1])
            progress(index + 1, len(todo))
    summary = Summary(len(todo) - len(failures), len(samples) - len(todo), tuple(failures))
    return folder, summary


def _check_options(name: str, form: Format, options: Options) -> None:
    for field in fields(options):
        if getattr(options, field.name) != field.default and field.name not in form.options:
            known = [other for other in FORMATS if field.name in FORMATS[other].options]
            raise UsageError(
                f"--{field.name} means nothing to the format {name}",
                f"drop it; {', '.join(known)} know it",
            )


def _ready(
    run: Run,
    samples: Sequence[Sample],
    form: Format,
    options: Options,
    say: Callable[[str], None],
) -> tuple[Sample, ...]:
    """Return the images for which there is what the format is made from."""
    what, remedy = "activation map", "run 'clipes cam' first"
    if form.source == "pseudo":
        what, remedy = "pseudo-mask", f"run 'clipes refine {run.root}' first"
    present = set(run.ids(form.source))
    if options.confidence is not None:
        present &= set(run.ids("confidence"))
    ready = tuple(sample for sample in samples if sample.id in present)
    if not ready:
        raise ArtifactError(f"no image of {run.root} has a {what}", remedy)
    if len(ready) < len(samples):
        missing = len(samples) - len(ready)
        say(f"left out: {missing} of {len(samples)} images have no {what} yet; {remedy}")
    return ready


def _is_done(writer: Writer, sample: Sample, run: Run, form: Format) -> bool:
    path = writer.path(sample)
    source = run.pseudo_path(sample.id) if form.source == "pseudo" else run.cams_path(sample.id)
    try:
        return path is not None and path.stat().st_mtime >= source.stat().st_mtime
    except FileNotFoundError:
        return False


def _begin(folder: Path, settings: dict[str, object], command: str) -> None:
    """Record how a folder is written, or check that it was written so before."""
    path = folder / SETTINGS
    plain = json.loads(json.dumps(settings))
    if path.exists():
        remedy = "delete the folder, or choose another --out"
        before = read_record(path, _Record, "the record of an export", remedy)
        check_same(folder, "export", before.settings, plain)
    elif folder.is_dir() and any(folder.iterdir()):
        # A data set has the same folders as some formats: its masks must not be written over.
        raise ArtifactError(
            f"{folder} holds files that 'clipes export' did not write", "choose an empty --out"
        )
    write_json(path, {"command": command, "settings": plain})


def _split(run: Run) -> str:
    """Return what the list of the run's images is called: a name, never a path."""
    split = run.cam_record().settings.split
    return Path(split).stem if split else "train"


def _numbers(data: Dataset) -> dict[str, int]:
    """Return a number for each image: COCO's own, else from 1 in the order of the data set."""
    ids = [sample.id for sample in data.samples]
    keys = [image_key(id_) for id_ in ids]
    if data.name == "coco" and all(key.isdecimal() for key in keys) and len(set(keys)) == len(keys):
        return {id_: int(key) for id_, key in zip(ids, keys, strict=True)}
    return {id_: number for number, id_ in enumerate(ids, start=1)}
