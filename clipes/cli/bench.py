"""``clipes bench``."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated

import typer


class Kernel(str, Enum):
    """Compiled code that can be left out."""

    linear = "linear"
    attention = "attention"
    lattice = "lattice"


def bench(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, by comma. (default: 1 and all cores)")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 5,
    without: Annotated[
        Kernel | None,
        typer.Option(help="Only time preset default with and without this compiled code."),
    ] = None,
) -> None:
    """Time the CAM stage and the CRF against the literal method and pydensecrf2.

    Example: clipes bench --json
    """
    from joblib import cpu_count

    from clipes.cli.console import print_bench
    from clipes.cli.options import listener
    from clipes.errors import UsageError
    from clipes.stages.bench import run_bench, run_without

    if without is not None:
        if threads is not None:
            raise UsageError("--threads means nothing to --without, which times one", "drop it")
        worth = run_without(without.value, rounds, listener())
        text = (
            f"default takes {worth['ratio']:.2f} x as long without {worth['kernel']} "
            f"({worth['seconds_without']:.2f} s an image instead of {worth['seconds_with']:.2f} s)"
        )
        typer.echo(json.dumps(worth, indent=2) if as_json else text)
        return
    counts = threads.split(",") if threads else sorted({"1", str(cpu_count())}, key=int)
    if not all(count.isdecimal() and int(count) > 0 for count in counts):
        raise UsageError(f"'{threads}' is not a list of thread counts", "write 1,2")
    result = run_bench(list(map(int, counts)), rounds, listener())
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        print_bench(result)
