"""The part of ``cam`` that needs CLIP: tags, what the classes look like, and maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

from clipes.datasets import Dataset
from clipes.device import batch_size, choose_device, keep_freed_memory, share_processor
from clipes.listener import Listener, ignore
from clipes.maps.maker import CamMaker
from clipes.processes import local_rank
from clipes.run.corrected import Chosen
from clipes.run.folder import Run
from clipes.run.freshness import Freshness
from clipes.run.loop import Outcome, Summary
from clipes.run.record import CamFacts, CamSettings, TextUsed, WeightsUsed
from clipes.stages.cam import (
    STAGE,
    CamRequest,
    Resources,
    asked_of_clip,
    files_of,
    known_settings,
    say_orphans,
    say_stale,
)
from clipes.stages.drawn_masks import DrawnMasks
from clipes.stages.images import ImageSource
from clipes.stages.learn_looks import learn_looks
from clipes.stages.looks_sources import count_drawn
from clipes.stages.make_cams import make_cams
from clipes.stages.own_words import own_words
from clipes.stages.setup import Clip, load_clip, that_tags
from clipes.stages.tag import TagRequest, tag
from clipes.stages.tiles import TILE
from clipes.standin.fit import Fitted
from clipes.towers.clip import Backbone
from clipes.types import Failure
from clipes.weights import Weights
from clipes.words.encode import fingerprint
from clipes.words.vocabulary import Vocabulary


def make_maps(
    request: CamRequest,
    vocabulary: Vocabulary,
    data: Dataset,
    run: Run,
    resources: Resources,
    listener: Listener,
) -> Outcome:
    """Make maps; arguments and errors as for ``clipes.stages.cam.cam``.

    Args:
        request: What is asked for.
        vocabulary: The words.
        data: The images, without labels where they are to be tags.
        run: The run folder.
        resources: What the work is shared among.
        listener: Who is told how it goes.
    """
    device = choose_device(request.clip.device, local_rank())
    workers, batch = share_processor(device, resources.workers), batch_size(device, resources.batch)
    clip = load_for(request, vocabulary, data, run, workers, listener)
    unusable: Sequence[Failure] = data.failures
    if request.data.automatic:
        data, unusable = _tagged(
            request, data, that_tags(clip, vocabulary), run, resources, listener
        )
    how = replace(resources, workers=workers, batch=batch)
    summary = maps_with(clip, request, vocabulary, data, run, how, listener)
    return Outcome(summary, unusable)


def maps_with(
    clip: Clip,
    request: CamRequest,
    vocabulary: Vocabulary,
    data: Dataset,
    run: Run,
    resources: Resources,
    listener: Listener,
) -> Summary:
    """Make maps with a CLIP that is loaded; other arguments as for ``make_maps``.

    Args:
        clip: The image tower and the class vectors, which are what ``request`` asks for.
        request: What is asked for.
        vocabulary: The words.
        data: The images with their labels.
        run: The run folder.
        resources: What the work is shared among; workers and batch are numbers.
        listener: Who is told how it goes.
    """
    workers, batch = resources.workers or 1, resources.batch or 1
    maker = CamMaker(clip.towers, clip.text, request.preset.cam)  # or refuses, nothing recorded
    _begin(request, vocabulary, data, clip, run)
    keep_freed_memory()
    samples = resources.part.of(data.samples)
    patches, learnt_from = request.preset.cam.patches, frozenset[str]()
    learns = patches is not None and patches.learns
    kept = run.root if learns else None
    with ImageSource(kept, pixels=run.root, tile=request.tile) as images:
        if patches is not None and learns:
            before = Freshness.of(run, data.classes)
            drawn = DrawnMasks(Chosen(run, before, request.use_corrected), len(data.classes))
            maker, learnt_from = learn_looks(
                data.samples,
                maker,
                run,
                patches,
                images,
                listener,
                drawn=drawn,
                keep=request.keep_looks,
                batch=batch,
                workers=workers,
            )
            _note_drawn(run, listener)
        current = Freshness.of(run, data.classes)
        todo = say_stale(samples, current, listener)
        with run.claim(STAGE, shared=resources.part.count > 1):
            summary = make_cams(
                todo,
                maker,
                run,
                current,
                images,
                listener,
                learnt_from=learnt_from,
                batch=batch,
                workers=workers,
            )
    say_orphans(run, data, listener)
    return replace(summary, skipped=len(samples) - len(todo))


def _note_drawn(run: Run, listener: Listener) -> None:
    """Say, and record, how many corrected masks say what the classes look like."""
    if count := count_drawn(run):
        listener.say(
            f"{count} corrected masks say what the classes look like, in place of the maps of "
            "their images (--no-use-corrected does without)"
        )
    run.note_fact(STAGE, "corrected", count)


def load_for(
    request: CamRequest,
    vocabulary: Vocabulary,
    data: Dataset,
    run: Run,
    workers: int,
    listener: Listener,
) -> Clip:
    """Load CLIP for a run; classes that no vector knows get one from the run's own labels.

    Other arguments and errors are those of ``make_maps``.

    Args:
        request: What is asked for.
        vocabulary: The words.
        data: The images.
        run: The run folder.
        workers: Images at once.
        listener: Who is told how it goes.
    """
    params, patches = request.preset.cam, request.preset.cam.patches
    others = () if patches is None else patches.towers
    fit = None
    # What is to be tagged has no labels to learn from.
    if request.clip.fit and not request.data.automatic:
        fit = partial(_fitted, request, data, run, workers, listener)
    positions = params.fp16_positions
    return load_clip(
        request.clip,
        vocabulary,
        listener,
        fp16_positions=positions,
        others=others,
        fit=fit,
        wide=params.wide,
    )


def _fitted(
    request: CamRequest,
    data: Dataset,
    run: Run,
    workers: int,
    listener: Listener,
    backbone: Backbone,
    weights: Weights,
) -> Fitted:
    """Fit vectors, unless the run is one of other settings, which is told before it is changed."""
    if run.exists() and STAGE in run.manifest()["stages"]:
        told = run.cam_record().settings
        wanted = replace(
            known_settings(request, data),
            weights=WeightsUsed(weights.name, weights.sha256),
            text=told.text,
            towers=told.towers,
        )
        run.check_settings(STAGE, wanted.to_dict())
    most, keep = request.preset.cam.max_patches, request.keep_looks
    return own_words(data, run, backbone, weights, most, listener, keep=keep, workers=workers)


def _tagged(
    request: CamRequest,
    data: Dataset,
    clip: Clip,
    run: Run,
    resources: Resources,
    listener: Listener,
) -> tuple[Dataset, Sequence[Failure]]:
    """Return the images with tags for labels, and those that cannot be used."""
    only_look = resources.part.count > 1
    how = TagRequest(
        request.data.tags, request.clip, request.data.split, request.command, only_look
    )
    # Failures are told at the end, with what the data set lacks.
    data, tagged = tag(how, data, clip, run, replace(listener, report=ignore))
    return data, (*data.failures, *tagged.failures)


def _begin(
    request: CamRequest, vocabulary: Vocabulary, data: Dataset, clip: Clip, run: Run
) -> None:
    """Record what the run is made with, or refuse what it was not made with."""
    text, weights = clip.text, clip.weights
    settings = replace(
        known_settings(request, data),
        weights=WeightsUsed(weights.name, weights.sha256),
        text=TextUsed(
            fingerprint(text),
            text.note,
            text.fusion.value,
            text.templates,
            text.descriptions,
        ),
        towers={name: tower.digest for name, tower in clip.towers.others.items()},
    )
    facts = CamFacts(
        root=str(data.root.absolute()),
        device=str(clip.backbone.device),
        kernels=asdict(clip.backbone.kernels),
        asked=asked_of_clip(request, vocabulary, files_of(request, weights.path)),
        fitted=clip.fitted,
        tile=0 if request.preset.cam.patches is None else request.tile or TILE,
    )
    anew = bool(clip.fitted) and _refitted(settings, run)
    run.begin(STAGE, settings.to_dict(), request.command, facts.to_dict(), anew=anew)


def _refitted(settings: CamSettings, run: Run) -> bool:
    """Tell whether nothing differs but vectors that were fitted to a run: its labels changed.

    Raises:
        RunConflictError: Something else differs.
    """
    if not run.exists() or STAGE not in run.manifest()["stages"]:
        return False
    record = run.cam_record()
    if not record.facts.fitted:
        return False
    run.check_settings(STAGE, replace(settings, text=record.settings.text).to_dict())
    return True
