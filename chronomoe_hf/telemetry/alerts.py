"""Alerts: the conditions, and the history that turns them into edges (raised, cleared).

The history is plain JSON data, so that a checkpoint can carry it and a resumed run neither repeats nor forgets
an alert. Conditions on how evenly experts are used need evidence: a window with too few assignments leaves
their streaks where they were.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from chronomoe_hf import metrics
from chronomoe_hf.config import AlertConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.telemetry.baseline import Reference
from chronomoe_hf.telemetry.layers import LayerSnapshot

PRE_COLLAPSE = "PRE_COLLAPSE"
COLLAPSE_CONFIRMED = "COLLAPSE_CONFIRMED"
DRIFT = "DRIFT"
NOT_OBSERVED = "NOT_OBSERVED"
UNOBSERVED = "not observed: "  # begins the note of an event that says why its layer was not called
NON_FINITE = "NON_FINITE"
RESUME_MISMATCH = "RESUME_MISMATCH"
RECORDING_FAILED = "RECORDING_FAILED"
NOT_RECORDED = "not recorded: "  # begins the note of an event that says why recording is off in its layer
LEVELS = (PRE_COLLAPSE, COLLAPSE_CONFIRMED)  # compare a window with a fixed level, so they say which of the two it is
Since = Literal["as_it_came", "got_worse"]
ROUTING_MISMATCH = "ROUTING_MISMATCH"
REPLAY_UNCOVERED = "REPLAY_UNCOVERED"
REPLAY_INVALID = "REPLAY_INVALID"
REPLAY_IDLE = "REPLAY_IDLE"
KINDS = (
    PRE_COLLAPSE,
    COLLAPSE_CONFIRMED,
    DRIFT,
    NOT_OBSERVED,
    NON_FINITE,
    RESUME_MISMATCH,
    RECORDING_FAILED,
    ROUTING_MISMATCH,
    REPLAY_UNCOVERED,
    REPLAY_INVALID,
    REPLAY_IDLE,
)


@dataclass(frozen=True)
class Alert:
    """One edge of one alert.

    Attributes:
        kind: one of :data:`KINDS`.
        layer_id: the MoE layer, None where the alert is about the whole model.
        state: ``"raised"``, ``"cleared"``, or ``"worsened"``: it was in force as the model came, and got worse.
        step: optimizer step of the edge.
        detail: the numbers behind it, in words.
        since: of PRE_COLLAPSE and COLLAPSE_CONFIRMED: ``"as_it_came"`` (the level held at the run's baseline, or the
            layer has not moved from there beyond chance) or ``"got_worse"``. None for the other kinds, and for an
            alert of an older version.
    """

    kind: str
    layer_id: int | None
    state: Literal["raised", "cleared", "worsened"]
    step: int
    detail: str = ""
    since: Since | None = None

    def __str__(self) -> str:
        where = "model" if self.layer_id is None else f"layer {self.layer_id}"
        came = "" if self.since is None else f", {self.since.replace('_', ' ')}"
        return f"{self.kind} {self.state} ({where}, step {self.step}{came})" + (
            f": {self.detail}" if self.detail else ""
        )

    @property
    def urgent(self) -> bool:
        """Whether it asks for action: everything that is in force but a level at which the model came."""
        return self.state != "cleared" and self.since != "as_it_came"

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary."""
        return {
            "schema": 1,
            "step": self.step,
            "kind": self.kind,
            "layer_id": self.layer_id,
            "state": self.state,
            "since": self.since,
            "detail": self.detail,
        }


