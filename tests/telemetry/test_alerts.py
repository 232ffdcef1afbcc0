"""Alerts: thresholds, persistence, edges, evidence, state."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chronomoe_hf.config import AlertConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.telemetry import Alert, AlertHistory, RoutingEvent, SystemSnapshot


class Run:
    """Feeds one layer's counts snapshot by snapshot."""

    def __init__(self, top_k=2, history=None, config=None):
        self.top_k, self.config, self.step = top_k, config, 0
        self.history = AlertHistory() if history is None else history

    def see(self, counts, governed=False, **fields) -> list[tuple[str, str]]:
        self.step += 100
        event = RoutingEvent.from_router_output(
            run_id="r",
            step=self.step,
            mode="TRAIN",
            layer_id=0,
            used_capacity=counts,
            n_experts=len(counts),
            top_k=self.top_k,
            **fields,
        )
        self.snapshot = SystemSnapshot.from_events(
            events=[event],
            step=self.step,
            run_id="r",
            model_name="m",
            n_layers=1,
            alert_history=self.history,
            config=self.config,
            governed=governed,
        )
        return [(alert.kind, alert.state) for alert in self.snapshot.alerts]

    @property
    def active(self) -> set[str]:
        return {alert.kind for alert in self.snapshot.active_alerts}


def collapsed(size: int, k: int) -> list[int]:
    return [1000 * size if expert < k else 0 for expert in range(size)]


@pytest.mark.parametrize("size", [8, 64, 128])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_total_collapse_is_found_for_every_k_on_the_edge_once(size, k):
    if k == size:
        pytest.skip("every expert serves every token")
    run = Run(top_k=k)
    edges = [run.see(collapsed(size, k)) for _ in range(8)]
    assert edges[2] == [("PRE_COLLAPSE", "raised")]
    assert edges[4] == [("COLLAPSE_CONFIRMED", "raised")]
    assert [edge for edge in edges if edge] == [edges[2], edges[4]]
    assert run.active == {"PRE_COLLAPSE", "COLLAPSE_CONFIRMED"}
    assert [alert.step for alert in run.snapshot.active_alerts] == [300, 500]
    assert set(run.see([1000] * size)) == {("PRE_COLLAPSE", "cleared"), ("COLLAPSE_CONFIRMED", "cleared")}
    assert run.active == set()
    assert run.see([1000] * size) == []


@pytest.mark.parametrize(("size", "k"), [(2, 1), (4, 2), (4, 4), (8, 1), (8, 6), (8, 8), (64, 8), (128, 8)])
def test_balanced_routing_raises_nothing(size, k):
    run = Run(top_k=k)
    assert [run.see([1000] * size) for _ in range(10)] == [[]] * 10


def test_persistence_starts_again_after_one_good_snapshot():
    run = Run(config=AlertConfig(baseline_windows=100))  # keeps DRIFT out of the story
    bad, good = collapsed(8, 2), [1000] * 8
    for counts in (bad, bad, good, bad, bad):
        assert run.see(counts) == []
    assert run.see(bad) == [("PRE_COLLAPSE", "raised")]


def test_each_half_of_pre_collapse_suffices():
    low_neff = [100] * 4 + [0] * 4  # n_effective 4 < 4.8, top-2 0.5
    run = Run()
    assert [run.see(low_neff) for _ in range(3)][-1] == [("PRE_COLLAPSE", "raised")]
    top_heavy = [380, 380] + [38] * 6  # top-2 0.77 of a ceiling of 1
    config = AlertConfig(neff_floor=0.0)
    run = Run(config=config)
    assert [run.see(top_heavy) for _ in range(3)][-1] == [("PRE_COLLAPSE", "raised")]
    run = Run(config=AlertConfig(neff_floor=0.0, top2_pre=0.8))
    assert [run.see(top_heavy) for _ in range(3)][-1] == []


def test_confirmation_needs_a_dead_expert():
    nearly = [5000, 5000] + [10] * 6
    run = Run()
    for _ in range(10):
        run.see(nearly)
    assert run.active == {"PRE_COLLAPSE"}
    assert [run.see([5000, 5000, 0] + [10] * 5) for _ in range(5)][-1] == [("COLLAPSE_CONFIRMED", "raised")]


