"""``clipes weights``: fetch, list, path."""

from __future__ import annotations

from typing import Annotated

import typer

_SourceArgument = Annotated[
    str, typer.Argument(help="auto, openai, registry or a tag; dinov2 for the second tower.")
]
_ModelOption = Annotated[str, typer.Option(help="open_clip name of a ViT, or dinov2.")]

weights_app = typer.Typer(help="Towers' weights: fetch, list, path.", no_args_is_help=True)


@weights_app.command("fetch")
def weights_fetch(source: _SourceArgument = "auto", model: _ModelOption = "ViT-B-16") -> None:
    """Get weights into the cache and print their path.

    Example: clipes weights fetch dinov2
    """
    from clipes.cli.console import progress_bar, say
    from clipes.weights import resolve

    source, model = _split(source, model)
    with progress_bar("weights", show_count=False) as progress:
        typer.echo(resolve(source, model, say=say, progress=progress).path)


@weights_app.command("path")
def weights_path(source: _SourceArgument = "auto", model: _ModelOption = "ViT-B-16") -> None:
    """Print the path of cached weights; nothing is fetched.

    Example: clipes weights path
    """
    from clipes.errors import WeightsError
    from clipes.weights import find

    source, model = _split(source, model)
    found = find(source, model)
    if found is None:
        raise WeightsError(
            f"weights '{source}' of {model} are not in the cache",
            f"run 'clipes weights fetch {source} --model {model}'",
        )
    typer.echo(found.path)


@weights_app.command("list")
def weights_list() -> None:
    """List the weights in the cache: name, size, path.

    Example: clipes weights list
    """
    from clipes.cli.console import say
    from clipes.weights import cache_dir, cached

    entries = cached()
    for entry in entries:
        size = entry.path.stat().st_size / 1e6
        typer.echo(f"{entry.model}\t{entry.name}\t{size:.0f} MB\t{entry.path}")
    if not entries:
        say(f"no weights in {cache_dir()}; 'clipes weights fetch' gets some")


def _split(source: str, model: str) -> tuple[str, str]:
    """Return what to get of which model: the name of the second tower alone means its best.

    Raises:
        UsageError: Both are named, and differ.
    """
    from clipes.errors import UsageError
    from clipes.weights import DEFAULT_MODEL, DINOV2

    if source != DINOV2:
        return source, model
    if model not in (DEFAULT_MODEL, DINOV2):
        raise UsageError(f"--model {model} means nothing to {DINOV2}", "drop it")
    return "auto", DINOV2
