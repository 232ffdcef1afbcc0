"""From host arrays to RoutingEvents: what one window's sums mean, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chronomoe_hf.config import ChronoConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.expert_numbers import PER_EXPERT
from chronomoe_hf.recording.columns import Row
from chronomoe_hf.router.forward import ChronoRouter
from chronomoe_hf.telemetry import RoutingEvent
from chronomoe_hf.telemetry.alerts import NOT_RECORDED, UNOBSERVED
from chronomoe_hf.telemetry.values import evidence_rows, known
from chronomoe_hf.wrapping.layer import Layer

# Why a wrapped layer was not called in a window, as far as the model itself shows it.


def why_unobserved(layer: Layer, others_ran: bool) -> str:
    """The likely cause, with the way out.

    Args:
        layer: a layer that no training forward called in the window.
        others_ran: other layers of the model were called in it.
    """
    recorder, router = layer.recorder, layer.router
    if (fault := recorder.fault or recorder.scope.fault) is not None:
        return fault
    if not isinstance(router, ChronoRouter) or not any(module is router for module in layer.parent.modules()):
        return (
            f"another module runs in the place of {layer.name}, put there after wrap(); "
            "call chronomoe_hf.unwrap(model) and then wrap(model) on the model as it is now"
        )
    if recorder.missed:
        return (
            f"its router ran {recorder.missed} times in training, but outside any forward of the model that owns it: a "
            "part of the model was called by itself, where padding and the end of a forward cannot be told; call the "
            "model, or count those steps yourself"
        )
    passes = recorder.scope.passes
    if passes.in_backward:
        return (
            f"its {passes.in_backward} forwards with gradient ran inside backward, where they cannot be told from the "
            "recompute of activation checkpointing: their batches were not seen before, in training mode"
        )
    if passes.without_grad:
        return (
            f"its {passes.without_grad} forwards in training mode ran under torch.no_grad() (a frozen part of the "
            "model, a reference): they train nothing and are not counted"
        )
    if others_ran:
        return "other layers ran in this window and this one did not: no token took that branch of the model"
    if not layer.parent.training:
        return "the model is in eval mode; call model.train()"
    return "no training forward of this model ran: another model object may be in training (wrap or attach that one)"


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
        host: arrays of ``StepState.host()``, and ``"router_drift"`` by layer id where it was measured; only
            ``"window"`` for evaluation.
        run_id: of the run.
        attempt: start or resume of the run.
        step: optimizer step at which the window ends.
        mode: ``"TRAIN"`` or ``"EVAL"``.
        window_steps: optimizer steps in the window.
        config: settings in force; they say what was measured.
        lens_spread: of the layers whose router inputs were read in this window's last step.
    """
    window_LR = host["window"]
    others_ran = bool((row.meta(window_LR, "calls") > 0).any())
    counts = _counts(row.count(window_LR))
    vectors = {**_window_vectors(row, window_LR), **(_state_vectors(host) if "tokens" in host else {})}
    events = []
    for layer in layers:
        at, num = layer.layer_id, layer.num_experts
        fault = layer.recorder.outputs_fault
        reads = config.coherence.enabled and layer.experts is not None and fault is None
        names = _vectors_of(layer, config, reads, has_tokens=row.meta(window_LR[at], "tokens") > 0)
        fields: dict[str, Any] = {name: vectors[name][at][:num] for name in names if name in vectors}
        fields |= _window_numbers(row, window_LR[at])
        fields |= _state_numbers(host, layer, config) if "tokens" in host else {}
        events.append(
            RoutingEvent(
                run_id=run_id,
                attempt=attempt,
                step=step,
                mode=mode,  # type: ignore[arg-type]
                layer_id=at,
                layer_name=layer.name,
                n_experts=num,
                top_k=_top_k(layer),
                window_steps=window_steps,
                expert_token_counts=counts[at][:num],
                notes=[*layer.notes, *_faults(layer), *_remarks(row, window_LR[at], layer, reads, others_ran)],
                **fields,
                lens_spread=known((lens_spread or {}).get(at)),
                router_drift=_drift_of(host, at),
                cut=list(layer.cut),
            )
        )
    return events


def _top_k(layer: Layer) -> int:
    """k of the window; where it changed in it the least, whose ceiling no share exceeds."""
    return layer.recorder.least_top_k or layer.top_k


def _drift_of(host: Mapping[str, Any], layer_id: int) -> list[float | int | None] | None:
    drift = host.get("router_drift", {}).get(layer_id)
    return None if drift is None else [known(value) for value in drift]


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


def _faults(layer: Layer) -> list[str]:
    """What is not recorded any more, because a part of ours failed in a forward."""
    recorder = layer.recorder
    faults = (recorder.fault or recorder.scope.fault, recorder.outputs_fault)
    return [NOT_RECORDED + fault for fault in faults if fault is not None]


