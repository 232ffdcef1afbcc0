"""``chronomoe tail``: the last windows of a run, layer by layer, as text; with ``--follow`` until the run ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronomoe_hf.cli.output import FOUND, JsonOption, RunDirectory, bars, console, print_json, records_directory
from chronomoe_hf.cli.tail_view import View, fitting, lines, summary, to_json
from chronomoe_hf.errors import TelemetryError

if TYPE_CHECKING:
    from rich.console import Console

    from chronomoe_hf.telemetry.reader import Last
    from chronomoe_hf.telemetry.runs import Run
    from chronomoe_hf.telemetry.views import Window

SNAPSHOTS = "snapshots.jsonl"
FEW, MOST = 20, 100  # windows where no number is asked for: as JSON, and as a table that shows what fits


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(tail)


def tail(
    run_dir: RunDirectory,
    windows: Annotated[
        int | None, typer.Option("--windows", "-n", min=1, help="At most so many; else what fits.")
    ] = None,
    layer: Annotated[list[int] | None, typer.Option("--layer", min=0, help="Only this layer; may be repeated.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Name of a run, or its beginning; else the newest.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends, or Ctrl-C.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between looks with --follow.")] = 2.0,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 where an alert asks for action.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The last windows of a run: experts in use and how that changed, imbalance, dead experts, coherence."""

    screen = console()
    count = windows or (FEW if as_json else MOST)
    if not (as_json or (follow and not screen.is_terminal)):
        count = min(count, fitting(screen.width))  # a table shows no more, and no more are read

    def look() -> View:
        return read(run_dir, count, run, layer, follow)

    if follow and check:
        raise typer.BadParameter("--check looks once and leaves; --follow goes on. Give one of them.")
    if follow:
        _follow(run_dir, look, every, screen, as_json)
        return
    view = look()
    if not view.windows:
        raise TelemetryError(_empty(run_dir, view))
    if as_json:
        print_json(to_json(view))
    else:
        for line in lines(view, screen.width, bars(screen.encoding)):
            screen.print(line, soft_wrap=True)
    if check and any(alert.urgent for alert in view.windows[-1].active):
        raise typer.Exit(FOUND)


def _empty(run_dir: Path, view: View) -> str:
    path = records_directory(run_dir, SNAPSHOTS) / SNAPSHOTS
    if view.broken:
        return f"none of the {view.broken} lines of {path} can be read as a window; `chronomoe validate` names each"
    return f"{path} holds no window of such a run yet"


def read(run_dir: Path, count: int, run: str | None, only: list[int] | None, follow: bool = False) -> View:
    """The last `count` windows of a run, from the end of its file.

    Where no run is named and the newest has closed no window yet, these are the windows of the one before it; with
    `follow` there are none, since it is the newest that is waited for.

    Raises:
        TelemetryError: no record file, no such run, no such layer, or a profile.
    """
    from chronomoe_hf.telemetry.events import RECORD_SCHEMA
    from chronomoe_hf.telemetry.reader import read_last, schema_number
    from chronomoe_hf.telemetry.views import Window, plain_text

    directory = _directory(run_dir)
    if (directory / "profile.json").is_file():
        raise TelemetryError(f"{run_dir} is a profile, no run: its domains are no steps; chronomoe report {run_dir}")
    path = directory / SNAPSHOTS
    last = read_last(path, count, name=run)
    names = [plain_text(known.name, 80) for known in last.history.runs]
    begun = last.history.runs[-1:] if run is None else [last.history.find(run)]
    shown_run = last.run or next(iter(begun), None)  # one that has begun may have closed no window yet
    newest = _begun_since(last) if run is None else None
    if newest is not None and follow:
        shown_run, last, newest = newest, dataclasses.replace(last, records=[]), None
    if run is not None and shown_run is None:
        raise TelemetryError(f"no run {run!r} in {path}; it holds {', '.join(names) or 'none yet'}")
    shown = [Window.from_record(record) for record in last.records]
    windows = [window for window in shown if window is not None]
    if only is not None:
        windows = [_only(window, only) for window in windows]
    name = None if shown_run is None else plain_text(shown_run.name, 80)
    newer = sum(schema_number(record) > RECORD_SCHEMA for record in last.records)
    state, process = _state(directory, shown_run)
    return View(
        windows,
        name,
        [n for n in names if n != name],
        last.broken + len(shown) - len(windows),
        state=state,
        process=process,
        newer=newer,
        begun=None if newest is None else plain_text(newest.name, 80),
    )


