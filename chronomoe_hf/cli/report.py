"""``chronomoe report``: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chronomoe_hf.cli.output import JsonOption, RunDirectory, print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)


def report(
    run_dir: RunDirectory,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; else report.html in the run.")
    ] = None,
    compare: Annotated[Path | None, typer.Option("--compare", help="Another run's directory, beside this one.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Name of a run, or its beginning; else the newest.")] = None,
    as_json: JsonOption = False,
) -> None:
    """One HTML page about a run: a verdict in words, what to do next, and the plots. Opens offline."""
    from chronomoe_hf.report import write_report

    path = write_report(run_dir, output, run=run, other=compare)
    if as_json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        print(path)
