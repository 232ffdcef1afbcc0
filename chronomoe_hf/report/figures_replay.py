"""What a run's page shows of replay: where passes choose other experts, and what that does to log-probabilities.

Shape suffixes: L layers, W windows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from chronomoe_hf.report.data import RunData
from chronomoe_hf.report.figures import Figure, lines, quantise, resumes, series
from chronomoe_hf.report.words import counted

PAIRS = {
    "rollout_old": "rollout and old-policy pass",
    "rollout_gradient": "rollout and gradient pass",
    "old_gradient": "old-policy and gradient pass",
}
_GROWN = 4.0
"""A k3 of the last window so many times that of the first one is named."""
_ROUNDING = 1e-4
"""Nats: what rounding alone makes of k3."""
_LAST = 14
"""The last class of positions in a completion begins at this power of two."""
_MODES = {
    "measure": "Nothing is repeated (mode measure)",
    "old": "The gradient pass repeats the old-policy pass (mode old)",
    "rollout": "Old-policy and gradient pass repeat the rollout (mode rollout)",
}


def replay(run: RunData) -> list[Figure]:
    """Mismatch by layer and by position, k3 over steps; nothing where replay was off."""
    records = [record for record in run.replay if isinstance(record.get("pairs"), dict)]
    if not records:
        return []
    main = _main(records)
    shown = [_layers(records, main)] if main is not None else []
    return [*shown, _numbers(run, records, main)]


def _main(records: list[dict[str, Any]]) -> str | None:
    """The pair of passes whose choices differ most in any window; of equal ones the first in a step's order."""
    reach: dict[str, float] = {}
    for record in records:
        for name in PAIRS:
            if name in record["pairs"]:
                value = _number(_of(record["pairs"][name]).get("mean"))
                reach[name] = max(reach.get(name, 0.0), value if math.isfinite(value) else 0.0)
    return max((name for name in PAIRS if name in reach), key=lambda name: reach[name], default=None)


def _layers(records: list[dict[str, Any]], name: str) -> Figure:
    """A cell for every layer and window of the pair of passes whose choices differ most."""
    ids: list[Any] = next((record["layers"] for record in records if isinstance(record.get("layers"), list)), [])
    value_LW = np.full((len(ids), len(records)), math.nan)
    for at, record in enumerate(records):
        values = _of(record["pairs"].get(name)).get("mismatch") or []
        for row, value in enumerate(values[: len(ids)]):
            value_LW[row, at] = _number(value)
    known = np.isfinite(value_LW)
    high = max(0.02, round(float(np.nanmax(value_LW)) if known.any() else 0.0, 3))
    labels = [str(layer) for layer in ids]
    last = [value for value in value_LW[:, -1] if math.isfinite(value)]
    sentence = f"Compared: {PAIRS[name]}. {_MODES.get(str(records[-1].get('mode')), 'Replay')}."
    if last:
        worst = int(np.nanargmax(np.where(np.isfinite(value_LW[:, -1]), value_LW[:, -1], -1.0)))
        sentence = (
            f"In the last window {PAIRS[name]} choose other experts in {np.mean(last):.2%} of (token, layer); most in "
            f"layer {labels[worst]}, {value_LW[worst, -1]:.2%}. {_MODES.get(str(records[-1].get('mode')), 'Replay')}."
        )
    spec = {
        "kind": "grid",
        "rows": labels,
        "columns": [str(record.get("step")) for record in records],
        "row_name": "layer",
        "column_name": "step",
        "cells": quantise(value_LW, 0.0, high),
        "low": 0.0,
        "high": high,
        "unit": "mismatch",
        "scale": "sequential",
        "frames": [],
    }
    rows = [
        [label, *(_percent(value) for value in (value_LW[at, 0], np.nanmax(value_LW[at]), value_LW[at, -1]))]
        for at, label in enumerate(labels)
        if known[at].any()
    ]
    note = (
        "Share of tokens whose set of k experts differs between the two passes, by the router's own choice: what it "
        "would do without replay. Choices that differ are no damage by themselves; k3 says what they do."
    )
    head = ["layer", "first window", "highest", "last window"]
    return Figure("replay_layers", "Routing mismatch between passes", sentence, spec, head, rows, note)


