"""What ``chronomoe tail`` shows: windows of a run as a table that fits the terminal, as one line, and as JSON."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chronomoe_hf.cli.output import sparkline

if TYPE_CHECKING:
    from chronomoe_hf.telemetry.views import AlertView, LayerView, Window

TAIL_SCHEMA = 1
NARROWEST = 3  # windows that a table shows in any case
_FIXED = 5 + 2 + 6 + 2 + 8 + 1 + 2 + 6 + 2 + 9 + 2 + 6  # layer, Neff/E, change and bars, maxvio, dead, phi
_WHOLE = ("token_count", "tokens", "dropped", "nonfinite_tokens", "calls", "window_steps", "dead_experts")
_ERRORS = 3.0  # standard errors beyond which a change gets a mark
LEGEND = "Neff/E experts in use (1 is even); change since the baseline, v worse ^ better"
LEGEND_2 = "(beyond chance); maxvio busiest expert over mean, less 1; phi agreement -1..1"


@dataclass(frozen=True)
class View:
    """What is shown.

    Args:
        windows: of one run, oldest first.
        run: its name, None while there is none.
        others: names of the other runs in the directory.
        broken: lines and records that could not be read.
        state: ``"ended"`` or ``"broke off"`` where the run says so.
        process: of the run, as its manifest names it.
        newer: windows that a newer version wrote.
        begun: name of a run that has begun since and has closed no window yet.
    """

    windows: list[Window]
    run: str | None
    others: list[str]
    broken: int
    state: str | None = None
    process: Any = None
    newer: int = 0
    begun: str | None = None

    @property
    def over(self) -> str | None:
        """How the run ended: in order, broken off, or its process is gone; None while it goes on."""
        from chronomoe_hf.telemetry.runs import is_gone

        if self.state is not None:
            return self.state
        return "is gone: its process ended without a word" if is_gone(self.process) else None


def fitting(width: int) -> int:
    """Windows that a table of so many columns shows."""
    return max(NARROWEST, width - _FIXED)


def lines(view: View, width: int, blocks: str, height: int | None = None) -> list[str]:
    """The table as lines of at most `width` characters: the newest windows that fit, oldest ones dropped.

    Args:
        view: what to show.
        width: columns.
        blocks: eight characters from low to high.
        height: rows; where the layers do not fit, those that lost most are shown. None = all.
    """
    last = view.windows[-1]
    windows = view.windows[-fitting(width) :]
    steps = f"step {last.step}, 1 window"
    if len(windows) > 1:
        steps = f"steps {windows[0].step} to {last.step}, {len(windows)} windows"
    head = [_cut(f"{view.run}  {last.model_name}  {steps}".replace("    ", "  "), width)]
    head.append(_cut(_clock(windows), width))
    if view.over is not None:  # a line of its own: what matters most must not be cut at the right
        head.append(_cut(f"the run {view.over}", width))
    if view.begun is not None:
        head.append(_cut(f"{view.begun} has begun since and closed no window yet; --follow waits for it", width))
    if view.others:
        head.append(_cut(f"other runs here: {', '.join(view.others[::-1])}; --run NAME shows one", width))
    foot = [_cut(line, width) for line in grouped(last.active, len(last.layers))]
    foot += [_cut(f"{view.broken} broken lines were skipped", width)] if view.broken else []
    newer = "1 window is" if view.newer == 1 else f"{view.newer} windows are"
    foot += [_cut(f"{newer} of a newer version: numbers may be missing", width)] if view.newer else []
    foot += [_cut(LEGEND, width), _cut(LEGEND_2, width)]
    bar = len(windows)
    title = f"{'layer':>5}  {'Neff/E':>6}  {'change':<8} {'':{bar}}  {'maxvio':>6}  {'dead':>9}  {'phi':>6}"
    rows = [(_row(layer, windows, blocks), layer) for layer in last.layers]
    if height is not None:
        room = max(1, height - len(head) - len(foot) - 3)
        if len(rows) > room:
            worst = sorted(rows, key=lambda row: _loss(row[1]))[: max(1, room - 1)]
            moved = any(neff_change(layer) for layer in last.layers)  # not in the window that is the baseline itself
            which = "that lost most" if moved else "with the fewest experts in use"
            foot.insert(0, _cut(f"the {len(worst)} {which}, of {len(rows)} layers; --layer N shows one", width))
            rows = sorted(worst, key=lambda row: row[1].index)
    return [*head, "", title.rstrip(), *(row for row, _ in rows), *foot]


def grouped(alerts: list[AlertView], num_layers: int) -> list[str]:
    """Alerts in force, a line a kind and kind of since: how many layers, and since when."""
    groups: dict[tuple[str, str | None], list[AlertView]] = {}
    for alert in alerts:
        groups.setdefault((alert.kind, alert.since), []).append(alert)
    out = []
    for (kind, since), members in sorted(groups.items(), key=lambda item: (not item[1][0].urgent, item[0][0])):
        steps = [alert.step for alert in members if alert.step is not None]
        when = f" since step {min(steps)}" if steps else ""
        own = [alert.layer_id for alert in members if alert.layer_id is not None]
        where = f" in layer {own[0]}" if len(own) == 1 else f" in {len(own)} of {num_layers} layers" if own else ""
        came = {"as_it_came": ", as the model came", "got_worse": ", got worse"}.get(since or "", "")
        out.append(f"{'!' if members[0].urgent else '='} {kind}{where}{when}{came}")
    return out


def _clock(windows: list[Window]) -> str:
    """Age of the last window and pace of the run."""
    known = [(window.time, window.step) for window in windows if window.time is not None]
    parts = []
    if known:
        age = max(0.0, time.time() - known[-1][0])
        parts.append(f"last window {_span(age)} ago")
    if len(known) > 1 and known[-1][1] > known[0][1]:
        pace = (known[-1][0] - known[0][0]) / (known[-1][1] - known[0][1])
        parts.append(f"{pace:.3g} s a step")
    return ", ".join(parts) or "no time in these records"


def _span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _loss(layer: LayerView) -> tuple[float, float]:
    change = neff_change(layer)
    fraction = layer.neff_fraction
    return (0.0 if change is None else change, 2.0 if fraction is None else fraction)


def neff_change(layer: LayerView) -> float | None:
    """Change of Neff / E since the run's baseline."""
    change = layer.change.get("n_effective")
    return None if change is None or not layer.num_choices else change / layer.num_choices


