"""``chronomoe tail``: the last windows of a run, layer by layer, as text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chronomoe_hf.cli.output import (
    FOUND,
    JsonOption,
    RunDirectory,
    bars,
    console,
    print_json,
    records_directory,
    sparkline,
)
from chronomoe_hf.errors import TelemetryError

if TYPE_CHECKING:
    from rich.console import Console

    from chronomoe_hf.telemetry.views import LayerView, Window

SNAPSHOTS = "snapshots.jsonl"
FEW, MOST = 20, 100  # windows where no number is asked for: as JSON, and as a table that shows what fits
NARROWEST = 3  # windows that a table shows in any case
_FIXED = 5 + 3 * (2 + 6 + 1) + 2 + 9  # layer, three numbers each before its bars, dead


@dataclass(frozen=True)
class View:
    """What is shown.

    Args:
        windows: of one run, oldest first.
        run: its name, None while there is none.
        others: names of the other runs in the directory.
        broken: lines and records that could not be read.
    """

    windows: list[Window]
    run: str | None
    others: list[str]
    broken: int


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
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on while the run writes; Ctrl-C ends it.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between looks with --follow.")] = 2.0,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 where an alert is in force.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The last windows of a run: effective experts, imbalance, dead experts and coherence of every layer."""

    def look() -> View:
        return read(run_dir, windows or (FEW if as_json else MOST), run, layer)

    if follow and check:
        raise typer.BadParameter("--check looks once and leaves; --follow goes on. Give one of them.")
    if follow:
        _follow(look, every, console(), as_json)
        return
    view = look()
    if not view.windows:
        raise TelemetryError(f"{records_directory(run_dir, SNAPSHOTS) / SNAPSHOTS} holds no window of such a run yet")
    if as_json:
        print_json(to_json(view))
    else:
        screen = console()
        for line in lines(view, screen.width, bars(screen.encoding)):
            screen.print(line, soft_wrap=True)
    if check and view.windows[-1].active:
        raise typer.Exit(FOUND)


def read(run_dir: Path, count: int, run: str | None, only: list[int] | None) -> View:
    """The last `count` windows of a run, from the end of its file.

    Raises:
        TelemetryError: no record file, no such run, or no such layer.
    """
    from chronomoe_hf.telemetry.reader import read_last
    from chronomoe_hf.telemetry.views import Window, plain_text

    path = records_directory(run_dir, SNAPSHOTS) / SNAPSHOTS
    last = read_last(path, count, name=run)
    names = [plain_text(known.name, 80) for known in last.history.runs]
    if run is not None and last.run is None:
        raise TelemetryError(f"no run {run!r} in {path}; it holds {', '.join(names) or 'none yet'}")
    shown = [Window.from_record(record) for record in last.records]
    windows = [window for window in shown if window is not None]
    if only is not None:
        windows = [_only(window, only) for window in windows]
    name = None if last.run is None else plain_text(last.run.name, 80)
    return View(windows, name, [n for n in names if n != name], last.broken + len(shown) - len(windows))


def _only(window: Window, layers: list[int]) -> Window:
    import dataclasses

    kept = [layer for layer in window.layers if layer.index in layers]
    if not kept:
        known = ", ".join(layer.layer_id for layer in window.layers) or "none"
        raise TelemetryError(
            f"no layer {', '.join(map(str, layers))} in the window of step {window.step}: it has {known}"
        )
    active = [alert for alert in window.active if alert.layer_id is None or alert.layer_id in map(str, layers)]
    return dataclasses.replace(window, layers=kept, active=active)


# ---- text ----------------------------------------------------------------------------------------------------------


