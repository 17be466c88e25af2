"""``clipes export`` and ``clipes import``: masks for other tools, and corrected ones back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipes.choices import ExportFormat, ImportFormat
from clipes.cli.options import (
    RootOption,
    RunArgument,
    UseCorrectedOption,
    command_line,
    conclude,
    listener,
    open_run,
)


def export(
    format_: Annotated[ExportFormat, typer.Option("--format", "-f", help="What to write.")],
    run: RunArgument = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the output. (default: RUN/export/FORMAT)")
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="mu: pixels less sure than this are not labelled."),
    ] = None,
    components: Annotated[
        bool,
        typer.Option("--components", help="An annotation for each connected part, not each class."),
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="labelme: pixels by which polygons may differ from the mask."),
    ] = 0.0,
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Copy images, where others would be linked."),
    ] = False,
    grey: Annotated[
        bool,
        typer.Option("--grey", help="voc, mmseg: grey masks; cv2 reads palettes as colours."),
    ] = False,
    polygons: Annotated[
        bool,
        typer.Option("--polygons", help="coco: polygons, holes bridged, instead of run lengths."),
    ] = False,
    upright: Annotated[
        bool,
        typer.Option("--upright", help="coco, labelme, cvat: add the images, turned upright."),
    ] = False,
    first: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many images: the first of the review queue."),
    ] = None,
    use_corrected: UseCorrectedOption = True,
    root: RootOption = None,
) -> None:
    """Write pseudo-masks for another tool; docs/formats.md says what is in the files.

    Example: clipes export runs/voc --format coco --confidence 0.95
    """
    from clipes.formats import Options
    from clipes.stages.export import ExportRequest
    from clipes.stages.export import export as export_stage

    options = Options(confidence, components, tolerance, copy, grey, polygons, upright)
    request = ExportRequest(format_.value, root, out, options, command_line(), use_corrected, first)
    target, summary = export_stage(request, open_run(run), listener())
    conclude(format_.value, target, summary, "images written")


def import_(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    path: Annotated[Path, typer.Argument(help="File or folder that the tool saved.")],
    format_: Annotated[ImportFormat, typer.Option("--format", "-f", help="What it is.")],
    by: Annotated[
        str | None, typer.Option(help="Who corrected the masks. (default: your login name)")
    ] = None,
    root: RootOption = None,
) -> None:
    """Read corrected masks back: RUN/corrected wins over the run's own masks from then on.

    train-seg, export and report use them, eval scores the masks with and without them.

    Example: clipes import runs/folder my-photos.json --format coco
    """
    from clipes.stages.import_masks import AS_IT_WAS, ImportRequest, import_masks, login_name

    request = ImportRequest(format_.value, path, by or login_name(), root, command_line())
    folder, summary = import_masks(request, open_run(run), listener())
    same = summary.remarks.get(AS_IT_WAS, 0)
    told = f"corrected masks ({summary.done - same} changed, {same} as they were)"
    conclude("import", folder, summary, told)
