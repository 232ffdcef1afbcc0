"""SystemSnapshot: merging, evidence, scalars, cost."""

from __future__ import annotations

import json
import math

import pytest

from chronomoe_hf.config import AlertConfig
from chronomoe_hf.errors import ConfigError
from chronomoe_hf.telemetry import AlertHistory, LayerSnapshot, RoutingEvent, SystemSnapshot


def event(counts, layer_id=0, step=10, top_k=2, **fields) -> RoutingEvent:
    base = {"run_id": "r", "step": step, "mode": "TRAIN", "layer_id": layer_id, "n_experts": len(counts)}
    return RoutingEvent.from_router_output(**{**base, "top_k": top_k, "used_capacity": counts, **fields})


def snapshot(events, n_layers=1, step=10, history=None, **fields) -> SystemSnapshot:
    return SystemSnapshot.from_events(
        events=events, step=step, run_id="r", model_name="m", n_layers=n_layers, alert_history=history, **fields
    )


def test_several_events_of_a_layer_are_merged_by_their_meaning():
    first = event(
        [30, 10, 0, 0],
        tokens=20,
        calls=2,
        dropped=1,
        prob_mean=[0.7, 0.3, 0.0, 0.0],
        contribution=[3.0, 1.0, None, None],
        saliency=[0.1, 0.1, None, None],
        phi_slow=[0.9, 0.8, None, None],
        disagreement_js=0.1,
        relevance=1.0,
    )
    second = event(
        [0, 50, 10, 0],
        tokens=60,
        calls=3,
        dropped=2,
        prob_mean=[0.1, 0.8, 0.1, 0.0],
        contribution=[None, 5.0, 1.0, None],
        saliency=[None, 0.4, 0.1, None],
        phi_slow=[0.9, 0.5, 0.2, None],
        disagreement_js=0.3,
        relevance=0.5,
    )
    layer = snapshot([first, second]).layers[0]
    assert layer.expert_token_counts == [30, 60, 10, 0]
    assert layer.shares == [0.3, 0.6, 0.1, 0.0]
    assert (layer.tokens, layer.calls, layer.dropped, layer.window_steps) == (80, 5, 3, 2)
    assert layer.prob_mean == pytest.approx([(14 + 6) / 80, (6 + 48) / 80, 6 / 80, 0.0])
    assert layer.contribution == [3.0, 6.0, 1.0, None]
    assert layer.saliency[1] == pytest.approx((0.1 * 10 + 0.4 * 50) / 60)
    assert layer.saliency[3] is None
    assert layer.disagreement_js == pytest.approx((0.1 * 20 + 0.3 * 60) / 80)
    assert layer.phi_slow == [0.9, 0.5, 0.2, None]  # the newest reading of the clocks, not a mean
    assert layer.relevance == 0.5
    assert layer.coherence_mean == pytest.approx((0.9 * 30 + 0.5 * 60 + 0.2 * 10) / 100)
    assert layer.coherence_min == 0.2
    assert layer.dead_experts == 1


def test_layers_keep_their_order_and_own_size():
    events = [event([1] * 8, layer_id=2, top_k=1), event([5, 5], layer_id=0, top_k=1)]
    got = snapshot(events, n_layers=3)
    assert [layer.layer_id for layer in got.layers] == [0, 2]
    assert [layer.n_experts for layer in got.layers] == [2, 8]


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match="one mode"):
        snapshot([event([1, 1]), event([1, 1], mode="EVAL")])
    with pytest.raises(ConfigError, match="n_layers is 1"):
        snapshot([event([1, 1], layer_id=1)])
    with pytest.raises(ConfigError, match="different"):
        snapshot([event([1, 1]), event([1, 1, 1])])


