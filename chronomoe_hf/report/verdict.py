"""The verdict of a run: which rows of the rule table hold, with the numbers of this run.

A run is judged by what changed since its baseline. A level at which the model came is said, and asks for nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chronomoe_hf import metrics
from chronomoe_hf.config import AlertConfig, LifecycleConfig
from chronomoe_hf.report.data import RunData, load_run, profile_counts, relative_load
from chronomoe_hf.report.judged import (
    busier,
    judged_layers,
    mean_change,
    mean_neff,
    measured,
    named,
    neff_change,
    numbers_strip,
    silent_experts,
)
from chronomoe_hf.report.rules import ALERTS, LEVELS, REASONS, STATES, Level, Rule
from chronomoe_hf.report.words import counted, listed, percent, points
from chronomoe_hf.telemetry.alerts import LEVELS as LEVEL_ALERTS
from chronomoe_hf.telemetry.alerts import PRE_COLLAPSE
from chronomoe_hf.telemetry.arrays import Array
from chronomoe_hf.telemetry.baseline import MOVED
from chronomoe_hf.telemetry.events import RECORD_SCHEMA
from chronomoe_hf.telemetry.views import LayerView

NEAR_CEILING = 0.75  # of the largest possible violation E/k - 1
IDLE = LifecycleConfig().revive.idle  # fair shares: what `revive` calls idle
# Share of a layer's tokens that a plain server routes otherwise: said above the first, red above the second.
UNFOLDED_SAID, UNFOLDED_RED = 0.01, 0.10
VERDICT_SCHEMA = 1
MACHINE_LEVELS: dict[Level, Literal["healthy", "watch", "act"]] = {"fine": "healthy", "watch": "watch", "act": "act"}


@dataclass(frozen=True)
class Finding:
    """One row that holds.

    Attributes:
        key: in the rule table.
        rule: the row.
        seen: the numbers of this run, as a sentence.
        layers: ids of the layers that it is about; empty for the whole run.
        since: optimizer step at which it began, where known.
        level: how urgent it is here, where that differs from the row's own level.
        experts: layer id -> ids of the experts that it is about, all of them; empty where it is about no single ones.
    """

    key: str
    rule: Rule
    seen: str
    layers: tuple[str, ...] = ()
    since: int | None = None
    override: Level | None = None
    experts: dict[str, list[int]] = field(default_factory=dict)

    @property
    def level(self) -> Level:
        """How urgent it is."""
        return self.override or self.rule.level


@dataclass(frozen=True)
class Verdict:
    """What to say first.

    Attributes:
        level: the worst of the findings; where a model is served sets no more than ``"watch"``.
        sentence: in words.
        findings: worst first.
        numbers: ``(name, value, detail)`` of the strip.
        measured: the same as plain numbers by name, for machines.
    """

    level: Level
    sentence: str
    findings: list[Finding]
    numbers: list[tuple[str, str, str]]
    measured: dict[str, float | int | None]

    @property
    def advice(self) -> tuple[str, str]:
        """What to do next, and the setting for it: of the worst finding; nothing for a healthy run."""
        worst = self.findings[0]
        return ("Nothing needs doing.", "") if worst.level == "fine" else (worst.rule.advice, worst.rule.config)

    def to_record(self, report: str | None = None) -> dict[str, Any]:
        """Strict-JSON dictionary for machines.

        Args:
            report: path of the page that was written, if one was.
        """
        text, config = self.advice
        return {
            "schema": VERDICT_SCHEMA,
            "level": MACHINE_LEVELS[self.level],
            "sentence": self.sentence,
            "findings": [
                {
                    "code": finding.key,
                    "level": MACHINE_LEVELS[finding.level],
                    "layers": [int(layer) if layer.isdigit() else layer for layer in finding.layers],
                    "since": finding.since,
                    "seen": finding.seen,
                    "experts": finding.experts,
                }
                for finding in self.findings
            ],
            "numbers": self.measured,
            "advice": {"text": text, "config": config or None},
            "report": report,
        }


def judge_directory(run_dir: str | Path, run: str | None = None) -> Verdict:
    """The verdict on a run directory; see :func:`judge`.

    Raises:
        TelemetryError: there are no records, or no such run.
    """
    return judge(load_run(run_dir, run))


def judge(run: RunData) -> Verdict:
    """The verdict on a run, or on a profile."""
    if run.profile:
        return _of_profile(run)
    findings = [*_alerts(run), *_states(run)]
    # Nothing is lost yet, and no run needs stopping for it: where a model is served sets no more than "watch".
    serving = [finding for finding in findings if finding.key == "UNFOLDED"]
    held = {"watch" if finding in serving and finding.level == "act" else finding.level for finding in findings}
    level: Level = next((level for level in LEVELS if level in held), "fine")
    if level == "fine":
        findings.insert(0, Finding("HEALTHY", STATES["HEALTHY"], STATES["HEALTHY"].meaning))
    findings.sort(key=lambda finding: (LEVELS.index(finding.level), finding in serving))
    worst = [finding for finding in findings if finding.level == level or (level == "watch" and finding.level == "act")]
    titles = "; ".join(dict.fromkeys(finding.rule.title for finding in worst))
    sentence = _healthy(run) if level == "fine" else f"{'Act now' if level == 'act' else 'Worth watching'}: {titles}."
    sentence += "".join(f" {finding.seen}" for finding in serving if finding.level == "act")
    return Verdict(level, sentence, findings, numbers_strip(run), measured(run))


def _healthy(run: RunData) -> str:
    used, change = mean_neff(judged_layers(run)), mean_change(run)
    if used is None:
        return "Healthy: no layer got worse and no expert died."
    if change is None:
        return f"Healthy: this data uses {percent(used)} of the experts of this model, and no alert is in force."
    moved = "training has not changed that" if abs(change) < MOVED / 2 else f"{points(change)} since the baseline"
    return f"Healthy: this data uses {percent(used)} of the experts of this model; {moved}."


# ---- alerts ----------------------------------------------------------------------------------------------------------


def _alerts(run: RunData) -> list[Finding]:
    """One finding a kind that is in force; levels at which the model came are one neutral finding together."""
    layers = {layer.layer_id: layer for layer in judged_layers(run)}
    by_kind: dict[str, list[str]] = {}
    since: dict[str, int] = {}
    came: dict[str, None] = {}
    for alert in run.windows[-1].active if run.windows else []:
        if alert.kind in LEVEL_ALERTS and not _moved(run, alert.since, layers.get(alert.layer_id or "")):
            came[alert.layer_id or ""] = None
            continue
        by_kind.setdefault(alert.kind, []).append(alert.where)
        if alert.step is not None:
            since[alert.kind] = min(alert.step, since.get(alert.kind, alert.step))
    unknown = Rule("watch", "an alert of another version", "", "", "Install the chronomoe_hf that wrote the records.")
    findings = [
        Finding(
            kind,
            ALERTS.get(kind, unknown),
            f"{kind} is in force in {_places(where)}" + (f" since step {since[kind]}." if kind in since else "."),
            tuple(name.removeprefix("layer ") for name in where if name != "run"),
            since.get(kind),
        )
        for kind, where in by_kind.items()
    ]
    if came:
        findings.append(_as_it_came(run, [layers[name] for name in came if name in layers]))
    return findings


def _places(where: list[str]) -> str:
    return listed(["the run" if name == "run" else name for name in where])


def _moved(run: RunData, since: str | None, layer: LayerView | None) -> bool:
    """Whether a level alert is about a movement. Older records do not say: then the first window is the measure."""
    if since is not None:
        return since == "got_worse"
    change = None if layer is None else neff_change(run, layer)
    return change is None or change < -MOVED


def _as_it_came(run: RunData, layers: list[LayerView]) -> Finding:
    names = [f"layer {layer.layer_id}" for layer in layers]
    used = mean_neff(layers)
    lead = "Part of the experts does the work"
    if used is not None:
        lead = f"This data uses {percent(used)} of the experts of {'these layers' if len(layers) > 1 else 'this layer'}"
    known = [change for layer in layers if (change := neff_change(run, layer)) is not None]
    mean = sum(known) / len(known) if known else None
    moved = "" if mean is None else f" (changed by {points(mean)})"
    seen = f"{lead}; training has not changed that{moved}: {listed(names)}."
    return Finding("AS_IT_CAME", STATES["AS_IT_CAME"], seen, tuple(layer.layer_id for layer in layers))


# ---- states ----------------------------------------------------------------------------------------------------------


def _states(run: RunData) -> list[Finding]:
    found: list[Finding] = []

    def add(
        key: str,
        seen: str,
        layers: Iterable[str] = (),
        override: Level | None = None,
        experts: dict[str, list[int]] | None = None,
    ) -> None:
        found.append(Finding(key, STATES[key], seen, tuple(layers), override=override, experts=experts or {}))

    if run.broken:
        add("BROKEN_RECORDS", f"{counted(run.broken, 'line')} could not be read.")
    if run.newer:
        windows = counted(len(run.newer), "window")
        add("NEWER_RECORDS", f"{windows} of record schema {max(run.newer)}; this version knows up to {RECORD_SCHEMA}.")
    if not run.windows:
        add("EMPTY", "No window has been closed.")
        return found
    if len(run.windows) == 1:
        add("ONE_WINDOW", f"One window, of step {run.windows[0].step}.")
    layers = judged_layers(run)
    thin = [layer.layer_id for layer in layers if not layer.sufficient and layer.observed]
    if thin:
        where = listed([f"layer {i}" for i in thin])
        add("INSUFFICIENT", f"No window was large enough to judge {where}.", thin)
    _silence(layers, silent_experts(run), add)
    key = "IDLE_ADAPTER" if run.manifest.get("adapter") is True else "IDLE"
    idle = {} if run.splits else _idle_throughout(run)
    if idle:
        where = listed([named(i, experts) for i, experts in idle.items()])
        experts = {str(i): experts for i, experts in idle.items()}
        add(key, f"{counted(sum(map(len, idle.values())), 'expert')}: {where}.", experts, None, experts)
    near = [layer for layer in layers if (layer.violation_fraction or 0.0) > NEAR_CEILING and busier(run, layer)]
    if near:
        where = listed([f"layer {layer.layer_id}" for layer in near])
        add("CEILING", f"At the end: {where}.", [layer.layer_id for layer in near])
    gone = [alert for alert in run.alerts if alert.state == "cleared" and alert.since != "as_it_came"]
    if gone:
        kinds = listed(list(dict.fromkeys(f"{alert.kind} ({alert.where})" for alert in gone)))
        add("CLEARED", f"Raised and cleared again: {kinds}, the last at step {max(a.step or 0 for a in gone)}.")
    _governing(run, add)
    _unfolded(run, layers, add)
    confirmed = sum(case["state"] == "confirmed" for case in run.cases)
    if confirmed:
        add("CANDIDATES", f"{counted(confirmed, 'confirmed case')} in the dry run.")
    return found


def _silence(layers: list[LayerView], silent: dict[int, list[int]], add: Any) -> None:
    died = {layer.layer_id: list(layer.died) for layer in layers if layer.died}
    if died:
        where = listed([named(layer_id, ids) for layer_id, ids in died.items()])
        add("DIED", f"{counted(sum(map(len, died.values())), 'expert')}: {where}.", died, None, died)
    counts = {layer.layer_id: int(layer.get("dead_experts") or 0) - len(layer.died) for layer in layers}
    dead = {layer_id: count for layer_id, count in counts.items() if count > 0}
    if dead:
        ids = {each.layer_id: [e for e in silent.get(each.index, ()) if e not in each.died] for each in layers}
        experts = {layer_id: ids[layer_id] for layer_id, count in dead.items() if len(ids[layer_id]) == count}
        each = [named(i, experts[i]) if i in experts else f"layer {i} ({n})" for i, n in dead.items()]
        seen = f"{counted(sum(dead.values()), 'expert')} without a token in the last window: {listed(each)}."
        add("DEAD", seen, dead, None, experts)


def _idle_throughout(run: RunData) -> dict[int, list[int]]:
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
    both = {layer: [int(expert) for expert in (first[layer] & last[layer]).nonzero()[0]] for layer in shared}
    return {layer: experts for layer, experts in both.items() if experts}


def _governing(run: RunData, add: Any) -> None:
    if run.splits:
        step, copies, layers = run.splits[-1]
        add("REVIVED", f"At step {step}, {counted(copies, 'expert')} in {counted(layers, 'layer')} became copies.")
    acted = [step for step, now in run.governing.items() if now.acting]
    biased = _is_biased(run)
    if acted or biased:
        parts = [f"a lens was open in {counted(len(acted), 'window')}"] if acted else []
        parts += ["a routing bias was in force at the end"] if biased else []
        add("GOVERNED", f"In this run {' and '.join(parts)}.")
    else:
        why = sum((now.reasons for now in run.governing.values()), Counter[str]())
        usual = f": {REASONS.get(why.most_common(1)[0][0], why.most_common(1)[0][0])}" if why else ""
        add("OBSERVED_ONLY", f"Neither a lens nor a bias acted in the windows recorded{usual}.")
    if run.governing:
        last = run.governing[max(run.governing)]
        for reason, key in (("harm_backoff", "HARM_BACKOFF"), ("lens_unfit", "LENS_UNFIT")):
            if last.reasons.get(reason):
                add(key, f"At the last evaluation: {counted(last.reasons[reason], 'layer')}.")


def _unfolded(run: RunData, layers: list[LayerView], add: Any) -> None:
    """How many tokens a plain server would route otherwise, where the run's bias cannot be written into weights."""
    rows = run.manifest.get("layers")
    folds = {row.get("layer_id"): row.get("beta_folds") for row in rows if isinstance(row, dict)} if rows else {}
    lost = [
        (share, layer)
        for layer in layers
        if (share := layer.get("topk_disagreement")) is not None
        and share > UNFOLDED_SAID
        and folds.get(layer.index) is False
    ]
    if lost:
        worst, layer = max(lost, key=lambda pair: pair[0])
        still = "" if run.learned else " At a learning rate of 0 no weight has learned under that routing."
        add(
            "UNFOLDED",
            f"A plain server would route up to {percent(worst)} of the tokens of a layer to other experts "
            f"(layer {layer.layer_id}), and more than 1 % in {counted(len(lost), 'layer')}.{still}",
            [each.layer_id for _, each in lost],
            "act" if worst > UNFOLDED_RED and run.learned else "fine",
        )


