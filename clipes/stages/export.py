"""What a run made, in the formats of other tools."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from clipes.datasets import Dataset
from clipes.datasets.coco import image_key
from clipes.disk.claim import remove_leftovers
from clipes.disk.files import sha256_of
from clipes.errors import ArtifactError, UsageError
from clipes.formats import FORMATS, Format, Item, Options, Plan, Writer
from clipes.formats.base import common_folder
from clipes.formats.written import Written
from clipes.listener import Listener
from clipes.report.measure import review_queue
from clipes.run.corrected import Chosen
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.loop import Summary, for_each, waiting
from clipes.run.origin import digest
from clipes.run.reopen import orphans, reopen, unmade
from clipes.stages.report import measure_run
from clipes.types import Failure, Sample


@dataclass(frozen=True)
class ExportRequest:
    """All that ``clipes export`` is told.

    Attributes:
        name: One of ``FORMATS``.
        root: Where the data set is, if not where run.json says.
        out: Folder of the output; if None ``export/<name>`` in the run folder.
        options: What the user chose.
        command: The command line, for the record.
        use_corrected: Whether masks that a person corrected go before the run's.
        first: Only so many images, those that need a person most; None for all.
    """

    name: str
    root: Path | None = None
    out: Path | None = None
    options: Options = field(default_factory=Options)
    command: str = ""
    use_corrected: bool = True
    first: int | None = None

    @property
    def folder_name(self) -> str:
        """What the folder of the output is called by default."""
        return self.name if self.first is None else f"{self.name}-first-{self.first}"


def export(request: ExportRequest, run: Run, listener: Listener) -> tuple[Path, Summary]:
    """Write the masks or maps of a run in another format.

    A file of an image that was made from what there is now is left as it is, and one of an image
    that cannot be exported any more is removed; files that hold all images are written anew. Files
    that someone edited since are neither written over nor removed.

    Args:
        request: What is asked for.
        run: The run folder.
        listener: Who is told what is left out, removed or cannot be written, and how it goes.

    Returns:
        The folder, and how many images were written.

    Raises:
        UsageError: The format does not know one of the options, or a class has a name that it
            needs.
        ArtifactError: The run has nothing to export, or the folder cannot be written or holds
            something else.
        RunConflictError: The folder was written with other options.
    """
    name, options = request.name, request.options
    form = FORMATS[name]
    _check_options(name, form, options)
    data = reopen(run, request.root)
    if remark := orphans(run, data, form.source):
        listener.say(remark)
    fresh = Freshness.of(run, data.classes)
    masks = Chosen(run, fresh, request.use_corrected)
    samples = _ready(masks, data.samples, form, options, listener)
    if request.first is not None:
        samples = _first(request, run, samples, data, listener)
    folder = request.out or run.root / "export" / request.folder_name
    settings = {
        "format": name,
        "run": str(run.root.absolute()),
        "classes": data.classes,
        "first": request.first,
        **_chosen(form, options),
    }
    unknown = {"first": None, **_chosen(form, Options())}  # to an older clipes
    remove_leftovers(folder)  # of an export that was killed before it had a record
    written = Written(folder, settings, request.command, unknown)
    images = common_folder(data.samples)
    plan = Plan(folder, samples, data.classes, _split(run), images, _numbers(data), options)
    with form.write(plan) as writer:
        job = _Job(masks, fresh, plan, form, writer, written)
        summary = job.run_all(listener)
        job.remove_others(summary.failures, listener.say)
    if lost := writer.lost():
        listener.say(f"lost in {name}: {lost}")
    for failure in data.failures:
        listener.report(failure)
    return folder, replace(summary, failures=(*summary.failures, *data.failures))


@dataclass(frozen=True)
class _Job:
    """An export under way.

    Attributes:
        masks: What is exported.
        fresh: Tells what is out of date of maps.
        plan: Which images, and how.
        form: The format.
        writer: Its writer, open.
        written: What was written before.
    """

    masks: Chosen
    fresh: Freshness
    plan: Plan
    form: Format
    writer: Writer
    written: Written

    def run_all(self, listener: Listener) -> Summary:
        """Write every image that is not done; argument and errors as for ``export``."""
        made_from: dict[str, str] = {}
        placed: set[str] = set()

        def is_done(sample: Sample) -> bool:
            made_from[sample.id] = self._made_from(sample)
            if self._is_done(sample, made_from[sample.id]):
                placed.add(sample.id)
            return sample.id in placed and not self.writer.one_file

        todo = waiting(self.plan.samples, is_done, listener)
        files = {sample.id: self.writer.files(sample) for sample in todo if sample.id not in placed}
        for folder in {path.parent for paths in files.values() for path in paths}:
            remove_leftovers(folder)
        self.written.save()  # so that the folder is known as an export's, however this ends

        def write(sample: Sample) -> None:
            self._write(sample, placed=sample.id in placed)
            if sample.id in files:
                self.written.keep(sample.id, made_from[sample.id], files[sample.id])

        try:
            # One after the other: formats of one file are written in the order of the images.
            with listener.progress("export") as progress:
                summary = for_each(write, todo, progress=progress, report=listener.report)
        finally:
            self.written.save()
        return replace(summary, skipped=len(self.plan.samples) - len(todo))

    def remove_others(self, failed: Sequence[Failure], say: Callable[[str], None]) -> None:
        """Remove what was written before of images that are not in this export.

        Args:
            failed: Images that could not be written: what is there of them is of before, too.
            say: Told what is removed, and what is not.
        """
        exported = {s.id for s in self.plan.samples} - {failure.id for failure in failed}
        others = [id_ for id_ in self.written.ids if id_ not in exported]
        removed = [id_ for id_ in others if self.written.remove(id_)]
        self.written.save()
        if removed:
            say(f"removed: the files of {_images(removed)} that are not in this export any more")
        edited = [(id_, path) for id_ in others if (path := self.written.edited(id_))]
        if edited:
            say(
                f"kept: the files of {_images([id_ for id_, _ in edited])} that are not in this "
                f"export any more; they were edited since they were written: {edited[0][1]}"
            )

    def _is_done(self, sample: Sample, made_from: str) -> bool:
        files = self.writer.files(sample)
        done = bool(files) and self.written.is_done(sample.id, made_from, files)
        return done and not self._stale(sample)

    def _stale(self, sample: Sample) -> str:
        if self.form.source == "pseudo":
            return self.masks.unusable(sample)
        return self.fresh.unusable_maps(sample)

    def _write(self, sample: Sample, *, placed: bool) -> None:
        if reason := self._stale(sample):
            raise ArtifactError(reason)
        if not placed:
            files = self.writer.files(sample)
            if edited := self.written.edited(sample.id, files):
                raise ArtifactError(
                    f"{edited} was edited since it was written, and what it was made from has "
                    "changed",
                    "it may be a person's work: delete it to have it written again",
                )
            self.written.begin(sample.id, files)
        self.writer.add(Item(sample, self._files(sample), self.plan, placed))

    def _files(self, sample: Sample) -> Run:
        """Return the folder with what the files of an image are made from."""
        return self.masks.files(sample) if self.form.source == "pseudo" else self.masks.run

    def _made_from(self, sample: Sample) -> str:
        """Return the digest of all that the files of an image are made from.

        The picture counts by where it is: what is in it changes the mask or the maps.
        """
        files = self._files(sample)
        if self.form.source == "cams":
            return digest([_sha256(files.cams_path(sample.id))])
        unsure = self.plan.options.confidence is not None
        return digest(
            [
                _sha256(files.pseudo_path(sample.id)),
                _sha256(files.confidence_path(sample.id)) if unsure else "",
                str(sample.image.absolute()),
                sample.image.stat().st_size if sample.image.is_file() else 0,
            ]
        )


def _sha256(path: Path) -> str:
    """Return the sha256 of a file; empty if it cannot be read, which its reader will say."""
    try:
        return sha256_of(path)
    except OSError:
        return ""


def _images(ids: Sequence[str]) -> str:
    return f"{len(ids)} image{'s' * (len(ids) > 1)} (the first is {ids[0]})"


def _chosen(form: Format, options: Options) -> dict[str, object]:
    """Return the options that a format knows, by name."""
    return {option: getattr(options, option) for option in sorted(form.options)}


def _check_options(name: str, form: Format, options: Options) -> None:
    for option in fields(options):
        if getattr(options, option.name) != option.default and option.name not in form.options:
            known = [other for other in FORMATS if option.name in FORMATS[other].options]
            raise UsageError(
                f"--{option.name} means nothing to the format {name}",
                f"drop it; it is for {', '.join(known)}",
            )


def _ready(
    masks: Chosen,
    samples: Sequence[Sample],
    form: Format,
    options: Options,
    listener: Listener,
) -> tuple[Sample, ...]:
    """Return the images for which there is what the format is made from."""
    run, what, remedy = masks.run, "activation map", "run 'clipes cam' first"
    if form.source == "pseudo":
        what, remedy = "pseudo-mask", f"run 'clipes refine {run.root}' first"
    present = set(run.ids(form.source))
    if options.confidence is not None:
        present &= set(run.ids("confidence"))
    if form.source == "pseudo":
        present |= {sample.id for sample in samples if masks.is_corrected(sample)}
    ready = tuple(sample for sample in samples if sample.id in present)
    if not ready:
        raise ArtifactError(f"no image of {run.root} has a {what}", remedy)
    if remark := unmade(samples, present, what, remedy):
        listener.say(remark)
    return ready


def _first(
    request: ExportRequest,
    run: Run,
    ready: Sequence[Sample],
    data: Dataset,
    listener: Listener,
) -> tuple[Sample, ...]:
    """Return the first images of the review queue as it is now, in its order.

    Raises:
        ArtifactError: No image is in it.
    """
    present, mended = set(run.ids("cams")), request.use_corrected
    with_maps = [sample for sample in data.samples if sample.id in present]
    with listener.progress("queue") as progress:
        rows, _ = measure_run(run, with_maps, data.classes, None, progress, use_corrected=mended)
    by_id = {sample.id: sample for sample in ready}
    queue = [by_id[row.id] for row in review_queue(rows) if not row.failure and row.id in by_id]
    if not queue:
        raise ArtifactError(
            f"no image of {run.root} is in the review queue",
            f"see 'clipes report {run.root}': a person corrected all of them, or none can be used",
        )
    chosen = tuple(queue[: request.first])
    listener.say(f"the first {len(chosen)} of {len(queue)} images in the review queue")
    return chosen


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
