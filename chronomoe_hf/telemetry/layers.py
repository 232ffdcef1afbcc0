"""LayerSnapshot: one MoE layer over one window, merged from its events.

Shape suffixes: E experts of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chronomoe_hf.errors import ConfigError
from chronomoe_hf.expert_numbers import Merge, merged_by
from chronomoe_hf.metrics import load_metrics
from chronomoe_hf.telemetry.events import RoutingEvent, Vector
from chronomoe_hf.telemetry.values import finite

# Metrics of a layer's counts that pages and tables show, in this order.
LOAD_NUMBERS = (
    "n_effective",
    "top2_share",
    "top2_relative",
    "dead_experts",
    "nearly_dead_count",
    "max_violation",
    "max_violation_ceiling",
    "gini",
    "load_cv",
)
# Scalars of a layer in a snapshot record, in this order.
LAYER_NUMBERS = (
    "token_count",
    "tokens",
    "dropped",
    "nonfinite_tokens",
    "calls",
    "window_steps",
    "entropy",
    *LOAD_NUMBERS,
    "coherence_mean",
    "coherence_min",
    "logit_std",
    "disagreement_js",
    "disagreement_flip",
    "overlap_only",
    "relevance",
    "lens_scale",
    "lens_spread",
    "topk_disagreement",
)
# When events are merged the newest reading of these counts.
_READINGS = (*merged_by("newest"), "logit_std", "relevance", "lens_scale", "lens_spread")


@dataclass(kw_only=True)
class LayerSnapshot:
    """One layer over one window. Fields as in RoutingEvent, and the metrics of its counts (docs/concepts.md, "Load").

    Metrics are None where nothing was counted. Build it from events with :meth:`from_events`; built by hand from
    ``expert_token_counts``, the metrics left out are computed.

    Attributes:
        shares: counts / sum(counts), length E, or None.
        top2_relative: top-2 share over its ceiling min(1, 2/k).
        load_cv: standard deviation over mean of the load.
        coherence_mean: mean of phi_slow over experts, weighted by the window's counts.
        coherence_min: lowest phi_slow of an expert.
        observed: the router was called in the window.
        sufficient: enough assignments per expert to judge the layer; otherwise "insufficient evidence".
        roles: near-duplicate pairs, experts with two roles, basin and free energy (``CoherenceConfig(roles=True)``).
        cut: experts that were cut during the run; metrics are over the others.
        change: of a training window, name of a number -> how much it changed since the run's baseline; empty while
            there is none.
        error: name of a number -> standard error of its change; numbers without one are left out.
        died: experts that worked at the baseline and have had no token for too long since to be chance.
    """

    layer_id: int
    n_experts: int
    top_k: int
    expert_token_counts: list[int]
    layer_name: str = ""
    window_steps: int = 1
    tokens: int | None = None
    dropped: int | None = None
    nonfinite_tokens: int = 0
    calls: int | None = None
    shares: list[float] | None = None
    entropy: float | None = None
    n_effective: float | None = None
    top2_share: float | None = None
    top2_relative: float | None = None
    dead_experts: int | None = None
    nearly_dead_count: int | None = None
    max_violation: float | None = None
    max_violation_ceiling: float | None = None
    gini: float | None = None
    load_cv: float | None = None
    prob_mean: Vector | None = None
    first_choices: Vector | None = None
    phi_fast: Vector | None = None
    phi_mid: Vector | None = None
    phi_slow: Vector | None = None
    phi_rows: Vector | None = None
    contribution: Vector | None = None
    saliency: Vector | None = None
    gate_sum: Vector | None = None
    mean_norm: Vector | None = None
    total_tokens_seen: Vector | None = None
    coherence_mean: float | None = None
    coherence_min: float | None = None
    logit_std: float | None = None
    disagreement_js: float | None = None
    disagreement_flip: float | None = None
    overlap_only: float | None = None
    relevance: float | None = None
    beta: Vector | None = None
    router_drift: Vector | None = None
    lens_scale: float | None = None
    lens_spread: float | None = None
    topk_disagreement: float | None = None
    observed: bool = True
    sufficient: bool = True
    cut: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    roles: dict[str, Any] | None = None
    change: dict[str, float | None] = field(default_factory=dict)
    error: dict[str, float | None] = field(default_factory=dict)
    died: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        total = self.token_count
        if self.shares is None and total:
            self.shares = [count / total for count in self.expert_token_counts]
        if self.max_violation_ceiling is None:
            for name, value in load_metrics(self.expert_token_counts, self.top_k, self.cut)._asdict().items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        if self.coherence_mean is None and self.phi_slow is not None:
            self.coherence_mean, self.coherence_min = _coherence(self.phi_slow, self.expert_token_counts)

    @property
    def token_count(self) -> int:
        """Sum of the counts."""
        return sum(self.expert_token_counts)

    @property
    def num_choices(self) -> int:
        """Experts that a token can be given to: all but those that were cut."""
        return self.n_experts - len(self.cut)

    @classmethod
    def from_events(cls, events: Sequence[RoutingEvent], *, min_window_tokens: int = 0) -> LayerSnapshot:
        """Merge the events of one layer: sums add up, means are weighted, clocks and bias are the newest reading.

        Args:
            events: of one layer, oldest first, at least one.
            min_window_tokens: assignments per expert, on average, for the evidence to be sufficient.

        Raises:
            ConfigError: the events disagree about E or k.
        """
        last = events[-1]
        shapes = {(event.n_experts, event.top_k) for event in events}
        if len(shapes) > 1:
            raise ConfigError(f"layer {last.layer_id}: events with different (n_experts, top_k): {sorted(shapes)}")
        counts = list(last.expert_token_counts)
        if len(events) > 1:
            counts = [sum(each) for each in zip(*(event.expert_token_counts for event in events), strict=True)]
        calls = _sum(event.calls for event in events)
        weights = [float(event.token_count if event.tokens is None else event.tokens) for event in events]
        weighed: dict[Merge, Any] = {
            "sum": None,
            "token mean": [[weight] * last.n_experts for weight in weights],
            "count mean": [event.expert_token_counts for event in events],
        }
        merged: dict[str, Any] = {
            name: _merge(events, name, each) for merge, each in weighed.items() for name in merged_by(merge)
        }
        layer = cls(
            layer_id=last.layer_id,
            layer_name=last.layer_name,
            n_experts=last.n_experts,
            top_k=last.top_k,
            expert_token_counts=counts,
            window_steps=sum(event.window_steps for event in events),
            tokens=_sum(event.tokens for event in events),
            dropped=_sum(event.dropped for event in events),
            nonfinite_tokens=sum(event.nonfinite_tokens for event in events),
            calls=calls,
            disagreement_js=_mean(events, "disagreement_js", weights),
            disagreement_flip=_mean(events, "disagreement_flip", weights),
            overlap_only=_mean(events, "overlap_only", weights),
            topk_disagreement=_mean(events, "topk_disagreement", weights),
            observed=calls is None or calls > 0,
            cut=list(last.cut),
            notes=[note for event in events for note in event.notes],
            **merged,
            **{name: _last(events, name) for name in _READINGS},
            **(last.load_metrics() if len(events) == 1 else {}),
        )
        needed = max(1, min_window_tokens * layer.num_choices)
        layer.sufficient = layer.token_count >= needed
        if not layer.sufficient:
            layer.notes.append(f"insufficient evidence: {layer.token_count} assignments, {needed} needed")
        return layer

    def to_record(self) -> dict[str, Any]:
        """Strict-JSON dictionary of the layer's scalars (per-expert values are in the routing events)."""
        record: dict[str, Any] = {
            "layer_id": self.layer_id,
            "layer_name": self.layer_name,
            "n_experts": self.n_experts,
            "top_k": self.top_k,
            "observed": self.observed,
            "sufficient": self.sufficient,
            **({"cut_experts": len(self.cut)} if self.cut else {}),
        }
        record.update({name: finite(getattr(self, name)) for name in LAYER_NUMBERS})
        record["notes"] = list(self.notes)
        if self.change:
            record["change"] = {name: finite(value) for name, value in self.change.items()}
            record["error"] = {name: finite(value) for name, value in self.error.items()}
            record["died"] = list(self.died)
        if self.roles is not None:
            record["roles"] = self.roles
        return record