class AlertHistory:
    """Streaks, active alerts and the baseline of every layer, between snapshots.

    Args:
        data: a mapping to keep the state in, changed in place (an empty one starts fresh); by default a new one.
    """

    def __init__(self, data: MutableMapping[str, Any] | None = None) -> None:
        self.data: MutableMapping[str, Any] = {} if data is None else data
        for name, empty in _empty().items():
            value = self.data.setdefault(name, empty)
            if not isinstance(value, type(empty)):
                raise ConfigError(
                    f"alert history: {name!r} must be {type(empty).__name__}, got {type(value).__name__}; "
                    "pass an empty dict to start fresh"
                )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data; a copy."""
        return {name: copy.deepcopy(self.data[name]) for name in _empty()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the state by one of :meth:`state_dict`.

        Raises:
            ConfigError: not an alert history.
        """
        fresh = AlertHistory(copy.deepcopy(dict(state)))
        for name in _empty():
            self.data[name] = fresh.data[name]

    def copy(self) -> AlertHistory:
        """An independent history, for a look at an open window that must not count as a snapshot."""
        return AlertHistory(self.state_dict())

    @property
    def active(self) -> list[Alert]:
        """The alerts in force, as they were raised, oldest first."""
        items = sorted(self.data["active"], key=lambda item: item["step"])
        return [
            Alert(item["kind"], item["layer_id"], "raised", item["step"], item["detail"], item.get("since"))
            for item in items
        ]

    @property
    def reference(self) -> Reference:
        """The baseline of every layer."""
        return Reference(self.data["reference"])

    def baseline(self, layer_id: int) -> float | None:
        """The layer's n_effective at the baseline, None while that is not settled."""
        entry = self.reference.entry(layer_id)
        return None if entry is None else metrics.effective_experts(entry["counts"])

    def restart(self) -> None:
        """The layers have other experts to choose from than before: baselines and streaks start anew."""
        self.reference.restart()
        self.data["streak"] = {}

    def observe(
        self,
        kind: str,
        layer_id: int | None,
        step: int,
        *,
        holds: bool,
        after: int = 1,
        detail: str = "",
        worse: bool | None = None,
    ) -> Alert | None:
        """Count one snapshot in which a condition held or not; return the edge it makes, if any.

        Args:
            kind: one of :data:`KINDS`.
            layer_id: the MoE layer or None for the whole model.
            step: optimizer step.
            holds: whether the condition holds now.
            after: consecutive snapshots before the alert is raised; one without the condition clears it.
            detail: the numbers behind it.
            worse: whether the layer is worse than at the baseline; None for a condition that is no level.
        """
        if kind not in KINDS:
            raise ConfigError(f"no alert {kind!r}; known: {', '.join(KINDS)}")
        key = f"{kind}:{'model' if layer_id is None else layer_id}"
        same = [item for item in self.data["active"] if (item["kind"], item["layer_id"]) == (kind, layer_id)]
        active = same[0] if same else None
        since = None if worse is None else self._since(key, active, worse, after)
        if not holds:
            self.data["streak"].pop(key, None)
            if active is None:
                return None
            self.data["active"].remove(active)
            return Alert(kind, layer_id, "cleared", step, detail, active.get("since"))
        streak = self.data["streak"].get(key, 0) + 1
        self.data["streak"][key] = streak
        entry = {"kind": kind, "layer_id": layer_id, "step": step, "detail": detail, "since": since}
        if active is not None:
            turned = since == "got_worse" and active.get("since") == "as_it_came"
            active.update(entry if turned else {"since": since})
            return Alert(kind, layer_id, "worsened", step, detail, since) if turned else None
        if streak < after:
            return None
        self.data["active"].append(entry)
        return Alert(kind, layer_id, "raised", step, detail, since)

    def _since(self, key: str, active: dict[str, Any] | None, worse: bool, after: int) -> Since:
        """`after` windows in a row that are worse than the baseline make ``got_worse``; one that is not ends it."""
        key = f"worse:{key}"
        streak = self.data["streak"].get(key, 0) + 1 if worse else 0
        if streak:
            self.data["streak"][key] = streak
        else:
            self.data["streak"].pop(key, None)
        before = active is not None and active.get("since") == "got_worse"
        return "got_worse" if worse and (before or streak >= after) else "as_it_came"


def _empty() -> dict[str, Any]:
    return {"streak": {}, "active": [], "baseline": {}, "governed": False, "reference": {}}


def evaluate(
    layers: list[LayerSnapshot],
    missing: list[int],
    step: int,
    history: AlertHistory,
    config: AlertConfig,
    governed: bool,
    training: bool = True,
) -> list[Alert]:
    """Edges of one snapshot, in layer order.

    Args:
        layers: the layers of the snapshot.
        missing: layer ids without any event.
        step: optimizer step.
        history: changed in place.
        config: thresholds.
        governed: beta or a lens has acted: baselines stop collecting, for good.
        training: compare with the run's baseline. An evaluation and a profile have none.
    """
    history.data["governed"] = bool(history.data["governed"] or governed)
    edges: list[Alert | None] = []
    for layer_id in missing:
        edges.append(history.observe(NOT_OBSERVED, layer_id, step, holds=True, detail="no event of this layer"))
    for layer in layers:
        edges += _layer_edges(layer, step, history, config, training)
    return sorted((edge for edge in edges if edge is not None), key=lambda edge: edge.layer_id or 0)


