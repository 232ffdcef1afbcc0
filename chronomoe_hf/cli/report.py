"""``chronomoe report``: a run, or several, as one HTML page and as a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronomoe_hf.cli.output import LEVEL_EXITS, JsonOption, print_json

if TYPE_CHECKING:
    from chronomoe_hf.report.data import RunData


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)


def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(help="A run's output_dir; of several, all are on one page.", metavar="RUN [RUN ...]")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; else report.html in the first run.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="A profile or run from before: what changed since then.")
    ] = None,
    compare: Annotated[
        list[Path] | None, typer.Option("--compare", help="Another run beside it; the same as a further RUN.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Name of the (first) run, or its beginning; else the newest.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 0 healthy, 4 watch, 5 act.")] = False,
    as_json: JsonOption = False,
) -> None:
    """One HTML page about a run: a verdict in words, what to do next, and the plots. Opens offline."""
    from chronomoe_hf.report.data import load_run
    from chronomoe_hf.report.page import render, write_page

    first, *others = [*run_dirs, *(compare or [])]
    runs = [load_run(first, run), *map(load_run, others)]
    before = None if against is None else load_run(against)
    target = runs[0].directory / "report.html" if output is None else output
    path = write_page(render(runs[0], *runs[1:], before=before), target)
    record = _record(runs, str(path))
    if as_json:
        print_json(record)
    else:
        print(path)
    verdicts = record.get("runs", [record])
    worst = max(LEVEL_EXITS[verdict["level"]] for verdict in verdicts)
    if check and worst:
        raise typer.Exit(worst)


def _record(runs: list[RunData], path: str) -> dict[str, Any]:
    from chronomoe_hf.report.compare import compare as compare_runs
    from chronomoe_hf.report.compare import verdicts_record
    from chronomoe_hf.report.verdict import judge

    if len(runs) == 1:
        return judge(runs[0]).to_record(path)
    return verdicts_record(runs, compare_runs(runs), path)