@pytest.mark.parametrize(("total", "sufficient"), [(4 * 8 - 1, False), (4 * 8, True), (0, False)])
def test_thin_windows_say_so(total, sufficient):
    got = snapshot([event([total, 0, 0, 0])], config=AlertConfig(min_window_tokens=8))
    assert got.layers[0].sufficient is sufficient
    assert any("insufficient evidence" in note for note in got.notes) is not sufficient
    assert got.to_record()["layers"][0]["sufficient"] is sufficient


def test_a_layer_built_by_hand_has_its_metrics():
    layer = LayerSnapshot(layer_id=0, n_experts=4, top_k=2, expert_token_counts=[4, 2, 1, 1])
    assert layer.n_effective == pytest.approx(2**1.75)
    assert layer.top2_share == layer.top2_relative == 0.75
    assert LayerSnapshot(layer_id=0, n_experts=4, top_k=2, expert_token_counts=[0] * 4).n_effective is None


def test_default_scalars_are_fourteen_plain_floats():
    events = [
        event([40, 40, 40, 40], layer_id=0, phi_slow=[0.5, 0.5, 0.5, 0.1]),
        event([80, 80, 0, 0], layer_id=1, phi_slow=[0.2, 0.4, None, None]),
    ]
    got = snapshot(events, n_layers=2, step_ms=1.5).scalars()
    want = {
        "moe/neff_mean": 3.0,
        "moe/neff_min": 2.0,
        "moe/maxvio_mean": 0.5,
        "moe/maxvio_max": 1.0,
        "moe/top2_share_mean": 0.75,
        "moe/top2_share_max": 1.0,
        "moe/neff_share_min": 0.5,
        "moe/gini_mean": 0.25,
        "moe/load_cv_mean": 0.5,
        "moe/dead_experts": 2.0,
        "moe/coherence_mean": (0.4 + 0.3) / 2,
        "moe/coherence_min": 0.1,
        "moe/alerts_active": 0.0,
        "moe/step_ms": 1.5,
    }
    assert got == pytest.approx(want)
    assert list(got) == list(want)
    assert all(type(value) is float for value in got.values())
    assert set(snapshot(events, n_layers=2).scalars("eval_moe/")) == {
        name.replace("moe/", "eval_moe/") for name in want if name != "moe/step_ms"
    }


def test_undefined_scalars_are_left_out():
    got = snapshot([event([0, 0, 0, 0])]).scalars()
    assert got == {"moe/alerts_active": 0.0}


def test_layer_scalars_sort_and_carry_no_expert():
    events = [event([9] * 4, layer_id=layer_id) for layer_id in range(12)]
    names = list(snapshot(events, n_layers=12).layer_scalars())
    assert "moe/layer_07/neff" in names and "moe/layer_11/maxvio" in names
    assert all(name.count("/") == 2 and name.isascii() for name in names)
    assert any(name.startswith("moe/layer_007/") for name in _wide().layer_scalars())


def _wide() -> SystemSnapshot:
    return snapshot([event([9] * 4, layer_id=7)], n_layers=120)


def test_the_record_is_strict_json_and_light():
    bad = math.nan
    events = [event([40] * 4, logit_std=bad, phi_slow=[bad] * 4)]
    got = snapshot(events, train_loss=bad, val_loss=2.5, step_ms=math.inf)
    record = json.loads(json.dumps(got.to_record(), allow_nan=False))
    assert record["train_loss"] is None and record["val_loss"] == 2.5
    assert (record["run_id"], record["step"], record["mode"], record["schema"]) == ("r", 10, "TRAIN", 2)
    assert record["layers"][0]["n_effective"] == pytest.approx(4.0)
    assert "expert_token_counts" not in record["layers"][0], "per-expert values belong to the routing events"


def test_a_look_at_the_open_window_leaves_the_history_alone():
    history = AlertHistory()
    before = history.state_dict()
    events = [event([100, 0, 0, 0], top_k=1)]
    snapshot(events, history=history.copy())
    assert history.state_dict() == before
    snapshot(events, history=history)
    assert history.state_dict() != before