def test_thin_windows_neither_raise_nor_clear_nor_count():
    run = Run()
    thin = [30, 30, 0, 0, 0, 0, 0, 0]  # 60 of 64 needed
    for _ in range(10):
        assert run.see(thin) == []
    bad = collapsed(8, 2)
    assert run.see(bad) == run.see(thin) == run.see(bad) == run.see(thin) == []
    assert run.see(bad) == [("PRE_COLLAPSE", "raised")]
    assert run.see([1] * 8) == [], "eight assignments prove no recovery"
    assert run.active == {"PRE_COLLAPSE"}


def test_drift_is_measured_against_the_runs_own_first_windows():
    run = Run()
    even, narrow = [1000] * 8, [1000] * 6 + [0, 0]  # n_effective 8 and 6: below 0.8 of 8, above 0.6 of 8
    for _ in range(3):
        run.see(even)
    assert run.history.baseline(0) == pytest.approx(8.0)
    assert [run.see(narrow) for _ in range(4)] == [[], [], [("DRIFT", "raised")], []]
    assert run.see(even) == [("DRIFT", "cleared")]


def test_governance_ends_the_baseline_for_good():
    run = Run(config=AlertConfig(baseline_windows=3))
    run.see([1000] * 8)
    run.see([1000] * 6 + [0, 0], governed=True)
    run.see([1000] * 6 + [0, 0])  # not governed any more: still not part of the baseline
    assert run.history.baseline(0) == pytest.approx(8.0)
    assert run.see([1000] * 6 + [0, 0]) == [("DRIFT", "raised")]


def test_a_run_that_is_governed_from_the_start_has_its_first_windows_as_baseline():
    run = Run()
    for _ in range(6):
        run.see([1000] * 8, governed=True)
    assert run.history.baseline(0) == pytest.approx(8.0)
    assert [run.see([1000] * 6 + [0, 0], governed=True) for _ in range(4)][-2] == [("DRIFT", "raised")]


# ---- level and movement ----------------------------------------------------------------------------------------------


def noisy(shares, tokens, generator) -> list[int]:
    """Counts of `tokens` tokens that choose one expert each."""
    return generator.multinomial(tokens, np.array(shares) / sum(shares)).tolist()


NARROW = [50, 22, 8, 6, 4, 4, 3, 3]  # n_effective 4.4 of 8, below the floor of 4.8
NARROWER = [70, 20, 2, 2, 2, 2, 1, 1]


def test_a_level_that_never_moves_is_as_it_came_however_long_the_run_is():
    for seed in range(20):
        generator = np.random.default_rng(seed)
        run = Run(top_k=1)
        edges = [edge for _ in range(60) for edge in run.see(noisy(NARROW, 2000, generator))]
        assert {kind for kind, _ in edges} <= {"PRE_COLLAPSE"}
        assert not any(alert.urgent for alert in run.snapshot.active_alerts)
        assert ("PRE_COLLAPSE", "worsened") not in edges


def test_a_layer_that_concentrates_further_got_worse_within_three_windows():
    generator = np.random.default_rng(0)
    run = Run(top_k=1)
    for _ in range(6):
        run.see(noisy(NARROW, 2000, generator))
    assert [alert.since for alert in run.snapshot.active_alerts] == ["as_it_came"]
    edges = [run.see(noisy(NARROWER, 2000, generator)) for _ in range(3)]
    assert ("PRE_COLLAPSE", "worsened") in edges[-1] and edges[0] == edges[1] == []
    (alert,) = [a for a in run.snapshot.active_alerts if a.kind == "PRE_COLLAPSE"]
    assert alert.since == "got_worse" and alert.urgent and alert.step == 900
    assert "baseline" in alert.detail and alert.to_record()["since"] == "got_worse"
    for _ in range(2):
        run.see(noisy(NARROW, 2000, generator))
    assert not any(alert.urgent for alert in run.snapshot.active_alerts), "back where it began"


@pytest.mark.parametrize("after", [1, 3, 20])
def test_a_planted_collapse_is_urgent_within_five_windows(after):
    generator = np.random.default_rng(after)
    run = Run(top_k=1)
    for _ in range(after):
        run.see(noisy([1] * 8, 2000, generator))
    for _ in range(5):
        run.see(noisy([90, 10, 0, 0, 0, 0, 0, 0], 2000, generator))
    urgent = {alert.kind for alert in run.snapshot.active_alerts if alert.urgent}
    assert {"PRE_COLLAPSE", "COLLAPSE_CONFIRMED", "DRIFT"} <= urgent
    assert run.snapshot.layers[0].died == [2, 3, 4, 5, 6, 7]


