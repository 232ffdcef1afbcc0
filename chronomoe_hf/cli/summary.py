"""``chronomoe summary``: many runs, a line each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chronomoe_hf.cli.output import LEVEL_EXITS, JsonOption, console, print_json

if TYPE_CHECKING:
    from chronomoe_hf.report.summary import Line


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(summary)


def summary(
    directories: Annotated[list[Path], typer.Argument(help="Run directories, or directories that hold them.")],
    as_csv: Annotated[bool, typer.Option("--csv", help="Comma-separated values.")] = False,
    prometheus: Annotated[
        Path | None,
        typer.Option("--prometheus", help="Write gauges to this *.prom file (textfile collector)."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 4 (watch) or 5 (act) of the worst run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """A line a run: verdict, experts in use and their change, dead experts, alerts, loss, steps, age."""
    from chronomoe_hf.report import summary as runs

    if sum((as_csv, as_json)) > 1:
        raise typer.BadParameter("--csv and --json are two forms of one output; give one of them")
    lines = [runs.summarise(path) for path in runs.find_runs(directories)]
    if prometheus is not None:
        partial = prometheus.with_name(f".{prometheus.name}.{os.getpid()}.partial")
        partial.write_text(runs.as_prometheus(lines), encoding="utf-8")
        os.replace(partial, prometheus)
    if as_json:
        print_json({"schema": 1, "runs": [line.values for line in lines]})
    elif as_csv:
        print(runs.as_csv(lines), end="")
    else:
        _table(lines)
    if check:
        worst = max((LEVEL_EXITS.get(line.level or "", 1) for line in lines), default=0)
        if worst:
            raise typer.Exit(worst)


def _table(lines: list[Line]) -> None:
    screen = console()
    names = [Path(str(line.values["path"])).name for line in lines]
    width = max(3, min(24, max(map(len, names))))
    head = f"{'run':<{width}}  {'level':<7} {'step':>7} {'Neff/E':>6} {'change':>7} {'dead':>4} {'alerts':>6}"
    screen.print(f"{head} {'loss':>7} {'age':>5}"[: max(screen.width, 40)], soft_wrap=True)
    for name, line in zip(names, lines, strict=True):
        v = line.values
        if v["error"] is not None:
            screen.print(f"{name[:width]:<{width}}  cannot be read: {v['error']}"[: screen.width], soft_wrap=True)
            continue
        loss = v["eval_loss"] if v["eval_loss"] is not None else v["loss"]
        text = (
            f"{name[:width]:<{width}}  {v['level']:<7} {_of(v['step'], 'd'):>7} {_of(v['neff_mean'], '.2f'):>6} "
            f"{_of(v['neff_mean_change'], '+.3f'):>7} {_of(v['dead_experts'], 'd'):>4} {_of(v['alerts'], 'd'):>6} "
            f"{_of(loss, '.3f'):>7} {age(v['age_s']):>5}"
        )
        screen.print(text[: max(screen.width, 40)], soft_wrap=True)
    screen.print("Neff/E: experts in effective use (1 is even); change: since the baseline; loss: eval or training")


def _of(value: float | int | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def age(seconds: float | None) -> str:
    """``12s``, ``5m``, ``3h``, ``2d``."""
    if seconds is None:
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"
