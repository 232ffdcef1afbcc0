"""What is known about the experts of one layer, and how it is put together from the layer's routing events."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chronomoe_hf.errors import EvidenceError
from chronomoe_hf.lifecycle.evidence.spec import LayerSpec, Scores, score_list

READINGS = ("phi_fast", "phi_mid", "phi_slow", "total_tokens_seen", "router_drift")


@dataclass(frozen=True, kw_only=True)
class LayerEvidence:
    """What is known about the experts of one layer; every vector has one entry per expert, None = no evidence.

    Args:
        spec: the layer.
        counts: assignments over the windows read.
        rows: expert outputs read for it (evidence from a sample says so here).
        contribution: sum over its tokens of gate * |output|, estimated over all tokens.
        saliency: mean over its tokens of gate * |output| (REAP, arXiv 2510.13999).
        mean_norm: mean over its tokens of |output| (MAN, arXiv 2606.15716).
        gate_sum: sum of its gates, estimated over all tokens.
        fisher: sum over its tokens of (gate * dL/dgate)^2; opt-in, see :class:`~chronomoe_hf.lifecycle.FisherSums`.
        max_norm: largest |output| of a token; from :func:`~chronomoe_hf.lifecycle.calibrate` only.
        phi_fast, phi_mid, phi_slow: phase coherence, newest reading.
        total_tokens_seen: assignments since the run began, newest reading.
        router_drift: ``|W_e - W_e(start)| / |W_e(start)|`` of its row of the router's weight, newest reading; opt-in,
            see ``LifecycleConfig(router_drift=True)``.
    """

    spec: LayerSpec
    counts: tuple[int, ...]
    rows: Scores | None = None
    contribution: Scores | None = None
    saliency: Scores | None = None
    mean_norm: Scores | None = None
    gate_sum: Scores | None = None
    fisher: Scores | None = None
    max_norm: Scores | None = None
    phi_fast: Scores | None = None
    phi_mid: Scores | None = None
    phi_slow: Scores | None = None
    total_tokens_seen: Scores | None = None
    router_drift: Scores | None = None

    def __post_init__(self) -> None:
        num, where = self.spec.num_experts, f"layer {self.spec.layer_id} ({self.spec.name})"
        ok = len(self.counts) == num and all(type(count) is int and count >= 0 for count in self.counts)
        if not ok:
            raise EvidenceError(f"{where}: counts must be {num} whole numbers >= 0, got {self.counts!r}")
        for name in VECTORS:
            value = getattr(self, name)
            if value is not None:
                score_list(value, num, f"{where}: {name}", EvidenceError)

    @property
    def shares(self) -> Scores:
        """Share of the assignments per expert; None where nothing was routed."""
        total = sum(self.counts)
        return tuple(count / total if total else None for count in self.counts)


VECTORS = tuple(item.name for item in dataclasses.fields(LayerEvidence) if item.name not in ("spec", "counts"))
FIELDS = ("spec", "counts", *VECTORS)


def layer_from_events(spec: LayerSpec, events: list[dict[str, Any]]) -> LayerEvidence:
    """What the routing events of a layer, oldest first, say about its experts: sums add up, readings are the newest.

    Raises:
        EvidenceError: an event of another number of experts.
    """
    num = spec.num_experts
    rows = [event["expert_token_counts"] for event in events]
    for values in rows:
        if len(values) != num:
            raise EvidenceError(
                f"layer {spec.layer_id} ({spec.name}): {len(values)} counts for {num} experts; the records are of "
                "another model than the manifest"
            )
    counts = tuple(sum(int(values[expert]) for values in rows) for expert in range(num))
    tokens = [_tokens_of(event) for event in events]
    fields: dict[str, Scores | None] = {
        "rows": _merge(events, "phi_rows", num, sum),
        "contribution": _merge(events, "contribution", num, sum),
        "saliency": _mean(events, "saliency", tokens, num),
        "mean_norm": _mean(events, "mean_norm", tokens, num),
        "fisher": _merge(events, "fisher", num, sum),
        "max_norm": _merge(events, "max_norm", num, max),
    }
    read = [event for event in events if event.get("contribution") is not None]
    if all(event.get("gate_sum") is not None for event in read):  # older records lack it: a part is no sum of all
        fields["gate_sum"] = _merge(read, "gate_sum", num, sum)
    for name in READINGS:
        fields[name] = _merge(events, name, num, lambda values: values[-1])
    return LayerEvidence(spec=spec, counts=counts, **fields)


def _merge(events: list[dict[str, Any]], name: str, num: int, reduce: Callable[[list[float]], float]) -> Scores | None:
    """`reduce` over the events that carry `name`, expert by expert; None where none does."""
    rows = [event[name] for event in events if event.get(name) is not None]
    if not rows:
        return None
    known = [[float(row[expert]) for row in rows if row[expert] is not None] for expert in range(num)]
    return tuple(float(reduce(values)) if values else None for values in known)


def _tokens_of(event: dict[str, Any]) -> list[float | None]:
    """Tokens that the means of an event are over, expert by expert, as they were estimated from what was read."""
    counts = event["expert_token_counts"]
    sums, means = event.get("contribution"), event.get("saliency")
    if sums is None or means is None:
        return [None] * len(counts)
    each = zip(sums, means, counts, strict=True)  # a mean of 0 does not say over how many
    return [None if a is None or b is None else float(a) / float(b) if b else float(num) for a, b, num in each]


def _mean(events: list[dict[str, Any]], name: str, tokens: list[list[float | None]], num: int) -> Scores | None:
    """Mean over the events that carry `name`, weighted by their `tokens`, expert by expert; None where none does."""
    rows = [(event[name], own) for event, own in zip(events, tokens, strict=True) if event.get(name) is not None]
    if not rows:
        return None
    means: list[float | None] = []
    for expert in range(num):
        pairs = [
            (float(row[expert]), weight) for row, own in rows if (weight := own[expert]) and row[expert] is not None
        ]
        total = sum(weight for _, weight in pairs)
        means.append(sum(value * weight for value, weight in pairs) / total if total else None)
    return tuple(means)
