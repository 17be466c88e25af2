"""``clipes bench``."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def bench(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, by comma. (default: 1 and all cores)")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 5,
) -> None:
    """Time the CAM stage and the CRF against the literal method and pydensecrf2.

    Example: clipes bench --json
    """
    from joblib import cpu_count

    from clipes.cli.console import print_bench, progress_bar, say
    from clipes.errors import UsageError
    from clipes.stages.bench import run_bench

    counts = threads.split(",") if threads else sorted({"1", str(cpu_count())}, key=int)
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise UsageError(f"'{threads}' is not a list of thread counts", "write 1,2")
    result = run_bench(list(map(int, counts)), rounds, say=say, progress=progress_bar)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        print_bench(result)
