"""The commands of ``clipes prompts``: see, choose and check what CLIP reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipes.choices import Fusion
from clipes.cli.options import (
    RUNS,
    DatasetOption,
    DeviceOption,
    DifficultOption,
    FusionOption,
    LabelsOption,
    ModelOption,
    PromptsOption,
    RootOption,
    SplitOption,
    TemplateOption,
    WeightsOption,
    say_failure,
)
from clipes.errors import UsageError

if TYPE_CHECKING:
    from clipes.types import Failure
    from clipes.words.features import TextFeatures
    from clipes.words.vocabulary import Vocabulary

prompts_app = typer.Typer(help="The text side: words and vectors.", no_args_is_help=True)

VocabularyArgument = Annotated[
    str, typer.Argument(help="A shipped vocabulary (voc, coco) or a TOML file.")
]


@prompts_app.command("show")
def prompts_show(
    prompts: VocabularyArgument = "voc",
    fusion: FusionOption = Fusion.sentence,
    template: TemplateOption = None,
) -> None:
    """Print what CLIP reads for every class and background word: its prompts, tab-separated.

    Example: clipes prompts show coco --fusion feature --template "a photo of a {}."
    """
    from clipes.cli.console import say
    from clipes.words.vocabulary import fill, load_vocabulary

    vocabulary = load_vocabulary(prompts)
    templates = _templates(template, vocabulary)
    level = fusion
    names = [*vocabulary.classes, *(f"({word})" for word in vocabulary.background)]
    for name, phrases in zip(names, vocabulary.phrases(level), strict=True):
        sentences = [fill(template, phrase) for phrase in phrases for template in templates]
        typer.echo("\t".join([name, *sentences]))
    say(_FUSED[level.value])
    if len(templates) > 1:
        say(f"the vectors of {len(templates)} templates are averaged")


@prompts_app.command("rank")
def prompts_rank(
    dataset: DatasetOption,
    root: RootOption = None,
    split: SplitOption = None,
    labels: LabelsOption = None,
    difficult: DifficultOption = True,
    prompts: PromptsOption = None,
    templates: Annotated[
        Path | None, typer.Option(help="Templates, one on each line. (default: the shipped 82)")
    ] = None,
    text_features: Annotated[
        list[Path] | None,
        typer.Option(help="Compare .npz files of text features instead; give one or more."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score at most so many images, evenly spaced.")
    ] = None,
    weights: WeightsOption = "auto",
    model: ModelOption = "ViT-B-16",
    out: Annotated[
        Path | None, typer.Option(help="Run folder for the ranking. (default: runs/DATASET)")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Rank templates by sharpness on images with labels, best (lowest) first.

    Example: clipes prompts rank --dataset voc --limit 500
    """
    from clipes.cli.console import progress_bar, say
    from clipes.stages.open_data import open_labelled
    from clipes.stages.rank import rank, spread
    from clipes.stages.setup import open_weights
    from clipes.weights import cache_dir
    from clipes.words.vocabulary import load_templates

    if templates is not None and text_features:
        raise UsageError("--templates and --text-features exclude each other", "give one of them")
    candidates = () if text_features else load_templates(templates)
    vocabulary, data = open_labelled(
        dataset.value,
        root=root,
        split=split,
        labels=labels,
        prompts=prompts,
        difficult=difficult,
    )
    failures: list[Failure] = []

    def report(failure: Failure) -> None:
        failures.append(failure)
        say_failure(failure)

    for failure in data.failures:
        report(failure)
    ranking = rank(
        spread(data.samples, limit),
        vocabulary,
        open_weights(weights, model, device=device, say=say, progress=progress_bar),
        templates=candidates,
        files=text_features or (),
        dataset=data.name,
        root=data.root,
        cache=cache_dir(),
        progress=progress_bar,
        report=report,
        say=say,
    )
    for place, (name, score) in enumerate(ranking.ranking, start=1):
        typer.echo(f"{place}\t{score:.5f}\t{name}")
    path = ranking.save(out or RUNS / dataset.value)
    say(
        f"sharpness on {ranking.images} images, {ranking.several} of them with several classes; "
        f"saved to {path}"
    )
    if failures:
        raise typer.Exit(1)


