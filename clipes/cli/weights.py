"""``clipes weights``: fetch, list, locate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from clipes.cli.options import (
    ModelOption,
)

weights_app = typer.Typer(help="CLIP weights: fetch, list, locate.", no_args_is_help=True)


@weights_app.command("fetch")
def weights_fetch(
    source: Annotated[str, typer.Argument(help="auto, openai, registry or a tag.")] = "auto",
    model: ModelOption = "ViT-B-16",
) -> None:
    """Get weights into the cache and print their path.

    Example: clipes weights fetch registry
    """
    typer.echo(_resolved(source, model).path)


@weights_app.command("path")
def weights_path(
    source: Annotated[str, typer.Argument(help="auto, openai, registry or a tag.")] = "auto",
    model: ModelOption = "ViT-B-16",
) -> None:
    """Print the path of cached weights; nothing is fetched.

    Example: clipes weights path
    """
    from clipes.errors import WeightsError
    from clipes.weights import find

    found = find(source, model)
    if found is None:
        raise WeightsError(
            f"weights '{source}' of {model} are not in the cache",
            f"run 'clipes weights fetch {source}'",
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


def _resolved(source: str, model: str) -> Any:  # noqa: ANN401  (its type costs an import)
    from clipes.cli.console import progress_bar, say
    from clipes.weights import resolve

    with progress_bar("weights", show_count=False) as progress:
        return resolve(source, model, say=say, progress=progress)