def _row(layer: LayerView, windows: list[Window], blocks: str) -> str:
    past = [next((known for known in w.layers if known.layer_id == layer.layer_id), None) for w in windows]
    neff = [None if p is None else p.neff_fraction for p in past]
    seen = [value for value in neff if value is not None]
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    middle, half = (low + high) / 2, max((high - low) / 2, 0.02)  # a flat line is drawn flat
    dead = layer.get("dead_experts")
    deads = "-" if dead is None else f"{dead:.0f}/{layer.num_choices or '?'}"
    return (
        f"{layer.layer_id[:5]:>5}  {_number(neff[-1]):>6}  {_change(layer):<8} "
        f"{sparkline(neff, middle - half, middle + half, blocks)}"
        f"  {_number(layer.get('max_violation')):>6}  {deads[:9]:>9}  {_number(layer.get('coherence_mean')):>6}"
    ).rstrip()


def _change(layer: LayerView) -> str:
    change = neff_change(layer)
    if change is None:
        return "-"
    error = layer.error.get("n_effective")
    sure = error is not None and layer.num_choices and abs(change) > _ERRORS * error / layer.num_choices
    return f"{change:+.3f}" + ((" v" if change < 0 else " ^") if sure else "")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0e}".replace("+", "")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


# ---- JSON and one line -----------------------------------------------------------------------------------------------


def to_json(view: View) -> dict[str, Any]:
    """The view as JSON data; with ``--follow`` the same shape once a window, with that window alone."""
    return {
        "schema": TAIL_SCHEMA,
        "run": view.run,
        "other_runs": view.others,
        "broken": view.broken,
        "over": view.over,
        "alerts_in_force": [_alert(alert) for alert in view.windows[-1].active] if view.windows else [],
        "windows": [_window(window) for window in view.windows],
    }


def _window(window: Window) -> dict[str, Any]:
    from dataclasses import asdict

    record = asdict(window)
    record["layers"] = [_layer(layer) for layer in record["layers"]]
    record["alerts"] = [_alert(alert) for alert in window.alerts]
    record["active"] = [_alert(alert) for alert in window.active]
    return record


def _layer(record: dict[str, Any]) -> dict[str, Any]:
    numbers = {
        name: int(value) if name in _WHOLE or name == "nearly_dead_count" else value
        for name, value in record["numbers"].items()
    }
    return {**record, "layer_id": record["index"], "numbers": numbers}


def _alert(alert: AlertView) -> dict[str, Any]:
    from dataclasses import asdict

    layer = alert.layer_id
    return {**asdict(alert), "layer_id": int(layer) if layer is not None and layer.isdigit() else layer}


def summary(window: Window) -> str:
    """One window in one line."""
    neff = [(fraction, layer) for layer in window.layers if (fraction := layer.neff_fraction) is not None]
    changes = [change for layer in window.layers if (change := neff_change(layer)) is not None]
    violation = [known for layer in window.layers if (known := layer.get("max_violation")) is not None]
    dead = [known for layer in window.layers if (known := layer.get("dead_experts")) is not None]
    low, worst = min(neff, key=lambda pair: pair[0], default=(None, None))
    mean = sum(fraction for fraction, _ in neff) / len(neff) if neff else None
    moved = f" ({sum(changes) / len(changes):+.3f} since the baseline)" if changes else ""
    alerts = "; ".join(line[2:] for line in grouped(window.active, len(window.layers))) or "none"
    return (
        f"step {window.step}: Neff/E {_number(mean)}{moved}, lowest {_number(low)}"
        f"{'' if worst is None else f' (layer {worst.layer_id})'}; "
        f"max violation {_number(max(violation, default=None))}; dead {sum(dead):.0f}; alerts: {alerts}"
    )