def _sum(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _last(events: Sequence[RoutingEvent], name: str) -> Any:
    return next((value for event in reversed(events) if (value := getattr(event, name)) is not None), None)


def _mean(events: Sequence[RoutingEvent], name: str, weights: Sequence[float]) -> float | None:
    """Weighted mean of one number over the events that carry it; unweighted where no weight is left."""
    pairs: list[tuple[float, float]] = []
    for event, weight in zip(events, weights, strict=True):
        value: float | None = getattr(event, name)
        if value is not None and math.isfinite(value):
            pairs.append((value, weight))
    if not pairs:
        return None
    total = sum(weight for _, weight in pairs)
    if total == 0.0:
        return sum(value for value, _ in pairs) / len(pairs)
    return sum(value * weight for value, weight in pairs) / total


def _merge(events: Sequence[RoutingEvent], name: str, weights: Sequence[Sequence[float]] | None) -> Vector | None:
    """Per-expert sum (`weights` None) or weighted mean over the events that carry `name`."""
    rows: list[tuple[Vector, Sequence[float]]] = []
    for index, event in enumerate(events):
        if (row := getattr(event, name)) is not None:
            rows.append((row, [1.0] * event.n_experts if weights is None else weights[index]))
    if len(events) == 1 or not rows:
        return rows[0][0] if rows else None
    merged: Vector = []
    for expert in range(events[0].n_experts):
        known = [(value, weight[expert]) for row, weight in rows if (value := row[expert]) is not None]
        total, summed = sum(weight for _, weight in known), sum(value * weight for value, weight in known)
        empty = not known or total == 0.0
        merged.append(None if empty else summed if weights is None else summed / total)
    return merged


def _coherence(phi_E: Vector, counts: Sequence[int]) -> tuple[float | None, float | None]:
    """Count-weighted mean and minimum of phi over the experts with evidence."""
    phi_E64, count_E = np.array(phi_E, dtype=np.float64), np.array(counts, dtype=np.float64)  # None becomes NaN
    known_E = np.isfinite(phi_E64)
    if not known_E.any():
        return None, None
    phi_E64, count_E = phi_E64[known_E], count_E[known_E]
    total = float(count_E.sum())
    mean = float(phi_E64.mean()) if total == 0.0 else float((phi_E64 * count_E).sum()) / total
    return mean, float(phi_E64.min())