def _begun_since(last: Last) -> Run | None:
    """The newest run of the directory, where it has begun after the one whose windows are the last in the file."""
    known = [run for run in last.history.runs if run.attempts]
    return known[-1] if known and last.run in known and last.run is not known[-1] else None


def _directory(run_dir: Path) -> Path:
    """Where the records of a run lie: the start of an attempt is written before any window."""
    from chronomoe_hf.telemetry.reader import ATTEMPTS

    try:
        return records_directory(run_dir, f"{ATTEMPTS}.jsonl")
    except TelemetryError:  # none yet, or written by a version without that file
        return records_directory(run_dir, SNAPSHOTS)


def _state(directory: Path, run: Any) -> tuple[str | None, Any]:
    """``"ended"`` or ``"broke off"`` where the newest attempt of the run says so; and its process."""
    from chronomoe_hf.telemetry.reader import ATTEMPTS, ENDS, read_lines

    if run is None or not run.attempts:
        return None, None

    def of_newest(kind: str) -> list[dict[str, Any]]:
        path = directory / f"{kind}.jsonl"
        records = [record for _, record in read_lines(path) if record is not None] if path.is_file() else []
        return [r for r in records if r.get("run_id") == run.run_id and r.get("attempt") == run.attempts[-1]]

    ends, starts = of_newest(ENDS), of_newest(ATTEMPTS)
    manifest = starts[-1].get("manifest") if starts else None
    process = manifest.get("process") if isinstance(manifest, dict) else None
    if not ends:
        return None, process
    return ("ended" if ends[-1].get("completed") is True else "broke off"), process


def _only(window: Window, layers: list[int]) -> Window:
    kept = [layer for layer in window.layers if layer.index in layers]
    if not kept:
        known = ", ".join(layer.layer_id for layer in window.layers) or "none"
        raise TelemetryError(
            f"no layer {', '.join(map(str, layers))} in the window of step {window.step}: it has {known}"
        )
    active = [alert for alert in window.active if alert.layer_id is None or alert.layer_id in map(str, layers)]
    return dataclasses.replace(window, layers=kept, active=active)


# ---- following -----------------------------------------------------------------------------------------------------


def _follow(run_dir: Path, look: Callable[[], View], every: float, screen: Console, as_json: bool) -> None:
    """Show every new window until the run ends or Ctrl-C: a table that is redrawn on a terminal, else lines."""
    if not run_dir.exists():
        raise TelemetryError(f"there is no directory {run_dir}; give the output_dir of the run, once it has begun")
    try:
        drawn = screen.is_terminal and not as_json
        ended = _redraw(look, every, screen) if drawn else _lines_only(look, every, as_json)
    except KeyboardInterrupt:
        return
    if ended != "ended":
        raise typer.Exit(FOUND)


def _try(look: Callable[[], View]) -> View | None:
    """The view, None while the run has written nothing yet. A wrong name or layer is told at once."""
    try:
        return look()
    except TelemetryError as error:
        if str(error).startswith(f"no {SNAPSHOTS}"):
            return None
        raise


def _redraw(look: Callable[[], View], every: float, screen: Console) -> str:
    from rich.live import Live
    from rich.text import Text

    # Not the alternate screen: what was shown last stays after Ctrl-C and when the run has ended.
    with Live(Text("waiting for the first window"), console=screen, auto_refresh=False) as live:
        while True:
            view = _try(look)
            if view is not None and view.windows:
                drawn = lines(view, screen.width, bars(screen.encoding), screen.height - 1)
                live.update(Text("\n".join(drawn), no_wrap=True), refresh=True)
            if view is not None and view.over:
                if not view.windows:
                    live.update(Text(f"the run {view.over}, before its first window"), refresh=True)
                return view.over
            time.sleep(every)


def _lines_only(look: Callable[[], View], every: float, as_json: bool) -> str:
    shown: tuple[str | None, int, int] | None = None
    while True:
        view = _try(look)
        for window in view.windows if view is not None else ():
            assert view is not None
            place = (view.run, window.attempt, window.step)
            if shown is None or shown[0] != view.run or place[1:] > shown[1:]:
                if as_json:
                    print_json(to_json(dataclasses.replace(view, windows=[window])), indent=None)
                else:
                    print(summary(window), flush=True)
                shown = place
        if view is not None and view.over:
            if not as_json:
                print(f"the run {view.over}", flush=True)
            return view.over
        time.sleep(every)