def lines(view: View, width: int, blocks: str, height: int | None = None) -> list[str]:
    """The table as lines of at most `width` characters: the newest windows that fit, oldest ones dropped.

    Args:
        view: what to show.
        width: columns.
        blocks: eight characters from low to high.
        height: rows; where the layers do not fit, those with the fewest effective experts are shown. None = all.
    """
    last = view.windows[-1]
    fit = max(NARROWEST, (width - _FIXED) // 3)
    windows = view.windows[-fit:]
    steps = f"steps {windows[0].step} to {last.step}, {len(windows)} windows"
    head = [_cut(f"{view.run}  {last.model_name}  {steps}".replace("    ", "  "), width)]
    if view.others:
        head.append(_cut(f"other runs here: {', '.join(view.others[::-1])}; --run NAME shows one", width))
    foot = [_cut(f"! {a.kind}, {a.where}, since step {a.step}: {a.detail}", width) for a in last.active]
    foot += [_cut(f"{view.broken} broken lines were skipped", width)] if view.broken else []
    bar = len(windows)
    title = f"{'layer':>5}  {'Neff/E':>6} {'':{bar}}  {'maxvio':>6} {'':{bar}}  {'dead':>9}  {'phi':>6}"
    rows = [(_row(layer, windows, blocks), layer) for layer in last.layers]
    if height is not None:
        foot = foot[: max(1, height // 4)]
        room = max(1, height - len(head) - len(foot) - 3)
        if len(rows) > room:
            worst = sorted(rows, key=lambda row: _worst(row[1]))[:room]
            foot.insert(0, _cut(f"the {room} worst of {len(rows)} layers; --layer N shows one", width))
            rows = sorted(worst, key=lambda row: row[1].index)
    return [*head, "", title.rstrip(), *(row for row, _ in rows), *foot]


def _worst(layer: LayerView) -> float:
    fraction = layer.neff_fraction
    return 2.0 if fraction is None else fraction


def _row(layer: LayerView, windows: list[Window], blocks: str) -> str:
    past = [next((known for known in w.layers if known.layer_id == layer.layer_id), None) for w in windows]
    neff = [None if p is None else p.neff_fraction for p in past]
    violation = [None if p is None else p.get("max_violation") for p in past]
    phi = [None if p is None else p.get("coherence_mean") for p in past]
    ceiling = layer.get("max_violation_ceiling") or 1.0
    dead = layer.get("dead_experts")
    deads = "-" if dead is None else f"{dead:.0f}/{layer.num_choices or '?'}"
    return (
        f"{layer.layer_id[:5]:>5}  {_number(neff[-1]):>6} {sparkline(neff, 0.0, 1.0, blocks)}"
        f"  {_number(violation[-1]):>6} {sparkline(violation, 0.0, ceiling, blocks)}"
        f"  {deads[:9]:>9}  {_number(phi[-1]):>6} {sparkline(phi, -1.0, 1.0, blocks)}"
    ).rstrip()


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0e}".replace("+", "")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def to_json(view: View) -> dict[str, Any]:
    """The view as JSON data."""
    from dataclasses import asdict

    return {
        "run": view.run,
        "other_runs": view.others,
        "broken": view.broken,
        "alerts_in_force": [asdict(alert) for alert in view.windows[-1].active] if view.windows else [],
        "windows": [asdict(window) for window in view.windows],
    }


# ---- following -----------------------------------------------------------------------------------------------------


def _follow(look: Callable[[], View], every: float, screen: Console, as_json: bool) -> None:
    """Show every new window until Ctrl-C: a table that is redrawn on a terminal, else one line a window."""
    try:
        if screen.is_terminal and not as_json:
            _redraw(look, every, screen)
        else:
            _lines_only(look, every, as_json)
    except KeyboardInterrupt:
        return


def _try(look: Callable[[], View]) -> View | None:
    """The view, None while the run has written nothing yet."""
    try:
        view = look()
    except TelemetryError as error:
        if "no layer" in str(error):
            raise
        return None
    return view if view.windows else None


def _redraw(look: Callable[[], View], every: float, screen: Console) -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(Text("waiting for the first window"), console=screen, auto_refresh=False, screen=True) as live:
        while True:
            view = _try(look)
            if view is not None:
                drawn = lines(view, screen.width, bars(screen.encoding), screen.height - 1)
                live.update(Text("\n".join(drawn), no_wrap=True), refresh=True)
            time.sleep(every)


def _lines_only(look: Callable[[], View], every: float, as_json: bool) -> None:
    from dataclasses import asdict

    shown: tuple[str | None, int, int] | None = None
    while True:
        view = _try(look)
        for window in view.windows if view is not None else ():
            assert view is not None
            place = (view.run, window.attempt, window.step)
            if shown is None or shown[0] != view.run or place[1:] > shown[1:]:
                print_json({"run": view.run, **asdict(window)}, indent=None) if as_json else print(
                    summary(window), flush=True
                )
                shown = place
        time.sleep(every)


def summary(window: Window) -> str:
    """One window in one line."""
    neff = [(fraction, layer) for layer in window.layers if (fraction := layer.neff_fraction) is not None]
    violation = [known for layer in window.layers if (known := layer.get("max_violation")) is not None]
    dead = [known for layer in window.layers if (known := layer.get("dead_experts")) is not None]
    low, worst = min(neff, key=lambda pair: pair[0], default=(None, None))
    mean = sum(fraction for fraction, _ in neff) / len(neff) if neff else None
    alerts = ", ".join(f"{alert.kind} ({alert.where})" for alert in window.active) or "none"
    return (
        f"step {window.step}: Neff/E {_number(mean)}, lowest {_number(low)}"
        f"{'' if worst is None else f' (layer {worst.layer_id})'}; "
        f"max violation {_number(max(violation, default=None))}; dead {sum(dead):.0f}; alerts: {alerts}"
    )
