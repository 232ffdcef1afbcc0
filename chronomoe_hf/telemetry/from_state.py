"""From host arrays to RoutingEvents: what one window's sums mean, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.recording.columns import Row
from chronomoe_hf.telemetry import RoutingEvent
from chronomoe_hf.telemetry.alerts import UNOBSERVED
from chronomoe_hf.wrapping.layer import Layer
from chronomoe_hf.wrapping.unobserved import why_unobserved


def _ratio(above: Any, below: Any) -> list[float | None]:
    return [float(a) / float(b) if b > 0 else None for a, b in zip(above, below, strict=True)]


def layer_events(
    layers: Sequence[Layer],
    row: Row,
    host: Mapping[str, Any],
    *,
    run_id: str,
    attempt: int,
    step: int,
    mode: str,
    window_steps: int,
    config: ChronoConfig,
    lens_spread: Mapping[int, float] | None = None,
) -> list[RoutingEvent]:
    """One RoutingEvent per layer.

    Args:
        layers: wrapped layers, in order.
        row: names the columns of ``host["window"]``.
        host: arrays of ``StepState.host()``; only ``"window"`` for evaluation.
        run_id: of the run.
        attempt: start or resume of the run.
        step: optimizer step at which the window ends.
        mode: ``"TRAIN"`` or ``"EVAL"``.
        window_steps: optimizer steps in the window.
        config: settings in force; they say what was measured.
        lens_spread: of the layers whose router inputs were read in this window's last step.
    """
    others_ran = any(row.meta(window, "calls") > 0 for window in host["window"])
    return [
        RoutingEvent.from_router_output(
            run_id=run_id,
            attempt=attempt,
            step=step,
            mode=mode,  # type: ignore[arg-type]
            layer_id=layer.layer_id,
            layer_name=layer.name,
            n_experts=layer.num_experts,
            top_k=layer.top_k,
            window_steps=window_steps,
            notes=[*layer.notes, *_remarks(row, host["window"][layer.layer_id], layer, config, others_ran)],
            **_window_fields(row, host["window"][layer.layer_id], layer, config),
            **(_state_fields(host, layer, config) if "tokens" in host else {}),
            lens_spread=(lens_spread or {}).get(layer.layer_id),
        )
        for layer in layers
    ]


def window_shares(layers: Sequence[Layer], row: Row, host: Mapping[str, Any]) -> dict[int, list[float]]:
    """Share of the window's assignments per expert, by layer id; layers without an assignment are left out.

    Args:
        layers: wrapped layers, in order.
        row: names the columns of ``host["window"]``.
        host: arrays of ``StepState.host()``.
    """
    shares = {}
    for layer in layers:
        count_E = row.count(host["window"][layer.layer_id])[: layer.num_experts]
        if total := float(count_E.sum()):
            shares[layer.layer_id] = [float(count) / total for count in count_E]
    return shares


def _remarks(row: Row, window: Any, layer: Layer, config: ChronoConfig, others_ran: bool) -> list[str]:
    """What is to be said of this window of the layer."""
    if row.meta(window, "calls") == 0:
        return [UNOBSERVED + why_unobserved(layer, others_ran)]
    return _unread(row, window, layer, config)


def _unread(row: Row, window: Any, layer: Layer, config: ChronoConfig) -> list[str]:
    """Says so where tokens were routed, but no expert output was seen (a kernel replaced the experts' forward)."""
    if not config.coherence.enabled or layer.experts is None or row.count(window).sum() == 0:
        return []
    if row.expert(window, "phi_rows").sum() > 0:
        return []
    return [
        "no expert output was read in this window: something replaced the experts' forward after wrap(), or the "
        "outputs were not finite"
    ]


def _window_fields(row: Row, window: Any, layer: Layer, config: ChronoConfig) -> dict[str, Any]:
    num = layer.num_experts
    tokens = float(row.meta(window, "tokens"))
    compared = float(row.layer(window, "compared"))
    fields: dict[str, Any] = {
        "used_capacity": np.rint(row.count(window)[:num]).astype(np.int64),
        "tokens": round(tokens),
        "dropped": round(float(row.meta(window, "dropped"))),
        "nonfinite_tokens": round(float(row.meta(window, "nonfinite"))),
        "calls": round(float(row.meta(window, "calls"))),
    }
    if tokens > 0:
        fields["prob_mean"] = (row.expert(window, "prob")[:num] / tokens).tolist()
    if config.coherence.enabled and layer.experts is not None:
        contribution = row.expert(window, "contribution")[:num]
        fields["phi_rows"] = np.rint(row.expert(window, "phi_rows")[:num]).astype(np.int64)
        fields["contribution"] = contribution.tolist()
        fields["saliency"] = _ratio(contribution, row.expert(window, "contribution_weight")[:num])
    if compared > 0:
        fields["disagreement_js"] = float(row.layer(window, "js")) / compared
        fields["disagreement_flip"] = float(row.layer(window, "flip")) / compared
        fields["overlap_only"] = float(row.layer(window, "overlap")) / compared
    return fields


def _state_fields(host: Mapping[str, Any], layer: Layer, config: ChronoConfig) -> dict[str, Any]:
    at, num = layer.layer_id, layer.num_experts
    fields: dict[str, Any] = {
        "total_tokens_seen": np.rint(host["tokens"][at, :num]).astype(np.int64),
        "logit_std": float(host["logit_std"][at]),
    }
    if config.coherence.enabled and layer.experts is not None:
        seen = host["updates"][at, :num] > 0
        for name in ("phi_fast", "phi_mid", "phi_slow"):
            fields[name] = [float(v) if s else None for v, s in zip(host[name][at, :num], seen, strict=True)]
    if config.beta.law != "none" and not layer.native_bias:
        fields["beta"] = host["beta"][at, :num].tolist()
        fields["relevance"] = float(host["relevance"][at])
    lens = layer.handle.lens
    if lens is not None:
        fields["lens_scale"] = lens.scale
    return fields
