"""``clipes doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from clipes.choices import DatasetKind
from clipes.cli.options import RUNS, RootOption


def doctor(
    dataset: Annotated[
        DatasetKind | None,
        typer.Option("--dataset", "-d", help="Data set to run on. (default: the first there is)"),
    ] = None,
    root: RootOption = None,
    out: Annotated[Path, typer.Option(help="Folder below which runs go.")] = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Say what is ready here and what is missing; exit 1 if anything from cam to eval would fail.

    Nothing is fetched or written.

    Example: clipes doctor --dataset voc --root data/VOC2012
    """
    from clipes.cli.console import print_diagnosis
    from clipes.datasets.base import find_base
    from clipes.stages.doctor import diagnose

    if root is not None:
        find_base(root)
    diagnosis = diagnose(dataset.value if dataset else None, root, out)
    if as_json:
        typer.echo(json.dumps(diagnosis.to_json(), indent=2, ensure_ascii=False))
    else:
        print_diagnosis(diagnosis)
    if not diagnosis.ok:
        raise typer.Exit(1)