def _remarks(row: Row, window: Any, layer: Layer, reads: bool, others_ran: bool) -> list[str]:
    """What is to be said of this window of the layer."""
    if row.meta(window, "calls") == 0:
        return [UNOBSERVED + why_unobserved(layer, others_ran)]
    return [*_changed_top_k(layer), *(_unread(row, window) if reads else [])]


def _changed_top_k(layer: Layer) -> list[str]:
    """Says so where tokens did not get the same number of experts throughout."""
    least, most = layer.recorder.least_top_k, layer.recorder.most_top_k
    if least is None or least == most:
        return []
    return [
        f"experts per token changed in this window, between {least} and {most}: its shares are of both, its ceilings "
        f"are those of {least}"
    ]


def _unread(row: Row, window: Any) -> list[str]:
    """Says so where tokens were routed, but no expert output was seen (a kernel replaced the experts' forward)."""
    if row.count(window).sum() == 0 or row.expert(window, "phi_rows").sum() > 0:
        return []
    return [
        "no expert output was read in this window: something replaced the experts' forward after wrap(), or the "
        "outputs were not finite"
    ]


def _counts(count_LE: Any) -> list[list[int]]:
    """Counts of every layer as Python ints.

    Raises:
        ConfigError: what is no count.
    """
    if not (count_LE >= 0).all() or not np.isfinite(count_LE).all():
        raise ConfigError(f"a window counts assignments: finite numbers >= 0, got {count_LE.min()} to {count_LE.max()}")
    rows: list[list[int]] = np.rint(count_LE).astype(np.int64).tolist()
    return rows


def _window_vectors(row: Row, window_LR: Any) -> dict[str, list[list[Any]]]:
    """Per-expert fields that the window's sums say, for all layers at once: ``[L][E]``, padded to the widest layer."""
    out: dict[str, list[list[Any]]] = {}
    for name, number in PER_EXPERT.items():
        if number.column is None:
            continue
        value_LE = row.expert(window_LR, number.column)
        if number.whole:
            out[name] = np.rint(value_LE).astype(np.int64).tolist()
            continue
        if number.over is not None:
            tokens = number.over == "tokens"
            over_LE = row.meta(window_LR, "tokens")[:, None] if tokens else row.expert(window_LR, number.over)
            with np.errstate(divide="ignore", invalid="ignore"):  # no evidence becomes None
                value_LE = np.where(over_LE > 0, value_LE / over_LE, np.nan)
        out[name] = evidence_rows(value_LE)
    return out


def _state_vectors(host: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """Per-expert fields of the state, for all layers at once."""
    seen_LE = host["updates"] > 0
    clocks = ("phi_fast", "phi_mid", "phi_slow")
    return {
        **{name: evidence_rows(np.where(seen_LE, host[name], np.nan)) for name in clocks},
        "total_tokens_seen": np.rint(host["tokens"]).astype(np.int64).tolist(),
        "beta": evidence_rows(host["beta"]),
    }


def _vectors_of(layer: Layer, config: ChronoConfig, reads: bool, has_tokens: bool) -> list[str]:
    """The per-expert fields that are measured in a layer; router drift has a way of its own."""
    known = {"state": True, "tokens": has_tokens, "outputs": reads, "drift": False}
    known["beta"] = config.beta.law != "none" and not layer.native_bias
    return [name for name, number in PER_EXPERT.items() if known[number.needs]]


def _window_numbers(row: Row, window_R: Any) -> dict[str, Any]:
    compared = float(row.layer(window_R, "compared"))
    fields: dict[str, Any] = {
        "tokens": round(float(row.meta(window_R, "tokens"))),
        "dropped": round(float(row.meta(window_R, "dropped"))),
        "nonfinite_tokens": round(float(row.meta(window_R, "nonfinite"))),
        "calls": round(float(row.meta(window_R, "calls"))),
    }
    if compared > 0:
        fields["disagreement_js"] = known(float(row.layer(window_R, "js")) / compared)
        fields["disagreement_flip"] = known(float(row.layer(window_R, "flip")) / compared)
        fields["overlap_only"] = known(float(row.layer(window_R, "overlap")) / compared)
    steered = float(row.layer(window_R, "steered_tokens"))
    if steered > 0:
        fields["topk_disagreement"] = known(float(row.layer(window_R, "topk_differs")) / steered)
    return fields


def _state_numbers(host: Mapping[str, Any], layer: Layer, config: ChronoConfig) -> dict[str, Any]:
    at = layer.layer_id
    fields: dict[str, Any] = {"logit_std": known(float(host["logit_std"][at]))}
    if config.beta.law != "none" and not layer.native_bias:
        fields["relevance"] = known(float(host["relevance"][at]))
    lens = layer.handle.lens
    if lens is not None:
        fields["lens_scale"] = known(float(lens.scale))
    return fields
