"""The plots of a report as data: what the page draws, the sentence above it, and the table behind it.

Shape suffixes: L layers, E experts (the largest layer).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chronomoe_hf.pictures.picture import Picture
from chronomoe_hf.report.data import RunData, relative_load
from chronomoe_hf.report.judged import lowest
from chronomoe_hf.report.words import counted, listed
from chronomoe_hf.telemetry.views import LayerView, Window, number

Array = np.ndarray[Any, Any]
NO_DATA, DEAD, LOW, HIGH = 0, 1, 2, 255  # codes of a cell: the last two are the ends of the scale


@dataclass
class Figure:
    """One plot.

    Attributes:
        key: id in the page.
        title: heading.
        sentence: what is seen in this run.
        spec: what the page draws; None = there is nothing to draw.
        head, rows: the table behind it.
        note: how to read it, once, in small print.
        picture: drawn instead of `spec`, by the renderer of ``pictures``.
        sortable: a click on a head sorts the table.
    """

    key: str
    title: str
    sentence: str
    spec: dict[str, Any] | None
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    picture: Picture | None = None
    sortable: bool = False


def quantise(value: Array, low: float, high: float, dead: Array | None = None) -> str:
    """Cells as one byte each, base64: NaN is NO_DATA, `dead` cells DEAD, [low, high] is spread over LOW to HIGH."""
    known = np.isfinite(value)
    part = np.clip((np.where(known, value, low) - low) / (high - low), 0.0, 1.0)
    code = np.where(known, np.rint(LOW + part * (HIGH - LOW)), NO_DATA).astype(np.uint8)
    if dead is not None:
        code[dead] = DEAD
    return base64.b64encode(code.tobytes()).decode("ascii")


def layer_ids(run: RunData) -> list[tuple[int, str]]:
    """(index, label) of every layer that a picked window has."""
    found = {layer.index: layer.layer_id for window in run.picked for layer in window.layers}
    return sorted(found.items())


def matrix(run: RunData, value: Callable[[LayerView], float | None]) -> Array:
    """One number a layer and picked window, ``[L, windows]``, NaN without evidence."""
    rows = {index: at for at, (index, _) in enumerate(layer_ids(run))}
    out = np.full((len(rows), len(run.picked)), math.nan)
    for column, window in enumerate(run.picked):
        for layer in window.layers:
            known = value(layer)
            out[rows[layer.index], column] = math.nan if known is None else known
    return out


def effective_experts(run: RunData) -> Figure:
    """Neff/E, layer by step."""
    value_LW = matrix(run, lambda layer: layer.neff_fraction)
    labels = [label for _, label in layer_ids(run)]
    rows = []
    for at, label in enumerate(labels):
        known = value_LW[at][np.isfinite(value_LW[at])]
        if known.size:
            step = run.picked[int(np.nanargmin(value_LW[at]))].step
            rows.append([label, *map(percent, (known[0], known.min())), str(step), percent(known[-1])])
    return Figure(
        "neff",
        "Effective experts over time",
        _neff_sentence(run, value_LW),
        _fitted_grid(value_LW, run, labels) if rows else None,
        ["layer", "first window", "lowest", "at step", "last window"],
        rows,
        "exp(entropy of the shares) over the number of experts: 100 % is perfectly even, 1/E is one expert alone.",
    )


def _neff_sentence(run: RunData, value_LW: Array) -> str:
    known = np.isfinite(value_LW)
    if not known.any():
        return "There is no window with evidence yet."
    mean_W = np.nanmean(value_LW[:, known.any(0)], axis=0)
    last = run.windows[-1]
    worst = lowest(last.layers)
    change = mean_W[-1] - mean_W[0]
    moved = f"{'rose' if change > 0 else 'fell'} from {percent(mean_W[0])} to {percent(mean_W[-1])}"
    if abs(change) < 0.02:
        moved = f"stayed where it began, at {percent(mean_W[-1])}"
    text = f"Over {counted(len(run.windows), 'window')}, the mean share of experts in effective use {moved}"
    if worst is None:
        return f"{text}."
    return f"{text}; the narrowest layer at the end is layer {worst.layer_id} with {percent(worst.neff_fraction)}."


def _fitted_grid(value_LW: Array, run: RunData, labels: list[str]) -> dict[str, Any]:
    """Neff / E on a scale that fits it, in tenths, with the floor of the alert marked."""
    known = value_LW[np.isfinite(value_LW)]
    low, high = math.floor(10 * float(known.min())) / 10, math.ceil(10 * float(known.max())) / 10
    low, high = max(0.0, min(low, high - 0.2)), min(1.0, max(high, low + 0.2))
    alerts = run.config.get("alerts")
    floor = number(alerts.get("neff_floor")) if isinstance(alerts, dict) else None
    grid = _grid(value_LW, run, labels, low, high, "Neff / E", "sequential")
    if floor is not None and not run.profile:
        grid["threshold"] = {"at": floor, "text": f"{floor:g}, the level of PRE_COLLAPSE"}
    return grid


def _grid(
    value_LW: Array, run: RunData, labels: list[str], low: float, high: float, unit: str, scale: str
) -> dict[str, Any]:
    return {
        "kind": "grid",
        "rows": labels,
        "columns": [str(window.step) for window in run.picked],
        "row_name": "layer",
        "column_name": "step",
        "cells": quantise(value_LW, low, high),
        "low": low,
        "high": high,
        "unit": unit,
        "scale": scale,
        "frames": [],
    }


def work(run: RunData, names: Sequence[str] = ()) -> Figure:
    """Share of every expert in units of the fair share, with a slider over the windows.

    Args:
        run: the run.
        names: of the windows, where they are domains and not steps.
    """
    shown = [window for window in run.picked if window.step in run.frames]
    ids = sorted({layer for window in shown for layer in run.frames[window.step].layers})
    size = max((max(run.frames[w.step].experts, default=0) for w in shown), default=0)
    log_FLE = np.full((len(shown), len(ids), size), math.nan)
    dead_FLE = np.zeros(log_FLE.shape, dtype=bool)
    for at, window in enumerate(shown):
        relative_LE, layers = relative_load(run, window.step)
        rows = [ids.index(layer) for layer in layers]
        width = relative_LE.shape[1]
        with np.errstate(divide="ignore"):
            log_FLE[at, rows, :width] = np.log2(relative_LE)
        dead_FLE[at, rows, :width] = relative_LE == 0
    if not shown:
        return Figure("work", "Who does the work", "No per-expert counts were recorded.", None, [], [])
    spec = {
        "kind": "grid",
        "rows": [str(layer) for layer in ids],
        "columns": [str(expert) for expert in range(size)],
        "row_name": "layer",
        "column_name": "expert",
        "cells": quantise(log_FLE, -3.0, 3.0, dead_FLE),
        "low": -3.0,
        "high": 3.0,
        "unit": "x fair share",
        "scale": "diverging",
        "frames": [_called(run, window, names) for window in shown],
    }
    last_LE, layers = relative_load(run, shown[-1].step)
    rows_shown = [_work_row(layer, row) for layer, row in zip(layers, last_LE, strict=True)]
    note = "1 is the fair share 1/E. A cross, or a black cell, is an expert without a token in that window."
    head = ["layer", "busiest", "x fair share", "idlest with tokens", "x fair share", "without a token"]
    sentence = _work_sentence(last_LE, layers, _called(run, shown[-1], names), "domain" if names else "window")
    return Figure("work", "Who does the work", sentence, spec, head, rows_shown, note)


def _called(run: RunData, window: Window, names: Sequence[str]) -> str:
    return names[run.windows.index(window)] if names else f"step {window.step}"


def _work_row(layer: int, relative_E: Array) -> list[str]:
    known = np.isfinite(relative_E)
    if not known.any():
        return [str(layer), "-", "-", "-", "-", "-"]
    busy, used = int(np.nanargmax(relative_E)), np.where(relative_E > 0, relative_E, math.nan)
    idle = int(np.nanargmin(used))
    dead = [str(expert) for expert in np.flatnonzero(relative_E == 0)]
    return [str(layer), str(busy), f"{relative_E[busy]:.2f}", str(idle), f"{relative_E[idle]:.2f}", listed(dead, 8)]


def _work_sentence(relative_LE: Array, layers: list[int], name: str, kind: str) -> str:
    if not np.isfinite(relative_LE).any():
        return f"No token was routed in the last {kind} ({name})."
    row, expert = np.unravel_index(int(np.nanargmax(relative_LE)), relative_LE.shape)
    dead = int((relative_LE == 0).sum())
    rest = "every expert got some" if not dead else f"{counted(dead, 'expert')} got none"
    return (
        f"In the last {kind} ({name}) the busiest expert is number {expert} of layer {layers[row]}, with "
        f"{relative_LE[row, expert]:.1f} times its fair share; {rest}. The slider shows "
        f"{'the other domains' if kind == 'domain' else 'earlier windows'}."
    )


def lines(panels: list[dict[str, Any]], x: Sequence[float], marks: Sequence[tuple[float, str]] = ()) -> dict[str, Any]:
    """Small multiples on one x axis; a panel is ``{"title", "low", "high", "series": [{"name", "y"}]}``."""
    return {"kind": "lines", "x": list(x), "panels": panels, "marks": [list(mark) for mark in marks]}


def series(name: str, values: Any) -> dict[str, Any]:
    """A line; NaN becomes a gap."""
    return {"name": name, "y": [round(float(v), 6) if v is not None and math.isfinite(v) else None for v in values]}


def imbalance(run: RunData) -> Figure:
    """Four measures of imbalance: median, nine in ten, and worst layer."""
    measures = (
        ("max violation", "of its ceiling", lambda layer: layer.violation_fraction),
        ("top-2 share", "of its ceiling", lambda layer: layer.get("top2_relative")),
        ("Gini coefficient", "0 is even", lambda layer: layer.get("gini")),
        ("load variation", "std / mean", lambda layer: layer.get("load_cv")),
    )
    steps = [window.step for window in run.picked]
    panels, rows = [], []
    for name, unit, value in measures:
        value_LW = matrix(run, value)
        if not np.isfinite(value_LW).any():
            continue
        with np.errstate(all="ignore"):
            usable = np.isfinite(value_LW).any(0)
            three = np.full((3, value_LW.shape[1]), math.nan)
            three[:, usable] = np.nanquantile(value_LW[:, usable], (0.5, 0.9, 1.0), axis=0)
        high = max(0.2, 1.1 * float(np.nanmax(value_LW)))
        worst = layer_ids(run)[int(np.nanargmax(np.where(np.isnan(value_LW[:, -1]), -1, value_LW[:, -1])))][1]
        named = zip(("median layer", "90 % of layers below", "worst layer"), three, strict=True)
        own = [series(label, values) for label, values in named]
        panels.append({"title": f"{name} ({unit})", "low": 0.0, "high": high, "series": own})
        rows.append([name, *(f"{v:.3f}" for v in three[:, -1]), f"layer {worst}"])
    return Figure(
        "imbalance",
        "Imbalance",
        _imbalance_sentence(run),
        lines(panels, steps, resumes(run)) if panels else None,
        ["measure, last window", "median", "90 %", "worst", "worst layer"],
        rows,
        "The ceiling of the max violation is E/k - 1: every token picks the same k experts.",
    )


def _imbalance_sentence(run: RunData) -> str:
    last = [
        layer for layer in (run.windows[-1].layers if run.windows else []) if layer.get("max_violation") is not None
    ]
    if not last:
        return "There is no window with evidence yet."
    worst = max(last, key=lambda layer: layer.get("max_violation") or 0.0)
    busy = 1.0 + (worst.get("max_violation") or 0.0)
    return (
        f"At the end the most loaded expert of layer {worst.layer_id} serves {busy:.1f} times the mean load, "
        f"{percent(worst.violation_fraction)} of what is possible; the median layer's Gini coefficient is "
        f"{np.median([layer.get('gini') or 0.0 for layer in last]):.2f}."
    )


def coherence(run: RunData) -> Figure:
    """phi: per layer over time, and per expert at the end."""
    mean_LW = matrix(run, lambda layer: layer.get("coherence_mean"))
    low_LW = matrix(run, lambda layer: layer.get("coherence_min"))
    known = np.isfinite(mean_LW)
    if not known.any():
        text = "Expert outputs were not read in this run, so there is no coherence to show."
        return Figure("coherence", "Coherence", text, None, [], [])
    usable = known.any(0)
    middle, low = np.full(usable.size, math.nan), np.full(usable.size, math.nan)
    middle[usable] = np.nanmean(mean_LW[:, usable], axis=0)
    usable_low = np.isfinite(low_LW).any(0)
    low[usable_low] = np.nanmin(low_LW[:, usable_low], axis=0)
    floor = min(-0.2, float(np.nanmin(low)) if np.isfinite(low).any() else 0.0)
    own = [series("mean of the layers", middle), series("lowest expert", low)]
    panel = {"title": "slow coherence phi (cosine)", "low": floor, "high": 1.0, "series": own}
    labels = [label for _, label in layer_ids(run)]
    rows = [[label, _signed(mean_LW[at, -1]), _signed(low_LW[at, -1])] for at, label in enumerate(labels)]
    last = middle[usable][-1]
    worst = labels[int(np.nanargmin(np.where(known[:, -1], mean_LW[:, -1], 9.0)))]
    direction = "together with" if last > 0.1 else "against" if last < -0.1 else "independently of"
    return Figure(
        "coherence",
        "Coherence",
        f"At the end experts write, on average, {direction} the rest of their layer (phi {last:+.2f}); layer {worst} "
        "is the least coherent.",
        lines([panel], [window.step for window in run.picked], resumes(run)),
        ["layer", "phi, mean", "phi, lowest expert"],
        rows,
        "phi is the cosine between an expert's mean output and the rest of the mixture on the same tokens.",
    )


def resumes(run: RunData) -> list[tuple[float, str]]:
    """Vertical marks: where the run was resumed."""
    return [(float(step), "resumed") for _, step in run.resumes]


def percent(value: float | None) -> str:
    """``42 %``; ``-`` without evidence."""
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.0f}\u00a0%"


def _signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "-"