def test_an_expert_that_was_idle_from_the_start_does_not_die():
    run = Run(top_k=1)
    run.see([1000] * 7 + [0])
    run.see([1000] * 6 + [60, 0])
    for _ in range(6):
        run.see([1000] * 6 + [0, 0])
    assert run.snapshot.layers[0].died == [6]
    thin = Run(top_k=1)
    thin.see([100] * 7 + [30])
    for _ in range(6):
        thin.see([15] * 7 + [0])
    assert thin.snapshot.layers[0].died == [], "six windows with two or three expected tokens each prove nothing"


def test_an_evaluation_has_no_baseline():
    event = RoutingEvent.from_router_output(
        run_id="r", step=1, mode="EVAL", layer_id=0, used_capacity=[1000] * 4, n_experts=4, top_k=1
    )
    kept: dict = {}
    snapshot = SystemSnapshot.from_events(
        events=[event], step=1, run_id="r", model_name="m", n_layers=1, alert_history=kept
    )
    assert snapshot.layers[0].change == {} and kept["reference"]["layers"] == {}


def test_unobserved_layers_are_named_at_once():
    run = Run()
    assert run.see([0] * 8, calls=0) == [("NOT_OBSERVED", "raised")]
    assert run.see([0] * 8, calls=0) == []
    assert run.see([1] * 8, calls=1) == [("NOT_OBSERVED", "cleared")]
    empty = SystemSnapshot.from_events(events=[], step=1, run_id="r", model_name="m", n_layers=2, alert_history={})
    assert [(alert.kind, alert.layer_id) for alert in empty.alerts] == [("NOT_OBSERVED", 0), ("NOT_OBSERVED", 1)]


def test_non_finite_logits_alert_even_when_nothing_else_is_left():
    run = Run()
    assert run.see([0] * 8, calls=4, nonfinite_tokens=512) == [("NON_FINITE", "raised")]
    assert "512 tokens" in str(run.snapshot.alerts[0])
    assert run.see([1000] * 8, calls=4) == [("NON_FINITE", "cleared")]


def test_a_plain_dict_is_a_history_and_survives_json():
    kept: dict = {}
    run = Run(history=kept)
    bad = collapsed(8, 2)
    run.see(bad)
    run.see(bad)
    resumed = Run(history=json.loads(json.dumps(kept)))
    assert resumed.see(bad) == [("PRE_COLLAPSE", "raised")]
    state = AlertHistory(resumed.history).state_dict()
    again = AlertHistory()
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.state_dict() == state
    run = Run(history=again)
    assert run.see(bad) == [], "an alert in force is not raised again after a resume"
    assert run.see([1000] * 8) == [("PRE_COLLAPSE", "cleared")]


def test_what_is_no_history_is_refused():
    with pytest.raises(ConfigError, match="streak"):
        AlertHistory({"streak": 3})
    with pytest.raises(ConfigError, match="no alert"):
        AlertHistory().observe("PRE", 0, 1, holds=True)


def test_alerts_from_elsewhere_share_the_history():
    history = AlertHistory()
    edge = history.observe("RESUME_MISMATCH", None, 40, holds=True, detail="3 routers differ")
    assert str(edge) == "RESUME_MISMATCH raised (model, step 40): 3 routers differ"
    assert history.observe("RESUME_MISMATCH", None, 50, holds=True) is None
    assert history.active == [Alert("RESUME_MISMATCH", None, "raised", 40, "3 routers differ")]
    assert edge.to_record()["state"] == "raised"


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["even", "pair", "thin", "dead"]), max_size=40), st.integers(0, 10**6))
def test_edges_alternate_and_the_order_of_experts_is_irrelevant(story, seed):
    kinds = {
        "even": [1000] * 8,
        "pair": [5000, 5000] + [10] * 6,
        "thin": [1] * 8,
        "dead": [5000, 5000, 0, 0, 0, 0, 0, 5],
    }
    plain, shuffled = Run(), Run()
    state: dict[str, str] = {}
    order = random.Random(seed)
    for word in story:
        counts = kinds[word][:]
        edges = plain.see(counts)
        order.shuffle(counts)
        assert shuffled.see(counts) == edges
        for kind, edge in edges:
            if edge == "worsened":
                assert state[kind] == "raised"
                continue
            assert edge == ("raised" if state.get(kind, "cleared") == "cleared" else "cleared")
            state[kind] = edge
        assert plain.active == {kind for kind, edge in state.items() if edge == "raised"}
