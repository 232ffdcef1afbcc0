"""What a run of the balance benchmark is measured by.

Legend: S steps, L layers, E experts, W windows.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from balance.job import Run

SMOOTH = 10  # steps over which "balanced" must hold on average
TAIL = 50  # last steps that describe where a run ended
TARGET, FLOOR = 0.9, 0.6  # fractions of E


def neff_fraction(count_SLE: Tensor) -> Tensor:
    """exp(entropy of the shares) / E, per step and layer; float64 ``(S, L)``."""
    share_SLE = count_SLE.double() / count_SLE.sum(-1, keepdim=True)
    entropy_SL = -(torch.special.xlogy(share_SLE, share_SLE)).sum(-1)
    return entropy_SL.exp() / count_SLE.shape[-1]


def updates_to_reach(neff_SL: Tensor, target: float = TARGET) -> int | None:
    """First step from which every layer's Neff/E averages at least `target` over the next SMOOTH steps, 1-based."""
    good_S = (neff_SL.unfold(0, SMOOTH, 1).mean(-1) >= target).all(-1)
    found = torch.nonzero(good_S)
    return int(found[0]) + 1 if len(found) else None


def lens_spreads(decisions: list[Any]) -> list[float]:
    """How unevenly the lens's reader reads tokens: median over the evaluations, per layer; empty without lenses."""
    spreads: dict[int, list[float]] = {}
    for decision in decisions:
        if decision.lens is not None and decision.lens["spread"] is not None:
            spreads.setdefault(decision.layer_id, []).append(decision.lens["spread"])
    return [round(statistics.median(spreads[layer]), 3) for layer in sorted(spreads)]


def summarise(run: Run, interval: int) -> dict[str, Any]:
    """The numbers of one run; every "worst" is over layers."""
    neff_SL = neff_fraction(run.count_SLE)
    count = run.count_SLE.double()
    violation_SL = count.amax(-1) / count.mean(-1) - 1.0
    windows = run.count_SLE[: len(count) // interval * interval].unflatten(0, (-1, interval)).sum(1)
    window_neff_WL = neff_fraction(windows)
    half = len(windows) // 2
    # Only an abstention in the stretch that is judged explains a layer below the floor.
    late = [decision for decision in run.decisions if decision.step > len(count) - TAIL]
    dead_L = (run.count_SLE[-TAIL:].sum(0) == 0).sum(-1).tolist()

    def abstained(layer: int) -> dict[str, int]:
        named = [d.abstain_reason for d in late if d.layer_id == layer]
        return {reason: named.count(reason) for reason in dict.fromkeys(named) if reason is not None}

    reasons: dict[str, int] = {}
    for decision in run.decisions:
        reasons[decision.abstain_reason or "acted"] = reasons.get(decision.abstain_reason or "acted", 0) + 1
    return {
        "valid_loss": run.valid_loss,
        "train_loss": [
            round(statistics.fmean(run.losses[at : at + TAIL]), 5) for at in range(0, len(run.losses), TAIL)
        ],
        "neff_tail": neff_SL[-TAIL:].mean(0).tolist(),
        "worst_neff_tail": float(neff_SL[-TAIL:].mean(0).min()),
        "worst_neff_window": float(window_neff_WL.min()),
        "worst_neff_window_second_half": float(window_neff_WL[half:].min()),
        "neff_windows": [[round(value, 4) for value in row] for row in window_neff_WL.tolist()],
        "updates_to_reach": updates_to_reach(neff_SL),
        "max_violation_tail": float(violation_SL[-TAIL:].mean(0).max()),
        "max_violation_valid": max(run.valid_violation),
        "dead_windows": int((windows == 0).sum()),
        "dead_tail": sum(dead_L),
        "floor_misses": [
            {"layer": layer, "dead": dead, "abstained": abstained(layer)}
            for layer, (value, dead) in enumerate(zip(neff_SL[-TAIL:].mean(0).tolist(), dead_L, strict=True))
            if value < FLOOR or dead
        ],
        "decisions": reasons,
        "lens_spread": lens_spreads(run.decisions),
        "lens_scale": [
            round(max((d.scale for d in run.decisions if d.layer_id == layer), default=0.0), 3)
            for layer in range(run.count_SLE.shape[1])
        ],
        "harmed": sum(decision.harmed for decision in run.decisions),
        "alerts": sorted({alert.kind for alert in run.alerts}),
        "first_action": run.first_action,
        "loss_bits": [loss.hex() for loss in run.losses[: 2 * interval]],
        "seconds": round(run.seconds, 1),
    }
