"""What a window says of replay: its scalars and its alerts.

The record is made by ``replay.sums``; its schema is in ``docs/replay.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chronomoe_hf.config import ReplayConfig
from chronomoe_hf.telemetry.alerts import (
    REPLAY_IDLE,
    REPLAY_INVALID,
    REPLAY_UNCOVERED,
    ROUTING_MISMATCH,
    Alert,
    AlertHistory,
)

MISMATCH_AFTER = 2
"""Windows of a mismatch with a high k3 before ROUTING_MISMATCH."""
_ORDER = ("rollout_old", "rollout_gradient", "old_gradient")
_WORDS = {
    "rollout_old": "rollout and old-policy pass",
    "rollout_gradient": "rollout and gradient pass",
    "old_gradient": "old-policy and gradient pass",
}


def mismatches(record: Mapping[str, Any]) -> dict[str, list[float]]:
    """Pair of passes -> the known mismatches of its layers."""
    return {name: [value for value in pair["mismatch"] if value is not None] for name, pair in record["pairs"].items()}


def rollout_k3(record: Mapping[str, Any]) -> float | None:
    """k3 KL between rollout and trainer, nats: of the old-policy pass where there is one, else of the gradient pass."""
    logps = record["logps"]
    for name in ("rollout_old", "rollout_gradient"):
        if name in logps:
            return float(logps[name]["k3"])
    return None


def replay_scalars(record: Mapping[str, Any]) -> dict[str, float | None]:
    """At most five numbers for a tracker; what is undefined is None."""
    worst = [max(values) for values in mismatches(record).values() if values]
    flips = [value for value in record.get("recompute", {}).get("flips", []) if value is not None]
    logps = record["logps"]
    return {
        "replay_mismatch_max": max(worst, default=None),
        "replay_covered_min": record["coverage"],
        "rollout_k3": rollout_k3(record),
        "old_k3": logps["old_gradient"]["k3"] if "old_gradient" in logps else None,
        "recompute_flips_max": max(flips, default=None),
    }


def replay_alerts(record: Mapping[str, Any], history: AlertHistory, step: int, config: ReplayConfig) -> list[Alert]:
    """Edges of one window; `history` is changed in place."""
    if config.mode == "off":
        return []
    mismatch = _mismatch(record, config)
    edges = [
        None if mismatch is None else history.observe(ROUTING_MISMATCH, None, step, **mismatch),
        history.observe(REPLAY_UNCOVERED, None, step, **_uncovered(record, config)),
        history.observe(REPLAY_INVALID, None, step, **_invalid(record)),
        history.observe(REPLAY_IDLE, None, step, **_idle(record, config)),
    ]
    return [edge for edge in edges if edge is not None]


def _mismatch(record: Mapping[str, Any], config: ReplayConfig) -> dict[str, Any] | None:
    """Both a mismatch and a high k3: choices that differ and change nothing are no damage.

    Where there is an old-policy pass, it speaks for the trainer: between it and the gradient pass the weights have
    moved, which says nothing of the engine. None = a window of such gradient passes alone: nothing is known of it.
    """
    known = {*record["pairs"], *record["logps"]}
    moved = not known.isdisjoint({"rollout_old", "old_gradient"})
    for name in _ORDER:
        if name == "rollout_gradient" and moved:
            continue
        pair, logps = record["pairs"].get(name), record["logps"].get(name)
        if pair is None or logps is None or pair["mean"] <= 0.0 or logps["k3"] <= config.k3:
            continue
        most = [(value, layer) for value, layer in zip(pair["mismatch"], record["layers"], strict=True) if value]
        layers = ", ".join(str(layer) for _, layer in sorted(most, reverse=True)[:3])
        repeated = name in ("rollout_old", "rollout_gradient") and config.mode == "rollout"
        repeated = repeated or (name == "old_gradient" and config.mode == "old")
        way = (
            "the choices are repeated already, so what is left comes from elsewhere (precision, stale weights)"
            if repeated
            else "repeat them with replay.mode='rollout'"
            + (" or 'old'" if name == "old_gradient" else "")
            + ", see docs/replay.md"
        )
        detail = (
            f"{_WORDS[name]} choose other experts in {pair['mean']:.2%} of (token, layer) and k3 is {logps['k3']:.3g} "
            f"nats (limit {config.k3:g}), largest difference of a log-probability {logps['logp_diff_max']:.3g}; most "
            f"in layers {layers}; {way}"
        )
        if name != "old_gradient":
            detail += (
                ". Where both numbers grow from window to window, the engine has older weights than the trainer: check "
                "that every optimizer step is followed by a weight sync"
            )
        return {"holds": True, "after": MISMATCH_AFTER, "detail": detail}
    later = "rollout_gradient" in record["pairs"] and moved and "rollout_old" not in known
    return None if later else {"holds": False}


def _uncovered(record: Mapping[str, Any], config: ReplayConfig) -> dict[str, Any]:
    coverage = record["coverage"]
    if coverage is None or coverage >= config.min_coverage:
        return {"holds": False}
    store = record["store"]
    if store["dropped"]:
        why = f"{store['dropped']} records went because of replay.max_bytes; raise it"
    elif record["unknown_rows"] == record["rows"]:
        why = "no row is known: the engine hands out no routes, or its texts are not those that are trained on"
    elif record["unknown_rows"]:
        why = f"{record['unknown_rows']} of {record['rows']} rows are unknown"
    else:
        why = "rows are known only in part: they were edited after the rollout, or the engine's part ends early"
    detail = f"{coverage:.0%} of the tokens have a record (limit {config.min_coverage:.0%}); {why}"
    return {"holds": True, "detail": detail}


def _invalid(record: Mapping[str, Any]) -> dict[str, Any]:
    if record["misaligned"]:
        return {"holds": True, "detail": record["misaligned"]}
    wrong = record["invalid"]
    if not wrong:
        return {"holds": False}
    detail = f"{wrong['tokens']} tokens of the engine's routes cannot be choices and were left out: {wrong['why']}"
    return {"holds": True, "detail": detail}


def _idle(record: Mapping[str, Any], config: ReplayConfig) -> dict[str, Any]:
    if not record["passes"]["gradient"]:
        return {
            "holds": True,
            "detail": f"replay.mode is {config.mode!r}, and no gradient pass was seen since the last window: a model "
            "under torch.compile or model.compile() neither tells what it chose nor can be told; train it uncompiled",
        }
    if config.mode == "measure" or record["tokens_repeated"]:
        return {"holds": False}
    if config.mode == "old":
        why = (
            "the trainer runs no old-policy pass before the gradient pass (TRL leaves it out where every batch is used "
            "for one optimizer step: gradient_accumulation_steps is then a multiple of steps_per_generation * "
            "num_iterations, and the ratio is 1 by construction); set num_iterations=2 or a larger "
            "steps_per_generation for mode 'old' to mean anything"
        )
    else:
        why = (
            "no record of a rollout fits the rows that are trained on; start the engine with "
            "--enable-return-routed-experts, or give the routes with system.replay.add(tokens, routes)"
        )
    return {
        "holds": True,
        "detail": f"replay.mode is {config.mode!r}, and no gradient pass found a choice to repeat: {why}",
    }
