"""The page that shows a run, and the queue of masks that need a person, from what is on disk."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from clipes.datasets import Dataset
from clipes.disk.claim import remove_leftovers
from clipes.disk.files import list_files
from clipes.errors import ArtifactError, ClipesError
from clipes.listener import Listener
from clipes.masks.scores import Scores
from clipes.masks.values import value_count
from clipes.report.measure import Row, Tally, measure
from clipes.report.page import Head, write_page, write_queue
from clipes.report.pictures import Pictures, draw
from clipes.run.corrected import Chosen
from clipes.run.curve import TrainingPoint, read_curve
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.loop import in_groups, in_order, part_of
from clipes.run.record import CamRecord
from clipes.run.relabelled import Relabelled
from clipes.run.reopen import orphans, preset_of, reopen, unmade
from clipes.stages.evaluate import score_relabelled, score_segmenter
from clipes.types import Failure, Progress, Sample, evenly_spaced

LARGE, THUMBNAILS = 200, 2000
"""How many images have large pictures, and how many at least a thumbnail: some 30 MB together."""

PAGE, QUEUE = "index.html", "review.csv"
"""What is written into the folder ``report`` of a run."""

_CHUNK = 16  # images; their sums are of one size for any number of them
_SPREAD = 4  # one in so many pictures is of a sample of the classes, and of the lowest mIoU


@dataclass(frozen=True)
class ReportRequest:
    """All that ``clipes report`` is told.

    Attributes:
        root: Where the data set is, if not where run.json says.
        large: Most images with large pictures of maps, mask and confidence.
        thumbnails: Most images with at least a thumbnail.
        workers: Threads; None for as many as there are cores.
        use_corrected: Whether masks that a person corrected are shown, and out of the queue.
    """

    root: Path | None = None
    large: int = LARGE
    thumbnails: int = THUMBNAILS
    workers: int | None = None
    use_corrected: bool = True


def make_report(
    request: ReportRequest, run: Run, listener: Listener
) -> tuple[Path, tuple[Failure, ...]]:
    """Write ``report/index.html`` and ``report/review.csv`` of a run.

    Args:
        request: What is asked for.
        run: The run folder.
        listener: Who is told what is left out, and how it goes.

    Returns:
        Path of the page, and each image that cannot be shown, also those that the data set lacks
        something of.

    Raises:
        ArtifactError: The run has no maps, or the page cannot be written.
    """
    remove_leftovers(run.root / "report")
    data = reopen(run, request.root)
    present = set(run.ids("cams"))
    samples = [sample for sample in data.samples if sample.id in present]
    if not samples:
        raise ArtifactError(f"no image of {run.root} has maps", "run 'clipes cam' first")
    missing = unmade(data.samples, present, "maps", "run 'clipes cam' first")
    for remark in filter(None, (orphans(run, data, "cams"), missing)):
        listener.say(remark)
    with listener.progress("report") as progress:
        path, rows = _write(request, run, data, samples, listener.say, progress)
    unshown = [Failure(row.id, row.failure) for row in rows if row.failure]
    failures = (*unshown, *data.failures)
    for failure in failures:
        listener.report(failure)
    return path, failures


def _write(
    request: ReportRequest,
    run: Run,
    data: Dataset,
    samples: Sequence[Sample],
    say: Callable[[str], None],
    progress: Progress,
) -> tuple[Path, list[Row]]:
    """Write page and queue; return the page's path, and what is known of each image."""
    large, thumbnails = request.large, request.thumbnails
    total = len(samples) + min(max(large, thumbnails), len(samples))
    measured, drawn = part_of(progress, 0, total), part_of(progress, len(samples), total)
    mended = request.use_corrected
    rows, tally = measure_run(
        run, samples, data.classes, request.workers, measured, use_corrected=mended
    )
    if run.relabel_record() is not None:
        alone = sum(row.signs is not None and not row.signs.contests for row in rows)
        if alone:
            say(
                f"{alone} of the images have no mask that the segmenter would make now, and are "
                "queued without its say (run 'clipes relabel' again)"
            )
    scores = tally.scores() | _segmenter(run, request.root, data, say)
    if not scores:
        say("no scores: the images have no ground truth ('clipes eval RUN --gt DIR' prints some)")
    chosen = choose(rows, large, thumbnails)
    head = _head(run, data, rows, chosen, say)
    jobs = [
        (index, samples[index], big)
        for index, big in sorted(chosen.items(), key=lambda item: -rows[item[0]].urgency)
    ]
    exponent = preset_of(run).background_exponent
    masks = Chosen(run, Freshness.of(run, data.classes), mended)
    work = partial(_draw_one, masks=masks, classes=data.classes, exponent=exponent)
    path = run.root / "report" / PAGE
    with closing(in_order(work, jobs, workers=request.workers, progress=drawn)) as pictures:
        rows = write_page(path, head, rows, tally, scores, pictures)
    write_queue(path.with_name(QUEUE), rows, data.classes)
    return path, rows