def _cause(layer: LayerSnapshot) -> str:
    """Why a layer was not observed, where its events say so."""
    known = [note.removeprefix(UNOBSERVED) for note in layer.notes if note.startswith(UNOBSERVED)]
    return ": ".join(["the router was never called in the window", *known[:1]])


def _layer_edges(
    layer: LayerSnapshot, step: int, history: AlertHistory, config: AlertConfig, training: bool
) -> list[Alert | None]:
    """Edges of one layer."""
    bad = layer.nonfinite_tokens
    detail = f"{bad} tokens with NaN or infinite router logits, excluded from every statistic" if bad else ""
    unseen = _cause(layer) if not layer.observed else ""
    failed = [note.removeprefix(NOT_RECORDED) for note in layer.notes if note.startswith(NOT_RECORDED)]
    edges = [
        history.observe(NOT_OBSERVED, layer.layer_id, step, holds=not layer.observed, detail=unseen),
        history.observe(NON_FINITE, layer.layer_id, step, holds=bad > 0, detail=detail),
        history.observe(RECORDING_FAILED, layer.layer_id, step, holds=bool(failed), detail="; ".join(failed)),
    ]
    if training:
        _compare(layer, step, history, config)
    if not layer.sufficient or layer.n_effective is None or layer.top2_share is None or layer.dead_experts is None:
        return edges  # insufficient evidence: no streak moves
    worse = training and (history.reference.concentrated(layer) or bool(layer.died))
    return [*edges, *_level_edges(layer, step, history, config, worse), _drift(layer, step, history, config)]


def _compare(layer: LayerSnapshot, step: int, history: AlertHistory, config: AlertConfig) -> None:
    """Put the window into the baseline while that is collected, and what changed since then into the layer."""
    reference = history.reference
    reference.extend(layer, step, config, history.data["governed"])
    if layer.sufficient:
        reference.watch(layer)
    layer.change, layer.error = reference.changes(layer)
    layer.died = reference.died(layer)


def _level_edges(
    layer: LayerSnapshot, step: int, history: AlertHistory, config: AlertConfig, worse: bool
) -> list[Alert | None]:
    """Edges of the two conditions that compare with a fixed level."""
    assert layer.n_effective is not None and layer.top2_share is not None and layer.dead_experts is not None
    size, neff, top2 = layer.num_choices, layer.n_effective, metrics.relative_top2(layer.top2_share, layer.top_k)
    # Where E is close to k, even balanced routing sits above the threshold: there top-2 says nothing about collapse.
    balanced = metrics.balanced_top2(size, layer.top_k)
    concentrated = top2 > config.top2_pre > balanced
    detail = f"n_effective {neff:.3g} of {size}, top-2 share {top2:.3g} of its ceiling, {layer.dead_experts} dead"
    before = history.baseline(layer.layer_id)
    detail += "" if before is None else f"; n_effective at the baseline {before:.3g}"
    pre = neff < config.neff_floor * size or concentrated
    confirmed = layer.dead_experts >= 1 and top2 > config.top2_confirmed
    return [
        history.observe(
            PRE_COLLAPSE, layer.layer_id, step, holds=pre, after=config.pre_after, detail=detail, worse=worse
        ),
        history.observe(
            COLLAPSE_CONFIRMED,
            layer.layer_id,
            step,
            holds=confirmed,
            after=config.confirmed_after,
            detail=detail,
            worse=worse,
        ),
    ]


def _drift(layer: LayerSnapshot, step: int, history: AlertHistory, config: AlertConfig) -> Alert | None:
    """Edge of DRIFT: below a fraction of the baseline, and beyond the error of both."""
    baseline, neff = history.baseline(layer.layer_id), layer.n_effective
    if baseline is None or neff is None:
        again = "the baseline is collected anew"
        return history.observe(DRIFT, layer.layer_id, step, holds=False, detail=again)
    drifted = neff < config.drift_fraction * baseline and history.reference.concentrated(layer)
    detail = f"n_effective {neff:.3g}, baseline of this run {baseline:.3g}"
    return history.observe(DRIFT, layer.layer_id, step, holds=drifted, after=config.drift_after, detail=detail)
