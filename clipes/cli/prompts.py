"""The commands of ``clipes prompts``: see, choose and check what CLIP reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipes.choices import Descriptions, Fusion
from clipes.cli.options import (
    RUNS,
    DatasetOption,
    DescriptionsOption,
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
    listener,
)
from clipes.errors import UsageError

prompts_app = typer.Typer(help="The text side: words and vectors.", no_args_is_help=True)

VocabularyArgument = Annotated[
    str, typer.Argument(help="A shipped vocabulary (voc, coco) or a TOML file.")
]


@prompts_app.command("show")
def prompts_show(
    prompts: VocabularyArgument = "voc",
    fusion: FusionOption = Fusion.sentence,
    template: TemplateOption = None,
    descriptions: DescriptionsOption = None,
) -> None:
    """Print what CLIP reads for every class and background word, tab-separated.

    Example: clipes prompts show coco --fusion feature --template "a photo of a {}."
    """
    from clipes.cli.console import say
    from clipes.words.templates import templates_of
    from clipes.words.vocabulary import check_levels, load_vocabulary

    check_levels(fusion, descriptions)
    vocabulary = load_vocabulary(prompts)
    described, count = len(vocabulary.descriptions), len(vocabulary.classes)
    more = len(vocabulary.more_background)
    vocabulary = vocabulary.as_asked(descriptions).widened()
    templates = templates_of(template, vocabulary)
    names = [*vocabulary.classes, *(f"({word})" for word in vocabulary.background)]
    for name, texts in zip(names, vocabulary.texts(templates, fusion), strict=True):
        typer.echo("\t".join([name, *texts]))
    say(_FUSED[fusion.value])
    if more:
        say(f"the last {more} background words are for all presets but reference")
    if described:
        say(f"descriptions of {described} of {count} classes{_DESCRIBED[descriptions]}")
    if len(templates) > 1:
        say(f"the vectors of {len(templates)} templates are averaged")


_Templates = Annotated[
    Path | None, typer.Option(help="Templates, one on each line. (default: the shipped 82)")
]
_Files = Annotated[
    list[Path] | None,
    typer.Option(help="Compare .npz files of text features instead; give one or more."),
]


@prompts_app.command("rank")
def prompts_rank(
    dataset: DatasetOption,
    root: RootOption = None,
    split: SplitOption = None,
    labels: LabelsOption = None,
    difficult: DifficultOption = True,
    prompts: PromptsOption = None,
    templates: _Templates = None,
    text_features: _Files = None,
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
    from clipes.cli.console import say
    from clipes.stages.open_data import open_labelled
    from clipes.stages.rank import RankRequest, rank
    from clipes.stages.setup import open_weights
    from clipes.words.vocabulary import load_templates

    if templates is not None and text_features:
        raise UsageError("--templates and --text-features exclude each other", "give one of them")
    candidates = () if text_features else load_templates(templates)
    request = RankRequest(candidates, tuple(text_features or ()), limit)
    vocabulary, data = open_labelled(
        dataset.value,
        root=root,
        split=split,
        labels=labels,
        prompts=prompts,
        difficult=difficult,
    )
    heard = listener()
    opened = open_weights(weights, model, device, heard)
    ranking, failures = rank(request, data, vocabulary, opened, heard)
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
    descriptions: DescriptionsOption = None,
) -> None:
    """Look for words and vectors that get in each other's way; nothing is changed.

    Prints a table: class or (background word), tokens, nearest other word and cosine. Exits with 1
    only where 'clipes cam' would stop.

    Example: clipes prompts check my.toml --weights openai
    """
    from clipes.cli.console import say
    from clipes.stages.check_words import WordsRequest, check_words

    request = WordsRequest(prompts, weights, model, text_features, fusion, template, descriptions)
    checked = check_words(request, listener())
    for entry in checked.entries:
        name = f"({entry.name})" if entry.background else entry.name
        nearest = [entry.nearest, f"{entry.cosine:.3f}"] if entry.nearest else []
        typer.echo("\t".join([name, str(entry.tokens), *nearest]))
    for remark in checked.remarks:
        say(f"{'error' if remark.fatal else 'warning'}: {remark.text}")
    fatal = checked.fatal
    say(f"{len(checked.remarks) - fatal} warnings, {fatal} errors; nothing was changed")
    if fatal:
        raise typer.Exit(1)
    if not checked.compared and weights is None:
        say("vectors were not compared: that takes --weights or --text-features")


_FUSED = {
    "sentence": "fusion sentence: the synonyms of a class are one prompt",
    "feature": "fusion feature: the vectors of a class's prompts are averaged",
    "cam": "fusion cam: a class has one map per prompt, and their mean is taken",
    "cam-max": "fusion cam-max: a class has one map per prompt, and their maximum is taken",
}


_DESCRIBED = {
    None: ", not used: --descriptions asks for them",
    Descriptions.average: ": the vectors of a name and of its descriptions are averaged",
    Descriptions.max: ": of the scores of a name and of its descriptions the largest counts",
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
    from clipes.stages.fit import FitRequest, fit_vectors
    from clipes.words.vocabulary import load_vocabulary

    classes = load_vocabulary(prompts or "voc").classes
    fitted = fit_vectors(FitRequest(data, classes, out, weights, model, device), listener())
    for name, images in fitted.images.items():
        typer.echo(f"{name}\t{images} images")
    typer.echo(out)