def measure_run(
    run: Run,
    samples: Sequence[Sample],
    classes: Sequence[str],
    workers: int | None,
    progress: Progress,
    *,
    use_corrected: bool = True,
) -> tuple[list[Row], Tally]:
    """Look at what a run made for its images.

    Args:
        run: The run folder.
        samples: All images that have maps.
        classes: Class names in mask order.
        workers: Threads; None for as many as there are cores.
        progress: Called after every few images.
        use_corrected: Whether a person's masks are looked at, too.

    Returns:
        A row per image, in order, and the sums over all.
    """
    exponent = preset_of(run).background_exponent
    current = Freshness.of(run, classes)
    work = partial(
        measure,
        run=run,
        classes=classes,
        exponent=exponent,
        current=current,
        again=None if run.relabel_record() is None else Relabelled.of(run),
        images=Counter(label for sample in samples for label in sample.labels),
        use_corrected=use_corrected,
    )
    groups = in_groups(samples, _CHUNK)
    rows: list[Row] = []
    tally = Tally(value_count(len(classes)))

    def counted(done: int, _: int) -> None:
        progress(min(done * _CHUNK, len(samples)), len(samples))

    with closing(in_order(work, groups, workers=workers, progress=counted)) as measured:
        for some, sums in measured:
            rows.extend(some)
            tally.add(sums)
    return rows, tally


def choose(rows: Sequence[Row], large: int, thumbnails: int) -> dict[int, bool]:
    """Return the images that have pictures, and whether large ones.

    Most are the first of the queue. A quarter is spread evenly over the queue of each class, so
    that every class is seen as it usually is, and where there is ground truth another quarter has
    the lowest mIoU.

    Args:
        rows: The images.
        large: Most with large pictures.
        thumbnails: Most with at least a thumbnail.
    """
    queue = sorted(range(len(rows)), key=lambda index: -rows[index].urgency)
    queue = [index for index in queue if not rows[index].failure]
    first = dict.fromkeys(_choose(rows, queue, large))
    rest = [index for index in queue if index not in first]
    more = _choose(rows, rest, max(0, thumbnails - len(first)))
    return dict.fromkeys(first, True) | dict.fromkeys(more, False)


