"""From a window's sums to events: every per-expert field against its plain definition, expert by expert."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import models as tiny

import chronomoe_hf
from chronomoe_hf import ChronoConfig, ChronoSystem, metrics
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.window.host import Moment

CLOCKS = ("phi_fast", "phi_mid", "phi_slow")
AT = Moment("run", 8, window_steps=4, governed=True, step_ms=1.0)


def filled() -> tuple[ChronoSystem, dict[str, Any]]:
    """A system whose sums are random, with an expert without evidence and one whose sums are not finite."""
    model = tiny.tiny_model("qwen3_moe")
    chronomoe_hf.wrap(model, ChronoConfig.protect())
    system = chronomoe_hf.system_of(model)
    state, row = system.step_state, system.step_state.row
    generator = torch.Generator().manual_seed(3)
    state.window_LR.copy_(torch.rand(state.window_LR.shape, generator=generator, dtype=torch.float64) * 50)
    row.count(state.window_LR).round_()
    for name in ("phi_rows", "first"):
        row.expert(state.window_LR, name).round_()
    row.expert(state.window_LR, "contribution_weight")[0, 1] = 0.0
    row.expert(state.window_LR, "contribution")[0, 2] = math.inf
    state.tokens_LE.copy_(row.count(state.window_LR))
    state.updates_LE.fill_(3)
    state.updates_LE[1, 0] = 0
    state.ema_CLE.copy_(torch.rand(state.ema_CLE.shape, generator=generator, dtype=torch.float64))
    state.beta_LE.copy_(torch.rand(state.beta_LE.shape, generator=generator))
    return system, state.host()


def test_every_field_is_its_definition() -> None:
    system, host = filled()
    row = system.step_state.row
    events = system.host.events(AT, host, spread={0: 0.25})
    assert len(events) == len(system.layers) >= 2
    for at, event in enumerate(events):
        window, tokens = host["window"][at], float(row.meta(host["window"][at], "tokens"))
        for expert in range(event.n_experts):

            def of(name: str, window: Any = window, expert: int = expert) -> float:
                return float(row.expert(window, name)[expert])

            own, weight = of("contribution"), of("contribution_weight")
            seen = host["updates"][at, expert] > 0
            want = {
                "expert_token_counts": int(row.count(window)[expert]),
                "prob_mean": of("prob") / tokens,
                "first_choices": int(of("first")),
                "phi_rows": int(of("phi_rows")),
                "contribution": own,
                "saliency": own / weight if weight > 0 else None,
                "gate_sum": of("gate_sum"),
                "mean_norm": of("norm_sum") / weight if weight > 0 else None,
                "total_tokens_seen": int(host["tokens"][at, expert]),
                "beta": float(host["beta"][at, expert]),
                **{name: float(host[name][at, expert]) if seen else None for name in CLOCKS},
            }
            for name, value in want.items():
                got = getattr(event, name)[expert]
                assert got == (None if value is None or not math.isfinite(value) else value), (at, expert, name)
                assert type(got) in (int, float, type(None)), name
        compared = float(row.layer(window, "compared"))
        assert event.overlap_only == float(row.layer(window, "overlap")) / compared
        assert event.tokens == round(tokens) and event.lens_spread == (0.25 if at == 0 else None)
    assert events[0].saliency[1] is events[0].contribution[2] is events[0].saliency[2] is None
    assert events[1].phi_slow[0] is None and events[1].phi_slow[1] is not None


def test_what_was_not_measured_is_left_out() -> None:
    system, host = filled()
    for event in system.host.events(AT, {"window": host["window"]}, mode="EVAL"):
        assert event.phi_slow is event.beta is event.total_tokens_seen is event.logit_std is None
        assert event.prob_mean is not None and event.contribution is not None
    system.step_state.row.meta(host["window"], "tokens")[:] = 0.0
    assert all(event.prob_mean is None for event in system.host.events(AT, host))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_counts_that_are_none_are_refused(bad: float) -> None:
    system, host = filled()
    host["window"][1, 2] = bad
    with pytest.raises(ConfigError, match="counts assignments"):
        system.host.events(AT, host)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=130), st.integers(1, 4))
def test_all_metrics_at_once_are_the_functions_one_by_one(counts: list[int], k: int) -> None:
    k = min(k, len(counts))
    top2 = metrics.top2_share(counts)
    assert metrics.load_metrics(np.array(counts), k)._asdict() == {
        "entropy": metrics.compute_entropy(counts),
        "n_effective": metrics.effective_experts(counts),
        "top2_share": top2,
        "top2_relative": None if top2 is None else metrics.relative_top2(top2, k),
        "dead_experts": metrics.dead_experts(counts),
        "nearly_dead_count": metrics.nearly_dead_count(counts),
        "max_violation": metrics.max_violation(counts),
        "max_violation_ceiling": metrics.max_violation_ceiling(len(counts), k),
        "gini": metrics.gini(counts),
        "load_cv": metrics.load_cv(counts),
    }