def _numbers(run: RunData, records: list[dict[str, Any]], main: str | None) -> Figure:
    """k3 and coverage over steps, mismatch by position in the completion, recompute flips."""
    steps = [float(record.get("step", at)) for at, record in enumerate(records)]
    panels = []
    k3 = {name: [_logp(record, name, "k3") for record in records] for name in PAIRS}
    drawn = {name: values for name, values in k3.items() if np.isfinite(values).any()}
    if drawn:
        top = max(1e-6, *(float(np.nanmax(values)) for values in drawn.values()))
        own = [series(PAIRS[name], [1e3 * value for value in values]) for name, values in drawn.items()]
        panels.append({"title": "k3 KL (1/1000 nats)", "low": 0.0, "high": 1.1e3 * top, "series": own})
    if (place := _by_position(records, main)) is not None:
        panels.append(place)
    covered = [_number(record.get("coverage")) for record in records]
    if np.isfinite(covered).any():
        panels.append({"title": "tokens with a record", "low": 0.0, "high": 1.0, "series": [series("", covered)]})
    flips = [_worst(_of(record.get("recompute")).get("flips")) for record in records]
    if np.isfinite(flips).any():
        high = max(0.01, 1.1 * float(np.nanmax(flips)))
        own = [series("", flips)]
        panels.append(
            {"title": "choices that flip in the recompute, worst layer", "low": 0.0, "high": high, "series": own}
        )
    rows = [
        [
            PAIRS[name],
            *(_shown(_logp(records[-1], name, key)) for key in ("k3", "logp_diff_mean", "logp_diff_max")),
            _percent(_logp(records[-1], name, "above_ln2")),
        ]
        for name in drawn
    ]
    return Figure(
        "replay_numbers",
        "What the mismatch does",
        _sentence(records, k3, main),
        lines(panels, steps, resumes(run)) if panels else None,
        ["passes, last window", "k3, nats", "|dlogp|, mean", "|dlogp|, max", "above ln 2"],
        rows,
        "k3 estimates the KL divergence of two passes from the sampled tokens: r - 1 - ln r, r = the ratio of "
        "probabilities. Below about 1e-4 rounding; ROUTING_MISMATCH is raised above the limit in the settings.",
    )


def _by_position(records: list[dict[str, Any]], main: str | None) -> dict[str, Any] | None:
    """Mismatch by position in the completion, of the last window, in classes of doubling width."""
    for name in sorted(PAIRS, key=lambda name: name != main):
        values = [_number(value) for value in _of(records[-1]["pairs"].get(name)).get("by_position") or []]
        if np.isfinite(values).any():
            count = max(at for at, value in enumerate(values) if math.isfinite(value)) + 1
            high = max(0.01, 1.1 * float(np.nanmax(values)))
            own = [series(PAIRS[name], values[:count])]
            texts = ["0", "1", *(f"{2**at}-{2 ** (at + 1) - 1}" for at in range(1, _LAST)), f"from {2**_LAST}"][:count]
            axis = {"x": list(range(count)), "x_texts": texts, "x_name": "position in the completion"}
            return {"title": "mismatch by position, last window", "low": 0.0, "high": high, **axis, "series": own}
    return None


def _sentence(records: list[dict[str, Any]], k3: dict[str, list[float]], main: str | None) -> str:
    order = sorted(k3.items(), key=lambda pair: pair[0] != main)
    first = next((name for name, values in order if np.isfinite(values).any()), None)
    if first is None:
        return f"{counted(len(records), 'window')}; the log-probabilities of this trainer could not be read."
    known = [value for value in k3[first] if math.isfinite(value)]
    largest = _logp(records[-1], first, "logp_diff_max")
    more = (
        f", and a log-probability differed by up to {largest:.2g} in the last window" if math.isfinite(largest) else ""
    )
    return (
        f"The k3 KL of {PAIRS[first]} was {known[0]:.2g} nats in the first window, {known[-1]:.2g} in the last{more}."
        f"{_grown(k3)}"
    )


def _grown(k3: dict[str, list[float]]) -> str:
    """What it means where the engine and the pass of the same weights have grown apart; empty where they have not."""
    known = {name: [value for value in values if math.isfinite(value)] for name, values in k3.items()}
    name = "rollout_old" if known.get("rollout_old") or known.get("old_gradient") else "rollout_gradient"
    own = known.get(name) or [0.0]
    if own[-1] <= _GROWN * own[0] or own[-1] <= _ROUNDING:
        return ""
    return (
        f" Between {PAIRS[name]} it has grown from {own[0]:.2g} to {own[-1]:.2g} nats, as it does where the engine "
        "keeps older weights than the trainer: check that every optimizer step is followed by a weight sync."
    )


def _of(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else math.nan


def _logp(record: dict[str, Any], name: str, key: str) -> float:
    return _number(_of(_of(record.get("logps")).get(name)).get(key))


def _worst(values: Any) -> float:
    known = [number for value in values or [] if math.isfinite(number := _number(value))]
    return max(known, default=math.nan)


def _shown(value: float) -> str:
    return f"{value:.2e}" if math.isfinite(value) else "-"


def _percent(value: float) -> str:
    return f"{value:.2%}" if math.isfinite(value) else "-"