def _choose(rows: Sequence[Row], queue: Sequence[int], most: int) -> list[int]:
    if len(queue) <= most:
        return list(queue)
    spread = most // _SPREAD
    wrong = [index for index in queue if rows[index].miou is not None]
    wrong.sort(key=lambda index: rows[index].miou or 0.0)
    wrong = wrong[:spread]
    taken = list(dict.fromkeys([*queue[: most - spread - len(wrong)], *wrong]))
    others: dict[int, list[int]] = defaultdict(list)
    for index in sorted(set(queue).difference(taken), key=lambda index: -rows[index].urgency):
        others[rows[index].labels[0] if rows[index].labels else -1].append(index)
    each = -(-spread // len(others))
    samples = [
        [members[index] for index in evenly_spaced(len(members), each)]
        for members in others.values()
    ]
    # Round after round, so that a class does not go without because others came first.
    rounds = [some[number] for number in range(each) for some in samples if number < len(some)]
    # What overlaps, or small classes, leave room for the next of the queue.
    return list(dict.fromkeys([*taken, *rounds[:spread], *queue]))[:most]


def _draw_one(
    job: tuple[int, Sample, bool], masks: Chosen, classes: Sequence[str], exponent: float
) -> Pictures:
    index, sample, large = job
    return draw(index, sample, masks, classes, exponent, large=large)


def _segmenter(
    run: Run, root: Path | None, data: Dataset, say: Callable[[str], None]
) -> dict[str, Scores]:
    """Return the scores of a trained segmenter, if it labelled or predicted images."""
    scores: dict[str, Scores] = {}
    try:
        # A small part of a report: its progress is not shown.
        scores |= score_relabelled(run, None, data, lambda *_: None, say)
        scores |= score_segmenter(run, root, None, data, lambda *_: None, say)
    except ClipesError as error:
        say(f"no scores of the segmenter: {error}")
    return scores


def _head(
    run: Run,
    data: Dataset,
    rows: Sequence[Row],
    chosen: Mapping[int, bool],
    say: Callable[[str], None],
) -> Head:
    record = run.cam_record()
    settings, packages = record.settings, record.packages
    note = settings.text.note if settings.text else ""
    facts = {
        "data set": data.name,
        "images": _number(len(rows), len(data.samples)),
        "weights": settings.weights.name if settings.weights else "",
        "class vectors": _text_source(record, note),
        "preset": settings.preset.name if settings.preset else "",
        "segmenter": _trained(run),
        "device": record.facts.device,
        "maps written": _when(run.root / "cams"),
        "masks written": _when(run.root / "pseudo"),
        "versions": ", ".join(
            f"{name} {packages[name]}"
            for name in ("clipes", "torch", "open_clip_torch")
            if packages.get(name, "")[:1].isdecimal()
        ),
    }
    commands = run.commands()
    return Head(
        f"clipes: {run.root.resolve().name}",
        data.classes,
        {label: value for label, value in facts.items() if value},
        commands,
        f"{note[0].upper()}{note[1:]}." if note else "",
        _shown(run, rows, chosen),
        _curve(run, say),
    )


def _curve(run: Run, say: Callable[[str], None]) -> list[TrainingPoint]:
    """Return how the segmenter was trained, if it was and that can be read."""
    try:
        return read_curve(run.root)
    except ArtifactError as error:
        say(f"no curve of the training: {error}")
        return []


def _text_source(record: CamRecord, note: str) -> str:
    if record.facts.fitted:
        return "fitted to the run's own labels"
    if "stand-in" in note:
        return "stand-in"
    asked = record.facts.asked or {}  # absent where a ranking chose the template
    given = asked.get("text_features") or "--text-features" in record.command
    return "from a file" if given else "text tower"


def _trained(run: Run) -> str:
    """Return which segmenter was trained here, and what is worth knowing of it; empty for none."""
    if (record := run.train_record()) is None:
        return ""
    name = str(record.settings.preset.get("name", ""))
    return "; ".join(part for part in (name, record.facts.note) if part)


def _number(here: int, expected: int) -> str:
    return f"{here:,}" if here == expected else f"{here:,} of {expected:,} have maps"


def _when(folder: Path) -> str:
    """Return when the files of a folder were written, the first and the last."""
    times = [path.stat().st_mtime for path in list_files(folder)]
    if not times:
        return ""
    first, last = (datetime.fromtimestamp(at, timezone.utc) for at in (min(times), max(times)))
    end = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
    return f"{first:%Y-%m-%d %H:%M} to {end} UTC"


def _shown(run: Run, rows: Sequence[Row], chosen: Mapping[int, bool]) -> str:
    """Say what the page shows of how many images, and how to see more."""
    words = "Sorted by how much a mask needs a person, as told without ground truth."
    masks = sum(row.signs is not None and row.signs.unsure is not None for row in rows)
    if masks < len(rows):
        words += (
            f" {len(rows) - masks:,} of {len(rows):,} images have no mask of the CRF yet: "
            "they are judged by their maps."
        )
    usable = sum(not row.failure for row in rows)
    big = sum(chosen.values())
    if big < usable:
        lowest = "the lowest mIoU, " if any(row.miou is not None for row in rows) else ""
        words += (
            f" To keep the page small, large pictures are in it for {big:,} images and thumbnails "
            f"for {len(chosen):,}: the first of the queue, {lowest}and some of every class. For "
            f"more: clipes report {run.root} --pictures N --thumbnails N"
        )
    return words