@prompts_app.command("check")
def prompts_check(
    prompts: VocabularyArgument = "voc",
    weights: Annotated[
        str | None, typer.Option(help="Compare vectors of these weights: auto, openai, a file, ...")
    ] = None,
    model: ModelOption = "ViT-B-16",
    text_features: Annotated[
        Path | None, typer.Option(help="Compare the vectors of this .npz file.")
    ] = None,
    fusion: FusionOption = Fusion.sentence,
    template: TemplateOption = None,
) -> None:
    """Look for words and vectors that get in each other's way; nothing is changed.

    Prints a table: class or (background word), tokens, nearest other word and cosine. Exits with 1
    only where 'clipes cam' would stop.

    Example: clipes prompts check my.toml --weights openai
    """
    from dataclasses import replace

    from clipes.cli.console import say
    from clipes.towers.clip_text import CONTEXT_LENGTH, tokenize
    from clipes.words.check import collisions, entries, near, spelling
    from clipes.words.vocabulary import load_vocabulary

    if weights is not None and text_features is not None:
        raise UsageError("--weights and --text-features exclude each other", "give one of them")
    vocabulary = load_vocabulary(prompts)
    level = fusion
    templates = _templates(template, vocabulary)
    remarks = list(spelling(vocabulary, templates, level, tokenize, CONTEXT_LENGTH))
    features = None
    if not any(remark.fatal for remark in remarks):
        features = _vectors(vocabulary, weights, model, text_features, level, templates)
    if features is not None:
        # A run takes the background words that come with the vectors.
        words = tuple(dict.fromkeys(features.background_words))
        vocabulary = replace(vocabulary, background=words)
        remarks += near(features)
    remarks += collisions(vocabulary)
    for entry in entries(vocabulary, templates, level, tokenize, features):
        name = f"({entry.name})" if entry.background else entry.name
        cells = [name, str(entry.tokens)]
        if entry.nearest:
            cells += [entry.nearest, f"{entry.cosine:.3f}"]
        typer.echo("\t".join(cells))
    for remark in remarks:
        say(f"{'error' if remark.fatal else 'warning'}: {remark.text}")
    fatal = sum(remark.fatal for remark in remarks)
    say(f"{len(remarks) - fatal} warnings, {fatal} errors; nothing was changed")
    if features is None and not fatal:
        say("vectors were not compared: that takes --weights or --text-features")
    if fatal:
        raise typer.Exit(1)


_FUSED = {
    "sentence": "fusion sentence: the synonyms of a class are one prompt",
    "feature": "fusion feature: the vectors of a class's prompts are averaged",
    "cam": "fusion cam: a class has one map per prompt, and their mean is taken",
    "cam-max": "fusion cam-max: a class has one map per prompt, and their maximum is taken",
}


@prompts_app.command("fit")
def prompts_fit(
    data: Annotated[
        list[Path], typer.Option(help="VOC folder, or folder of labelled images; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="Write the vectors here, for --text-features.")],
    prompts: PromptsOption = None,
    weights: WeightsOption = "auto",
    model: ModelOption = "ViT-B-16",
    device: DeviceOption = "auto",
) -> None:
    """Fit class vectors to image-level labels, for weights without a text tower.

    The classes are those of --prompts, else VOC's; all other labels become background words.

    Example: clipes prompts fit --data VOC2012 --data my-photos --out vectors.npz
    """
    from clipes.cli.console import progress_bar, say
    from clipes.stages.fit import fit_vectors
    from clipes.words.vocabulary import load_vocabulary

    classes = load_vocabulary(prompts or "voc").classes
    fitted = fit_vectors(
        data,
        classes,
        out,
        source=weights,
        model=model,
        device=device,
        say=say,
        report=say_failure,
        progress=progress_bar,
    )
    for name, images in fitted.images.items():
        typer.echo(f"{name}\t{images} images")
    typer.echo(out)


def _templates(wanted: str | None, vocabulary: Vocabulary) -> tuple[str, ...]:
    from clipes.words.templates import BEST, choose_templates

    if wanted == BEST:
        raise UsageError("'best' is known to 'clipes cam' only", "give a sentence or a file")
    chosen = choose_templates(wanted, vocabulary, "", (), lambda _: None)
    return chosen or (vocabulary.template,)


def _vectors(
    vocabulary: Vocabulary,
    weights: str | None,
    model: str,
    file: Path | None,
    fusion: Fusion,
    templates: tuple[str, ...],
) -> TextFeatures | None:
    """Return the vectors that are asked for, without making an image tower."""
    from clipes.cli.console import progress_bar, say
    from clipes.stages.setup import open_weights
    from clipes.weights import cache_dir
    from clipes.words.encode import from_given, text_features
    from clipes.words.features import load_text_features

    if file is not None:
        return from_given(load_text_features(file), vocabulary, fusion)
    if weights is None:
        return None
    opened = open_weights(weights, model, device="cpu", say=say, progress=progress_bar)
    return text_features(
        vocabulary,
        opened.state,
        opened.weights,
        file=None,
        cache=cache_dir(),
        say=say,
        fusion=fusion,
        templates=templates if templates != (vocabulary.template,) else (),
    )
