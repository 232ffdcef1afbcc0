"""Two runs on one page: the same measures on the same axes, and the differences in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chronomoe_hf.report.data import RunData, pick
from chronomoe_hf.report.figures import Figure, percent, series
from chronomoe_hf.report.verdict import counted
from chronomoe_hf.telemetry.views import LayerView, Window

WORTH = 0.02  # a smaller difference is called none


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        names: how the two are called on the page.
        sentences: the differences in words.
        figure: the plot and its table.
    """

    names: tuple[str, str]
    sentences: list[str]
    figure: Figure


def compare(run: RunData, other: RunData) -> Comparison:
    """`run` beside `other`: loss, Neff, dead experts, violation and decisions."""
    names = _names(run, other)
    measures: list[tuple[str, str, Callable[[RunData], dict[int, float]]]] = [
        ("training loss", ".3f", lambda r: dict(r.loss)),
        ("mean Neff / E", ".3f", lambda r: _over(r, lambda w: _mean(w, lambda layer: layer.neff_fraction))),
        ("dead experts", ".0f", lambda r: _over(r, lambda w: _sum(w, "dead_experts"))),
        ("mean max violation", ".3f", lambda r: _over(r, lambda w: _mean(w, lambda layer: layer.get("max_violation")))),
        ("layers with an open lens", ".0f", lambda r: {step: float(now.acting) for step, now in r.governing.items()}),
    ]
    panels, rows, last = [], [], {}
    for title, form, value in measures:
        pair = [value(run), value(other)]
        if not any(pair):
            continue
        steps = sorted({*pair[0], *pair[1]})
        known = [v for each in pair for v in each.values()]
        own = [_line(name, each, steps) for name, each in zip(names, pair, strict=True)]
        low = 0.0 if title != "training loss" else min(known)
        panels.append({"title": title, "low": low, "high": max(*known, low + 1e-3), "x": steps, "series": own})
        ends = [each[max(each)] if each else None for each in pair]
        last[title] = ends
        rows.append([title, *("-" if v is None else f"{v:{form}}" for v in ends), _difference(ends, form)])
    sentences = _words(names, last, run, other)
    spec = {"kind": "lines", "x": [], "panels": panels, "marks": []} if panels else None
    figure = Figure(
        "compare",
        f"{names[0]} beside {names[1]}",
        " ".join(sentences),
        spec,
        ["at the end", *names, "difference"],
        rows,
    )
    return Comparison(names, sentences, figure)


def _names(run: RunData, other: RunData) -> tuple[str, str]:
    names = run.directory.resolve().name, other.directory.resolve().name
    if names[0] == names[1]:
        names = (f"{names[0]} ({run.name[:8]})", f"{names[1]} ({other.name[:8]})")
    return names if names[0] != names[1] else (f"{names[0]}, first", f"{names[1]}, second")


def _over(run: RunData, value: Callable[[Window], float | None]) -> dict[int, float]:
    return {window.step: known for window in pick(run.windows) if (known := value(window)) is not None}


def _mean(window: Window, value: Callable[[LayerView], float | None]) -> float | None:
    known = [number for layer in window.layers if (number := value(layer)) is not None]
    return sum(known) / len(known) if known else None


def _sum(window: Window, name: str) -> float | None:
    known = [number for layer in window.layers if (number := layer.get(name)) is not None]
    return sum(known) if known else None


def _line(name: str, values: dict[int, float], steps: list[int]) -> dict[str, Any]:
    return series(name, [values.get(step, math.nan) for step in steps])


def _difference(ends: list[float | None], form: str) -> str:
    return "-" if ends[0] is None or ends[1] is None else f"{ends[0] - ends[1]:+{form}}"


def _words(names: tuple[str, str], last: dict[str, list[float | None]], run: RunData, other: RunData) -> list[str]:
    def ends(title: str) -> tuple[float, float] | None:
        pair = last.get(title, [None, None])
        return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])

    out = []
    if pair := ends("training loss"):
        much = pair[0] - pair[1]
        how = "no different" if abs(much) < WORTH else f"{abs(much):.3f} {'lower' if much < 0 else 'higher'}"
        out.append(f"The training loss of {names[0]} ends {how} ({pair[0]:.3f} against {pair[1]:.3f}).")
    if pair := ends("mean Neff / E"):
        out.append(f"{names[0]} uses {percent(pair[0])} of its experts effectively, {names[1]} {percent(pair[1])}.")
    if pair := ends("dead experts"):
        none = counted(int(pair[0]), "expert")
        out.append(f"In the last window {none} of {names[0]} got no token, and {int(pair[1])} of {names[1]}.")
    if pair := ends("mean max violation"):
        out.append(
            f"The busiest expert of a layer serves {1 + pair[0]:.2f} times the mean load, against {1 + pair[1]:.2f}."
        )
    acting = [sum(now.acting > 0 for now in each.governing.values()) for each in (run, other)]
    if any(acting):
        out.append(f"A lens was open in {counted(acting[0], 'window')} of {names[0]} and in {acting[1]} of {names[1]}.")
    return out
