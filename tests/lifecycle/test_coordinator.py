"""The dry-run lifecycle: cases, evidence, edges, thresholds, memory."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import numpy as np
import pytest

from chronomoe_hf.config import LifecycleConfig
from chronomoe_hf.errors import ConfigError, StateCorruptError, StateMismatchError
from chronomoe_hf.lifecycle import LifecycleCoordinator, PruneDecision
from chronomoe_hf.lifecycle.dry_run.cases import layer_coherence, prune_threshold
from chronomoe_hf.telemetry import AlertHistory, RoutingEvent, SystemSnapshot

E = 8
SEEN = [5000] * E
PHI = [0.60, 0.62, 0.58, 0.61, 0.59, 0.60, 0.61, 0.59]
NUMERIC = LifecycleConfig(prune_threshold=0.3, starvation_threshold=0.5)


def snapshot_of(
    step: int,
    phi_slow: list[float | None] | None = PHI,
    total_tokens_seen: list[int] | None = SEEN,
    counts: list[int] | None = None,
    **fields: Any,
) -> SystemSnapshot:
    counts = [1000] * E if counts is None else counts
    event = RoutingEvent.from_router_output(
        run_id="run",
        step=step,
        mode="TRAIN",
        layer_id=0,
        used_capacity=counts,
        n_experts=len(counts),
        top_k=2,
        phi_slow=phi_slow,
        total_tokens_seen=total_tokens_seen,
        **fields,
    )
    return SystemSnapshot.from_events(
        events=[event], step=step, run_id="run", model_name="toy", n_layers=1, alert_history=AlertHistory()
    )


def with_entry(values: list[Any], expert: int, value: Any) -> list[Any]:
    return [value if index == expert else old for index, old in enumerate(values)]


def edges(decisions: list[PruneDecision]) -> list[tuple[int, str, str]]:
    return [(decision.expert, decision.reason, decision.state) for decision in decisions]


def run(coordinator: LifecycleCoordinator, *snapshots: SystemSnapshot) -> list[list[tuple[int, str, str]]]:
    return [edges(coordinator.evaluate(snapshot)) for snapshot in snapshots]


def test_a_healthy_layer_gives_no_case():
    coordinator = LifecycleCoordinator(n_layers=1)
    assert run(coordinator, *(snapshot_of(step) for step in range(100, 3000, 100))) == [[]] * 29


def test_low_coherence_becomes_candidate_confirmed_withdrawn_once_each():
    coordinator = LifecycleCoordinator(NUMERIC, n_layers=1)
    low = with_entry(PHI, 3, 0.2999)
    got = run(coordinator, *(snapshot_of(step, low) for step in range(100, 700, 100)), snapshot_of(700))
    case = (3, "low_coherence")
    assert got == [[(*case, "candidate")], [], [(*case, "confirmed")], [], [], [], [(*case, "withdrawn")]]


def test_confirmation_needs_consecutive_evaluations():
    coordinator = LifecycleCoordinator(NUMERIC, n_layers=1)
    low = with_entry(PHI, 3, 0.1)
    got = run(coordinator, *(snapshot_of(100, phi) for phi in (low, low, PHI, low, low, low)))
    states = [[state for _, _, state in each] for each in got]
    assert states == [["candidate"], [], ["withdrawn"], ["candidate"], [], ["confirmed"]]


def test_one_confirmation_is_enough_if_asked():
    coordinator = LifecycleCoordinator(
        LifecycleConfig(prune_threshold=0.3, starvation_threshold=0.5, confirmations=1), n_layers=1
    )
    got = run(coordinator, snapshot_of(100, with_entry(PHI, 3, 0.1)))
    assert [state for _, _, state in got[0]] == ["candidate", "confirmed"]


@pytest.mark.parametrize(
    ("phi", "tokens", "case"), [(0.3, 5000, False), (0.2999, 1000, False), (0.2999, 1001, True), (None, 5000, False)]
)
def test_low_coherence_boundaries(phi, tokens, case):
    coordinator = LifecycleCoordinator(NUMERIC, n_layers=1)
    got = coordinator.evaluate(snapshot_of(100, with_entry(PHI, 3, phi), with_entry(SEEN, 3, tokens)))
    assert edges(got) == ([(3, "low_coherence", "candidate")] if case else [])


@pytest.mark.parametrize(
    ("step", "tokens", "case"), [(1000, 0, False), (1001, 0, True), (1100, 99, True), (1100, 100, False)]
)
def test_low_observability_boundaries(step, tokens, case):
    coordinator = LifecycleCoordinator(n_layers=1)
    got = coordinator.evaluate(snapshot_of(step, with_entry(PHI, 5, None), with_entry(SEEN, 5, tokens)))
    assert edges(got) == ([(5, "low_observability", "candidate")] if case else [])


def test_a_starving_layer_vetoes_low_observability_and_withdraws_it():
    coordinator = LifecycleCoordinator(NUMERIC, n_layers=1)
    seen = with_entry(SEEN, 5, 3)
    starving = [0.45] * E
    got = run(coordinator, snapshot_of(1100, PHI, seen), snapshot_of(1200, starving, seen))
    assert got == [[(5, "low_observability", "candidate")], [(5, "low_observability", "withdrawn")]]
    fresh = LifecycleCoordinator(NUMERIC, n_layers=1)
    assert run(fresh, snapshot_of(1200, starving, seen)) == [[]]


def test_layer_coherence_is_weighted_by_tokens():
    assert layer_coherence([0.2, 0.8, None, 0.9], [3000, 1000, 500, None]) == pytest.approx(0.35)
    assert layer_coherence([None], [10]) is None
    assert layer_coherence([0.5], [0]) is None
    assert layer_coherence(None, [10]) is None
    assert layer_coherence([0.5], None) is None


def test_auto_prune_threshold_is_the_robust_rule_over_the_judged_experts():
    phi: list[float | None] = [0.6, 0.5, 0.7, 0.4, 0.8, 0.6, 0.55, 0.2, 0.9, None]
    seen = [5000] * 8 + [1000, 5000]  # the ninth is too young, the tenth has no phi
    ordered = sorted(phi[:8])
    median = (ordered[3] + ordered[4]) / 2
    distances = sorted(abs(value - median) for value in ordered)
    deviation = 1.4826 * (distances[3] + distances[4]) / 2
    threshold = prune_threshold(phi, seen, LifecycleConfig())
    assert threshold == pytest.approx(median - 3 * deviation, abs=1e-12) and deviation > 0.05
    close = [0.6, 0.61, 0.6, 0.59]
    assert prune_threshold(close, [5000] * 4, LifecycleConfig()) == pytest.approx(0.6 - 3 * 0.05)
    assert prune_threshold(phi, seen, NUMERIC) == 0.3
    assert prune_threshold([0.5, None, 0.1], [5000, 5000, 5000], LifecycleConfig()) is None
    assert prune_threshold(None, seen, LifecycleConfig()) is None


@pytest.mark.parametrize(("experts", "bad"), [(3, 1), (4, 1), (5, 2), (8, 2), (16, 4), (16, 7), (128, 32)])
def test_auto_is_not_masked_by_its_own_outliers(experts: int, bad: int):
    """Mean - 2 standard deviations, the rule of before, finds none of these."""
    random = np.random.default_rng(experts + bad)
    healthy = random.normal(0.6, 0.03, experts)
    phi = np.concatenate([healthy[bad:], random.normal(0.1, 0.03, bad)])
    threshold = prune_threshold(phi.tolist(), [5000] * experts, LifecycleConfig())
    assert threshold is not None and (phi < threshold).tolist() == [False] * (experts - bad) + [True] * bad
    if bad > 1:
        assert not (phi < phi.mean() - 2 * phi.std()).any()


def test_auto_accuses_fewer_healthy_layers_than_the_rule_of_before():
    """Layers of normally distributed phi, in which nobody is to be accused."""
    random = np.random.default_rng(0)
    for experts, most in ((8, 0.15), (32, 0.15), (128, 0.3)):
        layers = random.normal(0.5, 0.1, (300, experts))
        seen = [5000] * experts
        new = np.mean([(phi < prune_threshold(phi.tolist(), seen, LifecycleConfig())).any() for phi in layers])
        old = np.mean([(phi < phi.mean() - 2 * phi.std()).any() for phi in layers])
        assert new < most and new < old, (experts, new, old)


def test_auto_finds_the_outlier_at_any_level_of_coherence_and_nobody_among_equals():
    for offset in (0.0, -0.55):  # around zero an absolute threshold of 0.3 would accuse all eight
        coordinator = LifecycleCoordinator(n_layers=1)
        phi = [value + offset for value in with_entry(PHI, 2, 0.40)]
        assert run(coordinator, snapshot_of(100, phi)) == [[(2, "low_coherence", "candidate")]]
    assert run(LifecycleCoordinator(n_layers=1), snapshot_of(100, [0.5] * E)) == [[]]


@pytest.mark.parametrize(("base", "below", "above"), [(0.5, 0.39, 0.41), (-0.5, -0.61, -0.59)])
def test_auto_starvation_compares_with_the_layers_own_baseline(base, below, above):
    seen = with_entry(SEEN, 5, 3)
    for level, vetoed in ((below, True), (above, False)):
        coordinator = LifecycleCoordinator(n_layers=1)
        # The baseline is the mean of three evaluations: base.
        run(coordinator, *(snapshot_of(100 * n, [base + 0.01 * (n - 2)] * E) for n in (1, 2, 3)))
        (got,) = run(coordinator, snapshot_of(1100, [level] * E, seen))
        assert (got == []) is vetoed


def test_a_thin_window_changes_nothing_and_is_reported_once(caplog):
    caplog.set_level(logging.INFO, logger="chronomoe_hf")
    coordinator = LifecycleCoordinator(NUMERIC, n_layers=1)
    low, thin = with_entry(PHI, 3, 0.1), [1] * E
    run(coordinator, snapshot_of(100, low), snapshot_of(200, low))
    before = coordinator.state_dict()["layers"][0]["cases"]
    assert run(coordinator, snapshot_of(300, low, counts=thin), snapshot_of(400, PHI, counts=thin)) == [[], []]
    assert coordinator.state_dict()["layers"][0]["cases"] == before == [[3, "low_coherence", 2]]
    assert sum("insufficient evidence" in message for message in caplog.messages) == 1
    assert run(coordinator, snapshot_of(500, low)) == [[(3, "low_coherence", "confirmed")]]


def test_without_measurements_there_is_no_case():
    coordinator = LifecycleCoordinator(n_layers=1)
    assert run(coordinator, snapshot_of(2000, None, None), snapshot_of(2100, None, SEEN)) == [[], []]
    # Tokens are counted even where expert outputs are not read.
    got = run(coordinator, snapshot_of(2200, None, with_entry(SEEN, 1, 0)))
    assert got == [[(1, "low_observability", "candidate")]]


def test_evidence_record_and_log_line(caplog):
    caplog.set_level(logging.INFO, logger="chronomoe_hf")
    coordinator = LifecycleCoordinator(NUMERIC, n_layers=1)
    phi = with_entry(PHI, 3, 0.25)
    (decision,) = coordinator.evaluate(
        snapshot_of(
            1200,
            phi,
            counts=[1000, 2000, 500, 500, 1000, 1000, 1000, 1000],
            phi_fast=with_entry(PHI, 3, 0.15),
            phi_mid=with_entry(PHI, 3, 0.2),
            contribution=[40.0, 30.0, 20.0, 10.0, 5.0, 10.0, None, 50.0],
            saliency=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, None, 0.8],
        )
    )
    record = json.loads(json.dumps(decision.to_record(), allow_nan=False))
    evidence = record.pop("evidence")
    assert record == {
        "run_id": "run",
        "step": 1200,
        "layer_id": 0,
        "expert_id": "L0_E3",
        "expert": 3,
        "reason": "low_coherence",
        "phi_slow": 0.25,
        "total_tokens_seen": 5000,
        "state": "candidate",
        "streak": 1,
        "threshold": 0.3,
        "dry_run": True,
    }
    assert evidence["phi_delta"] == pytest.approx(-0.1)
    assert evidence["contribution_rank"] == 5  # 50, 40, 30, 20 contribute more; the other 10 ties
    assert evidence["share"] == 500 / 8000
    assert evidence["layer_phi"] == pytest.approx(sum(phi) / E)
    assert {name: evidence[name] for name in ("phi_fast", "phi_mid", "phi_slow", "total_tokens_seen")} == {
        "phi_fast": 0.15,
        "phi_mid": 0.2,
        "phi_slow": 0.25,
        "total_tokens_seen": 5000,
    }
    assert (evidence["contribution"], evidence["saliency"], evidence["layer_starving"]) == (10.0, 0.4, False)
    (message,) = caplog.messages
    assert message.startswith("[DRY-RUN] step 1200 L0_E3: low_coherence candidate")
    assert "contribution rank 5 of 8" in message


def test_log_has_one_line_per_change_and_survives_missing_numbers(caplog):
    caplog.set_level(logging.INFO, logger="chronomoe_hf")
    coordinator = LifecycleCoordinator(n_layers=1)
    seen = with_entry(SEEN, 4, 0)
    run(coordinator, *(snapshot_of(step, None, seen) for step in range(1100, 2100, 100)))
    assert [message.split(": ")[1].split(" (")[0] for message in caplog.messages] == [
        "low_observability candidate",
        "low_observability confirmed",
    ]
    assert "phi_slow unknown" in caplog.messages[0]


def test_state_returns_bit_for_bit_and_the_run_continues_identically():
    phis = [[value + 0.013 * math.sin(7 * n + e) for e, value in enumerate(PHI)] for n in range(20)]
    snapshots = [
        snapshot_of(900 + 100 * n, with_entry(phi, 2, 0.45 if n % 7 else 0.6), with_entry(SEEN, 6, 20 * n))
        for n, phi in enumerate(phis)
    ]
    straight = LifecycleCoordinator(n_layers=1)
    expected = [[decision.to_record() for decision in straight.evaluate(snapshot)] for snapshot in snapshots]
    assert sum(len(each) for each in expected) >= 6, "bad test setup: hardly anything happens"
    first = LifecycleCoordinator(n_layers=1)
    for snapshot in snapshots[:9]:
        first.evaluate(snapshot)
    saved = json.dumps(first.state_dict(), allow_nan=False)
    second = LifecycleCoordinator(n_layers=1)
    second.load_state_dict(json.loads(saved))
    assert json.dumps(second.state_dict(), allow_nan=False) == saved
    assert [[d.to_record() for d in second.evaluate(snapshot)] for snapshot in snapshots[9:]] == expected[9:]


def test_foreign_and_torn_state_is_refused_and_leaves_the_memory_alone():
    coordinator = LifecycleCoordinator(NUMERIC, n_layers=1)
    coordinator.evaluate(snapshot_of(100, with_entry(PHI, 3, 0.1)))
    good = coordinator.state_dict()
    with pytest.raises(StateMismatchError, match="2 layers"):
        coordinator.load_state_dict(LifecycleCoordinator(n_layers=2).state_dict())
    layer = {"cases": [], "baseline": [], "insufficient": False}
    for bad in (
        {},
        {"layers": None},
        {"layers": [{}]},
        {"layers": [{**layer, "cases": [[3, "dislike", 1]]}]},
        {"layers": [{**layer, "cases": [[3]]}]},
        {"layers": [{**layer, "baseline": ["x"]}]},
    ):
        with pytest.raises(StateCorruptError):
            coordinator.load_state_dict(bad)
    assert coordinator.state_dict() == good


def test_disabled_and_impossible():
    off = LifecycleCoordinator(LifecycleConfig(enabled=False), n_layers=1)
    assert off.evaluate(snapshot_of(2000, total_tokens_seen=[0] * E)) == []
    with pytest.raises(ConfigError):
        LifecycleCoordinator(n_layers=0)
    stray = snapshot_of(100)
    stray.layers[0].layer_id = 4
    with pytest.raises(ConfigError, match="layer 4"):
        LifecycleCoordinator(n_layers=1).evaluate(stray)
