"""The verdict of a run: which rows of the rule table hold, with the numbers of this run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from chronomoe_hf.config import LifecycleConfig
from chronomoe_hf.report.data import RunData, relative_load
from chronomoe_hf.report.rules import ALERTS, LEVELS, REASONS, STATES, Level, Rule
from chronomoe_hf.telemetry.arrays import Array
from chronomoe_hf.telemetry.views import LayerView

NEAR_CEILING = 0.75  # of the largest possible violation E/k - 1
IDLE = LifecycleConfig().split_idle  # fair shares: what `revive` calls idle


@dataclass(frozen=True)
class Finding:
    """One row that holds.

    Attributes:
        key: in the rule table.
        rule: the row.
        seen: the numbers of this run, as a sentence.
    """

    key: str
    rule: Rule
    seen: str


@dataclass(frozen=True)
class Verdict:
    """What to say first.

    Attributes:
        level: the worst of the findings.
        sentence: in words.
        findings: worst first.
        numbers: ``(name, value, detail)`` of the strip.
    """

    level: Level
    sentence: str
    findings: list[Finding]
    numbers: list[tuple[str, str, str]]


def judge(run: RunData) -> Verdict:
    """The verdict on a run."""
    findings = [*_alerts(run), *_states(run)]
    if not any(finding.rule.level != "fine" for finding in findings):
        findings.insert(0, Finding("HEALTHY", STATES["HEALTHY"], STATES["HEALTHY"].meaning))
    findings.sort(key=lambda finding: LEVELS.index(finding.rule.level))
    level = findings[0].rule.level
    worst = [finding for finding in findings if finding.rule.level == level]
    titles = "; ".join(dict.fromkeys(finding.rule.title for finding in worst))
    sentence = "Healthy: no alert is in force, every expert works, and no layer is near its worst load."
    if level != "fine":
        sentence = f"{'Act now' if level == 'act' else 'Worth watching'}: {titles}."
    return Verdict(level, sentence, findings, _numbers(run))


def _alerts(run: RunData) -> list[Finding]:
    by_kind: dict[str, list[str]] = {}
    since: dict[str, int] = {}
    for alert in run.windows[-1].active if run.windows else []:
        by_kind.setdefault(alert.kind, []).append(alert.where)
        if alert.step is not None:
            since[alert.kind] = min(alert.step, since.get(alert.kind, alert.step))
    unknown = Rule("watch", "an alert of another version", "", "", "Install the chronomoe_hf that wrote the records.")
    return [
        Finding(
            kind,
            ALERTS.get(kind, unknown),
            f"{kind} is in force in {listed(where)}" + (f" since step {since[kind]}." if kind in since else "."),
        )
        for kind, where in by_kind.items()
    ]


def _states(run: RunData) -> list[Finding]:
    seen: dict[str, str] = {}
    if run.broken:
        seen["BROKEN_RECORDS"] = f"{counted(run.broken, 'line')} could not be read."
    if not run.windows:
        seen["EMPTY"] = "No window has been closed."
        return [Finding(key, STATES[key], text) for key, text in seen.items()]
    layers = run.windows[-1].layers
    thin = [layer.layer_id for layer in layers if not layer.sufficient and layer.observed]
    if thin:
        seen["INSUFFICIENT"] = f"The last window was too small to judge {listed([f'layer {i}' for i in thin])}."
    dead = {layer.layer_id: int(layer.get("dead_experts") or 0) for layer in layers if layer.get("dead_experts")}
    if dead:
        where = listed([f"layer {i} ({n})" for i, n in dead.items()])
        seen["DEAD"] = f"{counted(sum(dead.values()), 'expert')} without a token in the last window: {where}."
    idle = {} if run.splits or run.profile else _idle_throughout(run)
    if idle:
        where = listed([f"layer {i} ({n})" for i, n in idle.items()])
        seen["IDLE"] = f"{counted(sum(idle.values()), 'expert')}: {where}."
    near = [layer for layer in layers if (layer.violation_fraction or 0.0) > NEAR_CEILING]
    if near:
        seen["CEILING"] = f"In the last window: {listed([f'layer {layer.layer_id}' for layer in near])}."
    gone = [alert for alert in run.alerts if alert.state == "cleared"]
    if gone:
        kinds = listed(list(dict.fromkeys(f"{alert.kind} ({alert.where})" for alert in gone)))
        seen["CLEARED"] = f"Raised and cleared again: {kinds}, the last at step {max(a.step or 0 for a in gone)}."
    _governing(run, seen)
    confirmed = sum(case["state"] == "confirmed" for case in run.cases)
    if confirmed:
        seen["CANDIDATES"] = f"{counted(confirmed, 'confirmed case')} in the dry run."
    return [Finding(key, STATES[key], text) for key, text in seen.items()]


def _idle_throughout(run: RunData) -> dict[int, int]:
    """Layer id -> experts below IDLE fair shares in both the first and the last window; layers with none left out."""
    ends = [run.picked[0], run.picked[-1]]
    if len(run.picked) < 2 or any(window.step not in run.frames for window in ends):
        return {}
    idle: list[dict[int, Array]] = []
    for window in ends:
        enough = {layer.index for layer in window.layers if layer.sufficient}
        relative_LE, ids = relative_load(run, window.step)
        idle.append({layer: row < IDLE for layer, row in zip(ids, relative_LE, strict=True) if layer in enough})
    first, last = idle
    shared = [layer for layer in first if layer in last and first[layer].shape == last[layer].shape]
    counts = {layer: int((first[layer] & last[layer]).sum()) for layer in shared}
    return {layer: count for layer, count in counts.items() if count}


def _governing(run: RunData, seen: dict[str, str]) -> None:
    if run.splits:
        step, copies, layers = run.splits[-1]
        seen["REVIVED"] = f"At step {step}, {counted(copies, 'expert')} in {counted(layers, 'layer')} became copies."
    acted = [step for step, now in run.governing.items() if now.acting]
    biased = _is_biased(run)
    if acted or biased:
        parts = [f"a lens was open in {counted(len(acted), 'window')}"] if acted else []
        parts += ["a routing bias was in force at the end"] if biased else []
        seen["GOVERNED"] = f"In this run {' and '.join(parts)}."
    else:
        why = sum((now.reasons for now in run.governing.values()), Counter[str]())
        usual = f": {REASONS.get(why.most_common(1)[0][0], why.most_common(1)[0][0])}" if why else ""
        seen["OBSERVED_ONLY"] = f"Neither a lens nor a bias acted in the windows recorded{usual}."
    if run.governing:
        last = run.governing[max(run.governing)]
        for reason, key in (("harm_backoff", "HARM_BACKOFF"), ("lens_unfit", "LENS_UNFIT")):
            if last.reasons.get(reason):
                seen[key] = f"At the last evaluation: {counted(last.reasons[reason], 'layer')}."


def _is_biased(run: RunData) -> bool:
    last = run.frames.get(run.windows[-1].step)
    beta_LE = None if last is None else last.arrays.get("beta")
    own = beta_LE is not None and bool((abs(beta_LE[beta_LE == beta_LE]) > 0).any())
    beta = run.config.get("beta")
    return own or (isinstance(beta, dict) and beta.get("law") == "balance")


def _numbers(run: RunData) -> list[tuple[str, str, str]]:
    if not run.windows:
        return []
    last = run.windows[-1]
    dead = sum(int(layer.get("dead_experts") or 0) for layer in last.layers)
    experts = sum(layer.num_choices or 0 for layer in last.layers)
    worst = lowest(last.layers)
    high = max(
        (layer for layer in last.layers if layer.violation_fraction is not None),
        key=lambda layer: layer.violation_fraction or 0.0,
        default=None,
    )
    neff = "-" if worst is None else f"{100 * (worst.neff_fraction or 0):.0f} %"
    ceiling = "-" if high is None else f"{100 * (high.violation_fraction or 0):.0f} %"
    return [
        ("dead experts", str(dead), f"of {experts}"),
        ("fewest effective experts", neff, "" if worst is None else f"layer {worst.layer_id}"),
        ("imbalance of its maximum", ceiling, "" if high is None else f"layer {high.layer_id}"),
        ("alerts in force", str(len(last.active)), f"at step {last.step}"),
    ]


def lowest(layers: list[LayerView]) -> LayerView | None:
    """The layer with the smallest Neff/E."""
    known = [layer for layer in layers if layer.neff_fraction is not None]
    return min(known, key=lambda layer: layer.neff_fraction or 0.0, default=None)


def counted(number: int, noun: str) -> str:
    """``1 window``, ``3 windows``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: list[str], most: int = 4) -> str:
    """``a, b and c``; of many names the first ones and how many more."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "none"
