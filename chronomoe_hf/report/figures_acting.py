"""The plots about what acted and what happened: governor, lifecycle, timeline."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from chronomoe_hf.report.data import RunData
from chronomoe_hf.report.figures import Figure, lines, resumes, series
from chronomoe_hf.report.rules import REASONS
from chronomoe_hf.report.words import counted, listed

MOST_ROWS = 200


def governor(run: RunData) -> Figure:
    """Lens scale, layers acting, pressure and bias over time; the table counts why lenses stayed closed."""
    title = "What the governor did, and why it abstained"
    steps = list(run.governing)
    biases = _largest_bias(run)
    if not steps and not any(bias for _, bias in biases):
        return Figure("governor", title, "Nothing governed this run, and no decision was recorded.", None, [], [])
    panels: list[dict[str, Any]] = []
    shown = _thin(steps)
    if shown:
        now = [run.governing[step] for step in shown]
        most = max(1, *(each.layers for each in now))
        top = max(0.1, *(each.scale for each in now))
        panels = [
            _panel("layers with an open lens", most, "layers", [each.acting for each in now]),
            _panel("largest lens scale (logit std)", top, "scale", [each.scale for each in now]),
            _panel(
                "mean pressure", max(0.1, *(each.pressure for each in now)), "pressure", [each.pressure for each in now]
            ),
        ]
    x = shown or [step for step, _ in biases]
    known = dict(biases)
    bias = [known.get(step) for step in x]
    if any(bias):
        top = max(value for value in bias if value is not None)
        panels.append(_panel("largest routing bias (logit std)", top, "bias", bias))
    reasons = sum((each.reasons for each in run.governing.values()), Counter[str]())
    total = sum(each.layers for each in run.governing.values())
    acting = sum(each.acting for each in run.governing.values())
    rows = [["the lens acted", str(acting), _part(acting, total)]] if total else []
    rows += [[REASONS.get(r, r), str(n), _part(n, total)] for r, n in reasons.most_common()]
    return Figure(
        "governor",
        title,
        _sentence(reasons, total, acting, max((b for _, b in biases if b), default=0.0)),
        lines(panels, x, resumes(run)),
        ["what was decided", "times", "of all decisions"],
        rows,
        "One decision a layer and window. A lens shifts the router's input; a bias moves its logits.",
    )


def _panel(title: str, high: float, name: str, values: list[Any]) -> dict[str, Any]:
    return {"title": title, "low": 0.0, "high": high, "series": [series(name, values)]}


def _sentence(reasons: Counter[str], total: int, acting: int, bias: float) -> str:
    parts = []
    if total:
        parts.append(f"{counted(total, 'decision')} were taken and a lens acted in {_part(acting, total)} of them")
        if reasons:
            reason, times = reasons.most_common(1)[0]
            parts.append(f"the usual reason to abstain was that {REASONS.get(reason, reason)} ({_part(times, total)})")
    if bias:
        parts.append(f"the routing bias reached {bias:.2f} logit standard deviations")
    text = "; ".join(parts) or "nothing acted"
    return f"{text[0].upper()}{text[1:]}."


def _largest_bias(run: RunData) -> list[tuple[int, float | None]]:
    out: list[tuple[int, float | None]] = []
    for window in run.picked:
        beta_LE = run.frames[window.step].arrays.get("beta") if window.step in run.frames else None
        finite = np.abs(beta_LE[np.isfinite(beta_LE)]) if beta_LE is not None else np.zeros(0)
        out.append((window.step, float(finite.max()) if finite.size else None))
    return out


def _thin(steps: list[int], most: int = 300) -> list[int]:
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _part(number: int, total: int) -> str:
    return f"{100 * number / total:.0f}\u00a0%" if total else "-"


def lifecycle(run: RunData) -> list[Figure]:
    """Cases of the dry run, and the measured effect of plans."""
    standing = [case for case in run.cases if case["state"] != "withdrawn"]
    confirmed = sum(case["state"] == "confirmed" for case in standing)
    text = "The dry run holds no case against any expert."
    if standing:
        layers = list(dict.fromkeys(f"layer {case['layer_id']}" for case in standing))
        text = (
            f"The dry run holds {counted(len(standing), 'case')} ({confirmed} confirmed), in {listed(layers)}. "
            "No weight was touched."
        )
    head = ["layer", "expert", "case", "state", "since step", "tokens", "share", "phi", "contribution rank"]
    rows = [
        [
            *(case[name] for name in ("layer_id", "expert", "reason", "state")),
            _number(case["step"], ".0f"),
            _number(case["total_tokens_seen"], ",.0f"),
            _number(case["share"], ".4f"),
            _number(case["phi_slow"], "+.2f"),
            f"{_number(case['contribution_rank'], '.0f')} of {_number(case['num_experts'], '.0f')}",
        ]
        for case in standing[:MOST_ROWS]
    ]
    figures = [Figure("lifecycle", "Lifecycle evidence", text, None, head, rows)]
    if run.effects:
        best = min(run.effects, key=lambda effect: effect["rise"])
        against = "" if best["random"] is None else f", against {best['random']:+.4f} for random experts"
        figures.append(
            Figure(
                "effects",
                "Plans and their measured effect",
                f"The cheapest plan measured ({best['rank']}) changes the loss by {best['rise']:+.4f} nats{against}.",
                None,
                ["from", "rank", "experts kept", "loss before", "rise", "standard error", "random", "worst"],
                [
                    [effect["where"], effect["rank"], _number(effect["kept"], "d"), _number(effect["loss"], ".4f")]
                    + [_number(effect[name], "+.4f") for name in ("rise", "error", "random", "worst")]
                    for effect in run.effects[:MOST_ROWS]
                ],
                "Rise of the loss on held-out text, nats a token; the loss judges, the evidence only proposes.",
            )
        )
    return figures


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def timeline(run: RunData) -> Figure:
    """Loss on top, a lane for each kind of thing that happened."""
    end = run.windows[-1].step if run.windows else 0
    lanes: dict[str, list[list[Any]]] = {}
    still: dict[tuple[str, str | None], int] = {}
    rows = []
    for alert in run.alerts:
        step = alert.step or 0
        rows.append([str(step), f"{alert.kind} {alert.state}", alert.where, alert.detail])
        key = alert.kind, alert.layer_id
        if alert.state == "raised":
            still[key] = step
        elif key in still:
            lanes.setdefault(alert.kind, []).append([still.pop(key), step, alert.where])
    for (kind, layer), step in still.items():
        lanes.setdefault(kind, []).append([step, end, "run" if layer is None else f"layer {layer}"])
    opened = [step for step, now in run.governing.items() if now.acting]
    if opened:
        lanes["lens open"] = [[step, step, counted(run.governing[step].acting, "layer")] for step in _thin(opened)]
    for case in run.cases:
        if case["state"] == "confirmed" and case["step"] is not None:
            where = f"layer {case['layer_id']} expert {case['expert']}"
            lanes.setdefault("case confirmed", []).append([case["step"], case["step"], where])
    for attempt, step in run.resumes:
        lanes.setdefault("resumed", []).append([step, step, f"attempt {attempt}"])
        rows.append([str(step), "resumed", "run", f"attempt {attempt}"])
    loss = _thin_pairs(run.loss)
    spec = None
    if lanes or len(loss) > 1:
        spec = {"kind": "lanes", "end": max([end, 1, *(step for step, _ in loss)]), "loss": [list(p) for p in loss]}
        spec["lanes"] = [{"name": name, "spans": spans[:2000]} for name, spans in lanes.items()]
    rows.sort(key=lambda row: int(row[0]))
    return Figure(
        "timeline", "Timeline", _timeline_sentence(run), spec, ["step", "what", "where", "detail"], rows[-MOST_ROWS:]
    )


def _thin_pairs(pairs: list[tuple[int, float]], most: int = 600) -> list[tuple[int, float]]:
    if len(pairs) <= most:
        return pairs
    return [pairs[round(i * (len(pairs) - 1) / (most - 1))] for i in range(most)]


def _timeline_sentence(run: RunData) -> str:
    raised = Counter(alert.kind for alert in run.alerts if alert.state == "raised")
    parts = []
    if len(run.loss) > 1:
        parts.append(f"The training loss went from {run.loss[0][1]:.3f} to {run.loss[-1][1]:.3f}")
    named = [f"{kind} ({times})" for kind, times in raised.items()]
    parts.append(f"alerts raised: {listed(named)}" if named else "no alert was raised")
    if run.resumes:
        parts.append(f"the run was resumed {counted(len(run.resumes), 'time')}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."
