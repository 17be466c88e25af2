"""The command line. Every command reads options, calls a stage, and says how it went.

torch and everything else that is slow to import is imported inside the commands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from clipes import __version__
from clipes.cli.bench import bench
from clipes.cli.data import check, tag
from clipes.cli.data import masks as draw_masks
from clipes.cli.doctor import doctor
from clipes.cli.export import export, import_
from clipes.cli.masks import cam, refine
from clipes.cli.prompts import prompts_app
from clipes.cli.run import demo, run
from clipes.cli.scores import evaluate, report
from clipes.cli.seg import predict, relabel, train_seg
from clipes.cli.signals import STOPPED, STOPPING, end_at_once, stopped_by_signals
from clipes.cli.streams import robust_streams
from clipes.cli.weights import weights_app
from clipes.errors import ClipesError, UsageError

app = typer.Typer(
    name="clipes",
    help="Pseudo-masks from image-level labels with a frozen CLIP.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(weights_app, name="weights")
app.add_typer(prompts_app, name="prompts")
app.command("run")(run)
app.command("cam")(cam)
app.command("refine")(refine)
app.command("eval")(evaluate)
app.command("report")(report)
app.command("demo")(demo)
app.command("check")(check)
app.command("tag")(tag)
app.command("masks")(draw_masks)
app.command("train-seg")(train_seg)
app.command("predict")(predict)
app.command("relabel")(relabel)
app.command("bench")(bench)
app.command("export")(export)
app.command("import")(import_)
app.command("doctor")(doctor)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"clipes {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exits with 0 all done, 1 something failed, 2 usage, 130 interrupted, 143 terminated.
    """
    with robust_streams():
        try:
            _run(arguments)
        finally:
            if arguments is None:  # the process ends with it
                end_at_once()


def _run(arguments: Sequence[str] | None) -> None:
    try:
        try:
            with stopped_by_signals():
                app(arguments, prog_name="clipes")
        finally:
            sys.stdout.flush()
    except ClipesError as error:
        _fail(error)
    except OSError as error:
        if error.filename is None:  # no file's fault
            raise
        _fail(
            ClipesError(
                f"cannot use {error.filename}: {error.strerror}",
                "check the path and its permissions",
            )
        )
    except SystemExit as stop:
        if isinstance(stop.code, int) and stop.code - STOPPED in STOPPING:
            typer.echo("clipes: stopped; the same command continues where it was", err=True)
            with suppress(OSError):
                sys.stdout.flush()
            # Threads may be at work still: to take the interpreter apart under them is to crash.
            os._exit(stop.code)
        raise


def _fail(error: ClipesError) -> NoReturn:
    typer.secho(f"clipes: {error}", fg=_colour(), err=True)
    sys.exit(2 if isinstance(error, UsageError) else 1)


def _colour() -> str | None:
    return "red" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else None