def _is_biased(run: RunData) -> bool:
    last = run.frames.get(run.windows[-1].step)
    beta_LE = None if last is None else last.arrays.get("beta")
    own = beta_LE is not None and bool((abs(beta_LE[beta_LE == beta_LE]) > 0).any())
    beta = run.config.get("beta")
    return own or (isinstance(beta, dict) and beta.get("law") == "balance")


# ---- profiles --------------------------------------------------------------------------------------------------------


def _of_profile(run: RunData) -> Verdict:
    """A profile: sums over all its text, and nothing to alert about."""
    counts, table = profile_counts(run), run.profile.get("layers")
    tops = [row.get("top_k") if isinstance(row, dict) else None for row in table] if isinstance(table, list) else []
    loads = [
        metrics.load_metrics(row, top_k if isinstance(top_k, int) and 0 < top_k <= len(row) else 1)
        for row, top_k in zip(counts, [*tops, *[None] * len(counts)], strict=False)
    ]
    used = [load.n_effective / len(row) for load, row in zip(loads, counts, strict=True) if load.n_effective]
    dead = sum(load.dead_experts or 0 for load in loads)
    experts = sum(map(len, counts))
    mean = sum(used) / len(used) if used else None
    tokens = run.profile.get("tokens")
    domains = run.profile.get("domains")
    numbers: dict[str, float | int | None] = {
        "layers": len(counts),
        "experts": experts,
        "dead_experts": dead,
        "neff_mean": mean,
        "neff_lowest": min(used, default=None),
        "tokens": tokens if isinstance(tokens, int) else None,
        "domains": len(domains) if isinstance(domains, list) else 0,
    }
    read = f"{tokens:,} tokens" if isinstance(tokens, int) else "its text"
    sentence = f"A profile: over {read}, this model uses {percent(mean)} of its experts; {dead} of {experts} got none."
    findings = [Finding("PROFILE", STATES["PROFILE"], sentence)]
    none = {str(at): [expert for expert, count in enumerate(row) if not count] for at, row in enumerate(counts)}
    silent = {layer_id: experts for layer_id, experts in none.items() if experts}
    if silent:
        seen = f"No token of this text reached {listed([named(at, experts) for at, experts in silent.items()])}."
        findings.append(Finding("DEAD", STATES["DEAD"], seen, tuple(silent), experts=silent))
    low = AlertConfig().neff_floor
    below = [at for at, load in enumerate(loads) if load.n_effective and load.n_effective < low * len(counts[at])]
    if below:
        where = listed([f"layer {at}" for at in below])
        seen = f"Below {percent(low)} of the experts in effective use on this text ({PRE_COLLAPSE} in a run): {where}."
        findings.append(Finding("AS_IT_CAME", STATES["AS_IT_CAME"], seen, tuple(map(str, below))))
    strip = [
        ("experts in effective use", percent(mean), "mean over layers, sums over the profile"),
        ("fewest effective experts", percent(min(used, default=None)), ""),
        ("experts without a token", str(dead), f"of {experts}"),
    ]
    return Verdict("fine", sentence, findings, strip, numbers)
